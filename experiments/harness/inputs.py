"""Bad input is one line that names it, and status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line and says what would be right."""


def main_guard(main: Callable[[], None]) -> None:
    """Run ``main``: bad input, a full disk or killed workers are one line and status 2; Ctrl-C says how to go on."""
    try:
        main()
    except InputError as error:
        sys.exit(_complain(str(error), 2))
    except (OSError, BrokenExecutor) as error:
        what = "a process of a run was killed again and again" if isinstance(error, BrokenExecutor) else error
        sys.exit(_complain(f"{what}; what is finished is kept, and the same command goes on from there", 2))
    except KeyboardInterrupt:
        sys.exit(_complain("stopped; what is finished is kept, and the same command goes on from there", 130))


def _complain(message: str, status: int) -> int:
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    return status
