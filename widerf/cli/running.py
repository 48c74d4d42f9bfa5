"""What each command does."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widerf._checks import require
from widerf.cli.faults import EXPECTED, in_a_line
from widerf.cli.giving import Found, figures_of, give, short, text
from widerf.report import PATIENCE, Report, listed, progress_bar

if TYPE_CHECKING:
    from torch import nn

    from widerf.erf.map import ERF


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a command is about.

    Attributes:
        name: as the user typed it.
        model: the model, in the mode that was asked for.
        size: ``(channels, *spatial)``.
        weights: where its weights come from.
    """

    name: str
    model: nn.Module
    size: tuple[int, ...]
    weights: str

    def told(self, **more: Any) -> dict[str, Any]:
        """Return the facts for machines."""
        return {"model": self.name, "input_size": self.size, "weights": self.weights, **more}

    @property
    def line(self) -> str:
        """The source of the weights, for people."""
        return f"weights: {self.weights}"


def prepared(options: argparse.Namespace, name: str) -> Subject:
    """Build the model that a user names."""
    import torch

    from widerf.cli.loading import default_input_size, load, parse_arguments

    torch.manual_seed(options.seed)
    loaded = load(
        name, name=options.timm, checkpoint=options.checkpoint, pretrained=options.pretrained,
        arguments=parse_arguments(options.set),
    )  # fmt: skip
    model = loaded.model.train(options.train)
    drawn = loaded.weights == "drawn at random"
    weights = f"{loaded.weights}, seed {options.seed}" if drawn else loaded.weights
    return Subject(name, model, options.input_size or default_input_size(model), weights)


def erf(options: argparse.Namespace) -> None:
    """``widerf erf``: one model in full, or several in one table."""
    if len(options.model) == 1:
        give(options, _erf(options, options.model[0]))
        return
    names = progress_bar(options.model, shown=not options.json, what="erf", unit="model", delay=PATIENCE)
    found = {name: _erf_or_reason(options, name) for name in names}
    seen = {name: each for name, each in found.items() if isinstance(each, Found)}
    lost = {name: each for name, each in found.items() if not isinstance(each, Found)}
    roads = ["predicted"] + (["measured"] if options.samples > 0 else [])
    titles = ["model", "input", "theoretical", *(head for road in roads for head in (f"{road} std", "2σ size"))]
    rows = [_row(name, each) for name, each in seen.items()] + [
        [name, reason, *("" for _ in titles[2:])] for name, reason in lost.items()
    ]
    told = [each.told | {"erf": {road: figures_of(erf) for road, erf in each.erfs.items()}} for each in seen.values()]
    erfs = {f"{number}-{road}": erf for number, each in enumerate(seen.values(), 1) for road, erf in each.erfs.items()}
    facts = {"models": told} | ({"lost": lost} if lost else {})
    give(options, Found("Effective receptive fields", [], facts, erfs, compared=(titles, rows)))
    require(not lost, "MODEL", "each be one that can be looked at", listed(list(lost)))


def _row(name: str, found: Found) -> list[str]:
    figures = [figures_of(erf) for erf in found.erfs.values()]
    cells = [cell for of in figures for cell in (short(of["std"]), short(of["2-sigma size"]))]
    return [name, text(found.told["input_size"]), text(found.told["receptive_field"]["theoretical size"]), *cells]


def _erf_or_reason(options: argparse.Namespace, name: str) -> Found | str:
    """One of many: what ails it is no reason to lose the others."""
    try:
        return _erf(options, name)
    except EXPECTED as error:
        return in_a_line(error)


def _erf(options: argparse.Namespace, name: str) -> Found:
    import widerf
    from widerf.convolutions.branches import silent_branches

    subject = prepared(options, name)
    model, size = subject.model, subject.size
    silent = silent_branches(model)
    if silent:
        warnings.warn(
            f"{name}: silent branches at these weights: {listed(list(silent), 2)}; the ERF is that of what is left "
            "(timm: --set zero_init_last=False, or --set ls_init_value=1.0)", stacklevel=2,
        )  # fmt: skip
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
    lines = [subject.line, *(f"{name}: {text(value)}" for name, value in facts.items())]
    told = subject.told(receptive_field=facts, silent=list(silent))
    return Found(f"Effective receptive field: {name}", lines, told, erfs)


def summary(options: argparse.Namespace) -> None:
    """``widerf summary``: one row a layer."""
    import widerf

    subject = prepared(options, options.model)
    report = widerf.summary(
        subject.model, subject.size, layers=options.layers, measure=options.samples, progress=not options.json
    )
    figures: dict[str, Any] = {"ERF against depth": report.plot().figure} if options.out is not None else {}
    told = subject.told(report=report.to_dict())
    give(options, Found(f"Summary: {subject.name}", [subject.line], told, report=report, figures=figures))
    if options.out is not None:
        report.save(options.out / "summary.csv")


def doctor(options: argparse.Namespace) -> None:
    """``widerf doctor``: what is wrong, and what mends it."""
    import widerf

    subject = prepared(options, options.model)
    report = widerf.advise(
        subject.model, subject.size, object_size=options.object_size, layer=options.layer, progress=not options.json
    )
    told = subject.told(report=report.to_dict())
    give(options, Found(f"Doctor: {subject.name}", [subject.line], told, report=report))


def _before(options: argparse.Namespace, subject: Subject) -> ERF:
    import widerf
    from widerf.convolutions.selection import find_convolutions

    # Ahead of the prediction, which would only miss a spatial map.
    require(bool(find_convolutions(subject.model)), "MODEL", "hold at least one convolution", subject.name)
    return widerf.predict(subject.model, subject.size, layer=options.layer)


def init(options: argparse.Namespace) -> None:
    """``widerf init``: what the initialisation would do."""
    import widerf

    subject = prepared(options, options.model)
    before = _before(options, subject)
    report = widerf.init.apply(
        subject.model, options.strength, target=options.target, base=options.base, only=options.only,
        skip=options.skip, input_size=subject.size,
    )  # fmt: skip
    # The model is this process's own: nothing is written back, so for the user it is a dry run.
    report = dataclasses.replace(report, dry_run=True)
    _give_report(options, subject, before, report, "Widening initialisation (dry run)")


def convert(options: argparse.Namespace) -> None:
    """``widerf convert``: what the conversion would do, or with ``--save`` the converted model in a file."""
    import widerf
    from widerf.conversion.keeping import check_ending, write_state

    if options.save is not None:
        check_ending(options.save)
    subject = prepared(options, options.model)
    before = _before(options, subject)
    report = widerf.convert(
        subject.model, extent=options.extent, pattern=options.pattern, target=options.target,
        kurtosis=options.kurtosis, block=options.block, only=options.only, skip=options.skip,
        input_size=subject.size, seed=options.seed,
    )  # fmt: skip
    if options.save is None:
        report = dataclasses.replace(report, dry_run=True)
        _give_report(options, subject, before, report, "Conversion to sparse taps (dry run)")
        return
    write_state(subject.model, Path(options.save))
    _give_report(options, subject, before, report, "Conversion to sparse taps")
    print(f"widerf: wrote {options.save}", file=sys.stderr)


def _give_report(options: argparse.Namespace, subject: Subject, before: ERF, report: Report[Any], title: str) -> None:
    import widerf

    erfs = {"before": before, "after": widerf.predict(subject.model, subject.size, layer=options.layer)}
    told = subject.told(report=report.to_dict())
    give(options, Found(f"{title}: {subject.name}", [subject.line], told, erfs, report))
