"""The page of the pattern study: what each pattern gains over the best of three tuned grids, and loses at worst.

``python -m experiments.patterns.regret`` reads ``docs/results/evidence-*.jsonl``, rows of ``python -m experiments.gpu
evidence``, or the files that are named, and writes ``patterns-regret.md`` and ``patterns-regret.png`` to ``--out``. It
works with what is there, and says what is missing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.inputs import InputError, main_guard
from experiments.harness.ledger import RESULTS
from experiments.harness.runs import write_whole
from experiments.harness.statistics import Estimate
from experiments.patterns import settings
from experiments.patterns.confirmed import BEST, ENOUGH, ROLES, Confirmed, Regret, gather, kind_of, read, regrets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#808080"
NAME = "patterns-regret"
KINDS = {"all": "all settings", "dense": "3×3 layers", "depthwise": "depthwise layers"}


def _of_kind(found: Sequence[Confirmed], kind: str) -> list[Confirmed]:
    return [one for one in found if kind == "all" or one.depthwise == (kind == "depthwise")]


def _least(lost: dict[str, Regret], kind: str) -> str | None:
    """Return the arm of that kind that loses least at worst, of those in every setting."""
    there = [role for role, regret in lost.items() if kind_of(role) == kind and regret.everywhere]
    return min(there, key=lambda role: lost[role].worst.mean, default=None)


def _points(estimate: Estimate, sign: str = "+") -> str:
    if estimate.n < 2:
        return f"{estimate.mean:{sign}.2f}"
    return f"{estimate.mean:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"


def verdict(found: Sequence[Confirmed]) -> str:
    """Say in one paragraph which pattern loses least at worst, what the grids lose, and where it is clear of them."""
    confirmed = [one for one in found if one.enough]
    lost = regrets(confirmed)
    pattern, grid = _least(lost, "pattern"), _least(lost, "grid")
    if pattern is None or grid is None:
        return f"**Nothing is confirmed yet:** no setting has {ENOUGH} pairs." + _missing(found)
    signs = [one.comparisons[pattern].clear for one in confirmed]
    words = (
        f"**`{pattern}` loses least at worst among the patterns: {_points(lost[pattern].worst, '')} points; among the "
        f"grids {grid} does: {_points(lost[grid].worst, '')}; the best of three grids, chosen in each setting, "
        f"{_points(lost[BEST].worst, '')}.** Against the best of the three, `{pattern}` is clearly ahead in "
        f"{signs.count(1)} and clearly behind in {signs.count(-1)} of {len(signs)} settings."
    )
    for kind in ("dense", "depthwise"):
        some = _of_kind(confirmed, kind)
        if some and len(some) < len(confirmed):
            mine = regrets(some)
            best = _least(mine, "pattern")
            if best is not None:
                words += f" In {KINDS[kind]} alone `{best}` does: {_points(mine[best].worst, '')}."
    return words + _missing(found)


def _missing(found: Sequence[Confirmed]) -> str:
    seeds = {one.name: len(one.seeds) if one.comparisons else 0 for one in found}
    wanted = len(settings.CONFIRM)
    short = [f"{name} ({seeds.get(name, 0)} of {wanted})" for name in settings.SETTINGS if seeds.get(name, 0) < wanted]
    return f" Preliminary: pairs are missing in {', '.join(short)}." if short else ""


def differences(found: Sequence[Confirmed]) -> Iterator[str]:
    """Yield the table of settings and arms."""
    head = ("setting", "arm", "rate", "test score", "− best grid, points", "p (Holm)", "held out, − best grid", "n")
    yield f"| {' | '.join(head)} | ms a step (× best grid's) |"
    yield "|---" * 9 + "|"
    for one in found:
        for arm, scores in one.test.items():
            mean = sum(scores.values()) / len(scores)
            rates = " and ".join(f"{rate:g}" for rate in sorted(one.rates[arm]))
            comparison = one.comparisons.get(arm)
            cells = ["best grid" if arm == one.best_grid else "–", "", "", str(len(scores))]
            if comparison is not None:
                mark = "**" if comparison.clear else ""
                told = f"{mark}{_points(comparison.test)}{mark}"
                cells = [told, f"{comparison.p:.3f}", _points(comparison.held_out), str(comparison.test.n)]
            died = f", {one.diverged[arm]} diverged" if one.diverged[arm] else ""
            yield f"| {' | '.join([one.name, arm, rates, f'{mean:.2f}{died}', *cells, _cost(one, arm)])} |"


def _cost(one: Confirmed, arm: str) -> str:
    if arm not in one.seconds:
        return ""
    own = 1000 * one.seconds[arm]
    base = one.seconds.get(one.best_grid or "")
    return f"{own:.2f}" if base is None else f"{own:.2f} ({one.seconds[arm] / base:.2f} ×)"


def regret_table(found: Sequence[Confirmed]) -> Iterator[str]:
    """Yield regrets by setting, and at worst, over all settings and by kind of layer."""
    scopes = {kind: regrets(_of_kind(found, kind)) for kind in KINDS}
    names = [one.name for one in found if one.enough]
    yield f"| arm | {' | '.join(names)} | worst of all (95 %) | least, share | 3×3 layers | depthwise layers |"
    yield "|---" * (len(names) + 5) + "|"
    order = ["dense", *ROLES, BEST]
    everything = scopes["all"]
    for role in [*order, *(role for role in everything if role not in order)]:
        if role not in everything:
            continue
        lost = everything[role]
        cells = [f"{lost.by[name]:.2f}" if name in lost.by else "–" for name in names]
        shared = lost.everywhere and kind_of(role) in ("grid", "pattern")
        cells += [_points(lost.worst, "") if lost.everywhere else "–", f"{lost.least:.0%}" if shared else "–"]
        cells += [_points(scopes[k][role].worst, "") if role in scopes[k] else "–" for k in ("dense", "depthwise")]
        yield f"| {role} | {' | '.join(cells)} |"


def tuning_table(found: Sequence[Confirmed]) -> Iterator[str]:
    """Yield the mean held-out score of every arm at every rate, in the runs that choose the rate."""
    rates = sorted({rate for one in found for _, rate in one.tuning})
    yield f"| setting | arm | {' | '.join(f'{rate:g}' for rate in rates)} | best rate's, − best grid's |"
    yield "|---" * (len(rates) + 3) + "|"
    for one in found:
        base = max((one.tuned[grid] for grid in one.grids if grid in one.tuned), default=None)
        for arm in dict.fromkeys(arm for arm, _ in one.tuning):
            scores = [list(one.tuning.get((arm, rate), {}).values()) for rate in rates]
            cells = [f"{sum(each) / len(each):.2f} (n {len(each)})" if each else "" for each in scores]
            cells.append("" if base is None or arm not in one.tuned else f"{one.tuned[arm] - base:+.2f}")
            yield f"| {one.name} | {arm} | {' | '.join(cells)} |"


def _made(found: Sequence[Confirmed]) -> Iterator[str]:
    for one in found:
        devices = ", ".join(f"{device} ({n} seeds)" for device, n in Counter(one.devices.values()).items())
        changed = "" if one.protocol == settings.HASH else " (the file of settings has changed since)"
        aside = f"; {one.aside} rows of other protocols are not counted" if one.aside else ""
        clock = f"; steps timed on {one.clock}" if one.clock else "; steps not timed"
        yield f"- {one.name}: {devices or 'rates only'}; protocol {one.protocol}{changed}{aside}{clock}."


METHOD = f"""## How it was made

