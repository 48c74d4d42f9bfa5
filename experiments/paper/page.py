"""The page of the paper's claims, from the rows of ``paper.jsonl`` and ``paper-trained.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.harness.runs import Record
from experiments.paper.common import MATCH, Part, table, verdict

PAPER = {"cifar10": "accuracy .89; TRF 74", "camvid": "ERF diameter 100 → 150; TRF 505"}
VERDICTS = ("holds", "differs", "cannot tell")
HEADER = f"""# The paper's claims, re-run

Luo et al., NIPS 2016 (arXiv 1701.04128), claim by claim, on `widerf.measure` and `widerf.predict`: `make
paper`, or one section alone by its own command. Rows are in [paper.jsonl](paper.jsonl). All draws follow from
fixed seeds: the same seeds give the same page.

- *Ours*: the figure with its 95 % interval by the jackknife over draws; of ratios and slopes on the log scale.
  "Exact": nothing is drawn.
- *Verdict*, by one rule: each row has a range that the paper's words or number accept. It *holds* where the
  whole interval lies inside, *differs* where it lies outside, and *cannot tell* where it straddles an end. A
  number is met within {MATCH:.0%} of itself unless the section says otherwise; the paper gives no intervals of
  its own.
- A mean of energies lets draws with large gradients count for more, and these differ by orders of magnitude in
  deep networks: few draws carry the mean, which the intervals show."""
AMBIGUOUS = """## What the paper leaves open

- **Which map.** § 2.2 derives Var g, eq. 11 speaks of a standard deviation "of the ERF", and Fig. 1–2 show and
  count the averaged gradient without saying whether it is E|g|, the root of E g², or E g² itself (the mean of g
  is 0, eq. 7). Where g is Gaussian over the draws, E|g| and √E g² have the same shape, and that of a Gaussian map
  is √2 wider than E g². Figure 2 is given on both maps: sizes differ, and so do slopes over depths
  that begin at 5, where the field's own border still shapes the map.
- **Which depths** Fig. 2 has: its two slopes add up to that of the TRF, which the depths alone fix; see the
  identity above.
- **The level.** "1 − 95.45 % of the centre point" is a level of the map, at 2.49 standard deviations of the map
  it is taken on, not at 2.
- **How many channels** the networks have: the analysis is for one, and says that more are like it. With few, 20
  draws hardly tell a map.
- **Which three layers** are replaced by strides or dilation.
- **E[σ'²] = 1/4.** For a ReLU with symmetric input σ' is 0 or 1 with equal chance: its variance is 1/4, but the
  mean of its square, which eq. 12 needs, is ½ (measured above). A constant factor only: no shape depends on it.
- **A TRF of 74** cannot come from odd kernels at stride 1. A TRF of 505 can, by the layouts counted above; the
  paper does not say which it has.
- **What "diameter" and "ERF after training" are read on** in Fig. 3: no level, no number of images, no mode of
  the batch norm.
- **Initialisation (§ 4)**, "30 % in a few cases", names neither seeds nor networks nor what time is taken of.
  It is not part of this page: see [far-pair](study-far-pair.md), where strength 1, "too aggressive" by the paper,
  is trained beside the others, [plain-20](study-plain20.md) and [CIFAR-10](cifar10.md)."""


def counts(parts: Sequence[Part], rows: Mapping[str, Record]) -> str:
    """How many rows of each section have each verdict; rows that claim nothing are not counted."""
    lines = ["| section | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * len(VERDICTS)]
    for part in parts:
        said = [verdict(line) for line in rows[part.name]["rows"]]
        lines.append(f"| {part.title} | " + " | ".join(str(said.count(word)) for word in VERDICTS) + " |")
    return "\n".join(lines) + "\n"


def section(part: Part, lines: Sequence[Record]) -> str:
    """One claim: its figure, what was done, its table."""
    figure = f"![{part.title}: the maps or curves](paper-{part.name}.png)\n\n" if part.draws else ""
    return f"## {part.title}\n\n{figure}{part.note}\n\n`python -m experiments.paper.{part.name}`\n\n{table(lines)}\n"


def trained_section(rows: Sequence[Record]) -> str:
    """Figure 3: the finished trainings, or that there are none."""
    text = ["## Figure 3: before and after training", ""]
    text += [
        "`python -m experiments.paper.trained cifar10 --data-dir DIR`, `… camvid --data-dir DIR --batch 4`: resumable.",
        "",
    ]
    if not rows:
        text += [
            "**Not trained yet**: hours on a CPU; the script has only been tried on a few images for a few steps. What",
            "the paper says of training (the ERF grows; 89 % on CIFAR-10; a diameter of 100, then 150, on CamVid) is",
            "neither confirmed nor denied here.",
        ]
        return "\n".join(text) + "\n"
    text += [
        "| task | paper | seed | epochs | TRF | ERF std before → after | size before → after | score |",
        "|" + "---|" * 8,
    ]
    for line in rows:
        before, after = line["before"], line["after"]
        cells = [line["task"], PAPER[line["task"]], line["seed"], line["epochs"], before["trf"][0]]
        cells += [f"{before[name]:.3g} → {after[name]:.3g}" for name in ("std", "size")] + [f"{line['test_score']:.3f}"]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def page(parts: Sequence[Part], rows: Mapping[str, Record], trained: Sequence[Record]) -> str:
    """Return the whole page."""
    made = [part for part in parts if part.name in rows]
    sections = [section(part, rows[part.name]["rows"]) for part in made]
    blocks = [HEADER, counts(made, rows), *sections, trained_section(trained), AMBIGUOUS]
    return "\n\n".join(block.strip() for block in blocks) + "\n"
