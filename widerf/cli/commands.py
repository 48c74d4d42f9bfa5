"""``widerf erf | init | convert MODEL``: look at a network, or at what widening would do to it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from widerf._checks import require
from widerf.report import Report, plain, table

if TYPE_CHECKING:
    from torch import nn

    from widerf.erf.map import ERF

_EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after one line on stderr that says what was wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(given)
    options.shown = shlex.join(["widerf", *given])
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        warnings.simplefilter("once", UserWarning)
        try:
            options.run(options)
        except _EXPECTED as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            print(f"widerf: error: {said[0]}", file=sys.stderr)
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
        return tuple(int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be CHANNELSxHEIGHTxWIDTH such as 3x224x224, got {text!r}") from None


def _whole(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 7,7, got {text!r}") from None


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    import widerf

    common = _Parser(add_help=False)
    common.add_argument("model", metavar="MODEL", help="timm name, module:callable, or a checkpoint (with --timm)")
    common.add_argument("--timm", metavar="NAME", help="timm name of the model that the checkpoint belongs to")
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the model's builder; may be repeated",
    )
    common.add_argument("--input-size", type=_size, metavar="CxHxW", help="default: what the model asks for")
    common.add_argument("--layer", help="module whose output is looked at; default: the last spatial map")
    common.add_argument("--seed", type=int, default=0, help="of the model's initialisation (default: %(default)s)")
    common.add_argument("--train", action="store_true", help="training mode instead of evaluation mode")
    common.add_argument("--out", type=Path, metavar="DIR", help="write figures and an HTML report there")
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")

    parser = _Parser(prog="widerf", description="See and widen the receptive fields of a network.")
    parser.add_argument("--version", action="version", version=f"widerf {widerf.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    erf = commands.add_parser("erf", parents=[common], help="measure and predict the effective receptive field")
    erf.add_argument("--unit", type=_whole, metavar="I,J", help="unit on the map; default: the centre one")
    erf.add_argument("--samples", type=int, default=32, help="images to measure with; 0: predict only (default: 32)")
    erf.set_defaults(run=_erf)
    init = commands.add_parser("init", parents=[common], help="dry run of the widening initialisation")
    init.add_argument("--strength", type=float, default=0.5, help="0 to 1 (default: %(default)s)")
    init.add_argument("--target", type=float, help="wanted ratio of the ERF's std, instead of --strength")
    init.add_argument("--base", help="draw the weights anew first, e.g. kaiming_normal")
    convert = commands.add_parser("convert", parents=[common], help="dry run of the conversion to sparse taps")
    convert.add_argument("--extent", type=int, help="side of the tap window; default: by layer, from its map")
    convert.add_argument("--pattern", help="tap pattern; default: by kind of layer")
    convert.add_argument("--target", type=float, help="wanted ratio of the ERF's std, instead of --extent")
    convert.add_argument("--block", type=int, help="neighbouring channels that share their taps at most")
    for command, run in ((init, _init), (convert, _convert)):
        command.add_argument("--only", action="append", metavar="NAME", help="pattern of layers to change; repeatable")
        command.add_argument("--skip", action="append", metavar="NAME", help="pattern of layers to leave; repeatable")
        command.set_defaults(run=run)
    return parser


def _prepared(options: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    import torch

    from widerf.cli.loading import default_input_size, load_model, parse_arguments

    torch.manual_seed(options.seed)
    arguments = parse_arguments(options.set)
    try:
        model = load_model(options.model, name=options.timm, arguments=arguments)
    except (RuntimeError, KeyError) as error:  # a checkpoint of another model, or what the model's builder says
        raise ValueError(f"MODEL must build, got {options.model!r}: {str(error).strip().splitlines()[0]}") from error
    return model.train(options.train), options.input_size or default_input_size(model)


def _erf(options: argparse.Namespace) -> None:
    import widerf

    model, size = _prepared(options)
    erfs: dict[str, ERF] = {"predicted": widerf.predict(model, size, layer=options.layer, unit=options.unit)}
    if options.samples > 0:
        erfs["measured"] = widerf.measure(
            model, size, layer=options.layer, unit=options.unit, samples=options.samples, progress=not options.json
        )
    field = widerf.receptive_field(model, size, layer=options.layer)
    facts: dict[str, Any] = {
        "layer": field.layer or "the model's output", "theoretical size": field.size, "jump": field.jump,
        "global paths": len(field.global_paths),
    }  # fmt: skip
    lines = [f"{name}: {_text(value)}" for name, value in facts.items()]
    told = {"model": options.model, "input_size": size, "receptive_field": facts}
    _give(options, lines, erfs, told, "Effective receptive field")


def _before(options: argparse.Namespace, model: nn.Module, size: tuple[int, ...]) -> ERF:
    import widerf
    from widerf.convolutions.selection import find_kernels

    # Ahead of the prediction, which would only miss a spatial map.
    require(bool(find_kernels(model)), "MODEL", "hold at least one convolution", options.model)
    return widerf.predict(model, size, layer=options.layer)


def _init(options: argparse.Namespace) -> None:
    import widerf

    model, size = _prepared(options)
    before = _before(options, model, size)
    report = widerf.init.apply(
        model, options.strength, target=options.target, base=options.base, only=options.only,
        skip=options.skip, input_size=size,
    )  # fmt: skip
    # The model is this process's own: nothing is written back, so for the user it is a dry run.
    report = dataclasses.replace(report, dry_run=True)
    _give_report(options, model, size, before, report, "Widening initialisation (dry run)")


def _convert(options: argparse.Namespace) -> None:
    import widerf

    model, size = _prepared(options)
    before = _before(options, model, size)
    report = widerf.convert(
        model, extent=options.extent, pattern=options.pattern, target=options.target, block=options.block,
        only=options.only, skip=options.skip, input_size=size, seed=options.seed,
    )  # fmt: skip
    _give_report(options, model, size, before, report, "Conversion to sparse taps (dry run)")


def _give_report(
    options: argparse.Namespace, model: nn.Module, size: tuple[int, ...], before: ERF, report: Report[Any], title: str
) -> None:
    import widerf

    erfs = {"before": before, "after": widerf.predict(model, size, layer=options.layer)}
    told = {"model": options.model, "input_size": size, "report": report.to_dict()}
    _give(options, [], erfs, told, title, report)


def _text(value: object) -> str:
    return "×".join(f"{entry:g}" for entry in value) if isinstance(value, tuple) else str(value)


def _figures_of(erf: ERF) -> dict[str, Any]:
    """Return the figures of an ERF, in input pixels where they are lengths."""
    figures: dict[str, Any] = {
        "std": erf.std, "std per axis": erf.std_per_axis, "2-sigma size": erf.size(),
        "area ratio at 0.5": erf.area_ratio(0.5), "excess kurtosis": erf.excess_kurtosis, "clipped": erf.clipped,
    }  # fmt: skip
    if erf.samples is not None and erf.blocks is not None and len(erf.blocks) > 1:
        figures["std 95 % interval"] = erf.interval("std")
    return figures


def _give(
    options: argparse.Namespace,
    lines: Sequence[str],
    erfs: Mapping[str, ERF],
    told: dict[str, Any],
    title: str,
    report: Report[Any] | None = None,
) -> None:
    """Print what was found, and write it to the folder if there is one."""
    figures = {name: _figures_of(erf) for name, erf in erfs.items()}
    told = told | {"erf": figures}
    keys = list(dict.fromkeys(key for found in figures.values() for key in found))
    rows = [[key, *(_short(found.get(key)) for found in figures.values())] for key in keys]
    if options.json:
        print(json.dumps(plain(told), indent=2, ensure_ascii=False))
    else:
        print("\n".join([*lines, table(["ERF (input pixels)", *figures], rows)]))
        if report is not None:
            print(f"\n{report}")
    if options.out is not None:
        _write(options, lines, erfs, told, title, report, rows)
        print(f"widerf: wrote {options.out / 'report.html'}", file=sys.stderr)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " … ".join(_short(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else ("" if value is None else str(value))


def _write(
    options: argparse.Namespace,
    lines: Sequence[str],
    erfs: Mapping[str, ERF],
    told: dict[str, Any],
    title: str,
    report: Report[Any] | None,
    rows: Sequence[Sequence[str]],
) -> None:
    from widerf.cli.page import write_page
    from widerf.erf import plot
    from widerf.report import html_table

    options.out.mkdir(parents=True, exist_ok=True)
    made = plot.compare(erfs)
    plot.save(made, options.out / "erf.png")
    for name, erf in erfs.items():
        erf.save(options.out / f"{name}.npz")
    (options.out / "report.json").write_text(json.dumps(plain(told), indent=2, ensure_ascii=False), encoding="utf-8")
    body = html_table(["ERF (input pixels)", *erfs], rows) + (report._repr_html_() if report is not None else "")
    heading = f"{title}: {options.model}"
    write_page(options.out / "report.html", heading, lines, {", ".join(erfs): made}, body, options.shown)


if __name__ == "__main__":
    sys.exit(main())