`python -m experiments.gpu evidence` trained, `python -m experiments.patterns.regret` wrote this page. Settings and
arms: `experiments/patterns/settings.py`, fixed before the runs. Arms of a setting have the same weights and
multiplications; those of a seed share initial weights and batches, and the patterns have, layer by layer, the second
moment of the growing grid. Each arm's rate was chosen by held-out images on seeds below 100; the figures are of seeds
from 100 on, {len(settings.CONFIRM)} where all are done. Scores: mIoU of the 101 `val` frames, or accuracy on CIFAR-10's
test images, in percent, looked at once, after training.

- **The best grid** of a setting is the one of its three with the best mean score on *held-out* images over the
  confirmed seeds, so that test scores choose nothing. It is chosen among the very runs that it is judged by, which
  favours it: a handicap for all other arms.
- Differences: means over pairs with 95 % t-intervals; p by sign flips, after Holm over the arms of the setting. Bold:
  the interval is clear of zero and p is below .05. The picture leaves dense out, which is far off.
- **Regret**: mean test score of the setting's best arm, whichever it is, − this arm's, in points. At worst: the largest
  over settings, with the 95 % percentile interval over 2,000 resamplings of the seeds; the largest of noisy figures is
  too large on average. Settings with fewer than {ENOUGH} pairs are left out: no p could be below .05 there. Least,
  share: in how many of the resamplings no other pattern (for a grid: no other grid) has a smaller worst regret. Arms
  that are not in every setting have no worst regret of all.
