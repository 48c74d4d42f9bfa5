"""``widerf erf | summary | doctor | init | convert MODEL``: look at a network, or at what widening would do to it."""

from __future__ import annotations

import argparse
import io
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from widerf.cli.faults import EXPECTED, in_a_line

_LARGEST = 2**28  # numbers in an input: more is a slip of the keyboard, and no machine has the memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # σ and × on a terminal that has none
    options = _parser().parse_args(given)
    options.shown = shlex.join(["widerf", *given])
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        warnings.simplefilter("once", UserWarning)
        try:
            from widerf.cli import running

            getattr(running, options.run)(options)
        except EXPECTED as error:
            print(f"widerf: error: {in_a_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


def _say_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        print(f"widerf: warning: {message}", file=sys.stderr)


def _size(text: str) -> tuple[int, ...]:
    parts = text.lower().replace("×", "x").replace(",", "x").split("x")
    try:
        size = tuple(int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be CHANNELSxHEIGHTxWIDTH such as 3x224x224, got {text!r}") from None
    if min(size) < 1 or math.prod(size) > _LARGEST:
        raise argparse.ArgumentTypeError(f"must be positive and hold at most {_LARGEST:,} numbers, got {text!r}")
    return size


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def _whole(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 7,7, got {text!r}") from None


class _Completion(argparse.Action):
    """Print what makes a shell complete commands and options, and end."""

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, __: object = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("completion needs shtab: pip install 'widerf[completion]'")
        print(shtab.complete(parser, shell))
        parser.exit(0)


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _common(several: bool = False) -> _Parser:
    """Arguments of every command."""
    common = _Parser(add_help=False)
    common.add_argument(
        "model",
        metavar="MODEL",
        nargs="+" if several else None,
        help="timm name, module:callable, or a checkpoint (with --timm)"
        + (", several for one table" if several else ""),
    )
    common.add_argument("--timm", metavar="NAME", help="timm name of the model that the checkpoint belongs to")
    common.add_argument("--checkpoint", metavar="FILE", help="weights of MODEL: .safetensors, .pth, .pt")
    common.add_argument("--pretrained", action="store_true", help="the trained weights that timm has by that name")
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the model's builder; may be repeated",
    )
    common.add_argument("--input-size", type=_size, metavar="CxHxW", help="default: what the model asks for")
    common.add_argument("--seed", type=int, default=0, help="of the model's initialisation (default: %(default)s)")
    common.add_argument("--train", action="store_true", help="training mode instead of evaluation mode")
    common.add_argument("--out", type=Path, metavar="DIR", help="write figures and an HTML report there")
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return common


def _parser() -> argparse.ArgumentParser:
    import widerf

    one, several = _common(), _common(several=True)
    parser = _Parser(prog="widerf", description="See and widen the receptive fields of a network.")
    parser.add_argument("--version", action="version", version=f"widerf {widerf.__version__}")
    parser.add_argument(
        "--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), help="print a completion script"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    erf = commands.add_parser("erf", parents=[several], help="measure and predict the effective receptive field")
    erf.add_argument("--unit", type=_whole, metavar="I,J", help="unit on the map; default: the centre one")
    erf.add_argument("--samples", type=_count, default=32, help="images to measure with; 0: predict only (default: 32)")
    summary = commands.add_parser("summary", parents=[one], help="one row a layer: field, ERF, share used, silent")
    summary.add_argument("--layers", nargs="+", metavar="NAME", help="modules; default: those that change what is seen")
    summary.add_argument("--samples", type=_count, default=0, help="images to measure each row with (default: none)")
    doctor = commands.add_parser(
        "doctor", parents=[one], help="what is wrong with the field, and the call that mends it"
    )
    doctor.add_argument("--object-size", type=float, metavar="N", help="side of the objects to be seen, input pixels")
    init = commands.add_parser("init", parents=[one], help="dry run of the widening initialisation")
    init.add_argument("--strength", type=float, default=0.5, help="0 to 1 (default: %(default)s)")
    init.add_argument("--target", type=float, help="wanted ratio of the ERF's std, instead of --strength")
    init.add_argument("--base", help="draw the weights anew first, e.g. kaiming_normal")
    convert = commands.add_parser("convert", parents=[one], help="conversion to sparse taps: dry run, or --save")
    convert.add_argument("--extent", type=int, help="side of the tap window; default: by layer, from its map")
    convert.add_argument("--pattern", help="tap pattern; default: by kind of layer")
    convert.add_argument("--target", type=float, help="wanted ratio of the ERF's std, instead of --extent")
    convert.add_argument("--kurtosis", type=float, help="wanted excess kurtosis of the ERF, with --target")
    convert.add_argument("--block", type=int, help="neighbouring channels that share their taps at most")
    convert.add_argument("--save", metavar="FILE", help="write the converted weights: .safetensors, .pth or .pt")
    for command in (erf, doctor, init, convert):
        command.add_argument("--layer", help="module whose output is looked at; default: the last spatial map")
    for command in (init, convert):
        command.add_argument("--only", action="append", metavar="NAME", help="pattern of layers to change; repeatable")
        command.add_argument("--skip", action="append", metavar="NAME", help="pattern of layers to leave; repeatable")
    for name, command in commands.choices.items():
        command.set_defaults(run=name)
    return parser


if __name__ == "__main__":
    sys.exit(main())
