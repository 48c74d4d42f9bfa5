"""Verdicts: programs read the code, people the sentence."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import widerf
from widerf.init import verdict as verdicts
from widerf.report import Verdict

ALL = [value for value in vars(verdicts).values() if isinstance(value, Verdict)]


@pytest.mark.parametrize("verdict", [*ALL, Verdict("widened", "widened").noting("undone", "undone in part")])
def test_a_verdict_survives_copies_and_pickles(verdict: Verdict) -> None:
    for twin in (copy.deepcopy(verdict), pickle.loads(pickle.dumps(verdict))):
        assert twin == verdict and twin.code == verdict.code and twin.notes == verdict.notes


def test_every_row_of_a_report_bears_a_code() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3),
    )  # fmt: skip
    net[2].weight.data.zero_()
    net[3].weight.data.fill_(float("nan"))
    net[4].requires_grad_(False)
    net[5].weight = net[0 + 7].weight
    nn.init.dirac_(net[7].weight)
    report = widerf.init.apply(net, 0.5, skip="0")
    codes = ["not_selected", "no_periphery", "zero", "not_finite", "frozen", "empty_periphery", "widened", "tied"]
    assert [row.verdict.code for row in report] == codes
    assert [row.widened for row in report] == [code == "widened" for code in codes]
    assert widerf.init.apply(net, 0.5, only="6")[6].widened  # by the earlier call


def test_nothing_branches_on_the_words_of_a_verdict() -> None:
    """Whatever asks for a verdict's words would break when the words are bettered."""
    asks = re.compile(r"verdict[^\n]*\.(startswith|endswith|split|find)\(|[\"'] in \w+\.verdict\\b")
    root = Path(widerf.__file__).parents[1]
    files = [*root.glob("widerf/**/*.py"), *root.glob("experiments/**/*.py")]
    assert [str(path) for path in files if asks.search(path.read_text(encoding="utf-8"))] == []