- A run whose loss became no number keeps its test score, and counts as 0 on held-out images.
"""


TUNING = """\
Mean held-out score after training, in percent, of the runs that choose the rates (three seeds where all are done). Last
column: over the seeds that all arms have at all rates, each arm at its best rate − the best of the grids at its best.
These scores chose the rates, and few seeds stand behind them: leads, with no interval."""


def page(found: Sequence[Confirmed]) -> str:
    """Return the page."""
    confirmed = [one for one in found if one.test]
    lines = ["# Patterns against three tuned grids: what each loses at worst", "", verdict(found), ""]
    if any(one.enough for one in found):
        lines += [f"![Difference of every arm to the best grid, setting by setting]({NAME}.png)", ""]
    if confirmed:
        lines += ["## Differences to the best grid", "", *differences(confirmed), ""]
    if any(one.enough for one in found):
        lines += ["## Regret", "", *regret_table(found), ""]
    lines += ["## Learning rates", "", TUNING, "", *tuning_table(found), ""]
    return "\n".join([*lines, METHOD, *_made(found)]) + "\n"


def draw(found: Sequence[Confirmed]) -> Figure:
    """Draw the differences of all arms but dense to the best grid, a panel a setting with enough pairs."""
    from matplotlib.figure import Figure

    shown = [one for one in found if one.enough]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(9.6, 0.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for panel, one in zip(panels, shown, strict=False):
        arms = [arm for arm in reversed(one.comparisons) if arm != "dense"]
        for place, arm in enumerate(arms):
            comparison, gap = one.comparisons[arm], one.comparisons[arm].test
            colour = {1: "#2a8f5a", 0: INK, -1: "#c0504d"}[comparison.clear]
            if gap.n > 1:
                panel.plot([gap.low, gap.high], [place, place], color=colour)
            panel.plot(gap.mean, place, "o", color=colour, markerfacecolor=colour if comparison.clear else "none")
        panel.axvline(0, color=INK, linewidth=1)
        panel.set_yticks(range(len(arms)), arms, fontsize="x-small")
        panel.tick_params(colors=INK)
        panel.set_title(f"{one.name}, − {one.best_grid}, n {len(one.seeds)}", fontsize="small", color=INK)
        panel.set_xlabel("points", color=INK)
        panel.grid(alpha=0.25, color=INK)
        for spine in panel.spines.values():
            spine.set_color(INK)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Read the rows and write the page and its picture."""
    line = argparse.ArgumentParser("experiments.patterns.regret", description=__doc__.split("\n")[0])
    line.add_argument("rows", type=Path, nargs="*", help="files of rows; default: docs/results/evidence-*.jsonl")
    line.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    options = line.parse_args(arguments)
    small = RESULTS.glob("evidence-small-*.jsonl")
    paths = options.rows or sorted({*RESULTS.glob("evidence-*.jsonl")} - {*small})
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(f"rows must name files, got {missing[0]}")
    found = list(gather(read(paths)).values())
    if not found:
        raise InputError(f"rows must hold runs of the pattern study, got none in {len(paths)} files")
    if any(one.enough for one in found):
        options.out.mkdir(parents=True, exist_ok=True)
        draw(found).savefig(options.out / f"{NAME}.png", dpi=90, transparent=True, metadata={"Software": None})
    write_whole(options.out / f"{NAME}.md", page(found))
    print(f"page: {options.out / NAME}.md")


if __name__ == "__main__":
    main_guard(main)
