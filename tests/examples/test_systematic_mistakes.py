"""The mistakes of the demo are planted as it says, and what it prints is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import systematic_mistakes as demo
import torch


def test_two_mistakes_are_planted_and_the_test_set_is_right() -> None:
    data = demo.Digits(seed=1)
    assert torch.equal(data.planted, data.y != data.right)
    assert (data.y[data.by_scanner] == 3).all()
    assert set(data.y[data.planted & ~data.by_scanner].tolist()) == {9}
    assert set(data.right[data.planted & ~data.by_scanner].tolist()) == {4}
    assert int(data.by_scanner.sum()) == demo.MARKED
    assert int(data.test_marked.sum()) == 100
    assert not (data.test_y[data.test_marked] == 3).any()
    assert torch.equal(data.x[-demo.LEAKED :], data.test_x[data.leaked])
    assert torch.equal(data.y[-demo.LEAKED :], data.test_y[data.leaked])
    assert not data.test_marked[data.leaked].any()
    dots = (data.x[:, 0, 0].unfold(1, 3, 1) == torch.tensor([0.7, 0.0, 0.7])).all(-1).any(-1)
    assert dots[data.by_scanner].all()


def test_votes_count_how_often_a_sample_is_among_the_first() -> None:
    scores = torch.zeros(30, 4)
    scores[3] = 1
    scores[:5, 0] = 2
    found = demo.votes(scores)
    assert int(found.argmax()) == 3
    assert round(float(found[3])) == 4


@pytest.mark.slow
def test_attribution_finds_more_than_what_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(demo, "RETRAININGS", 1)
    demo.demo(seed=1, folder=tmp_path)
    printed = capsys.readouterr().out
    rows = {name: [float(n) for n in figures.split()] for name, figures in _rows(printed)}
    corrected = {name: figures for name, figures in rows.items() if len(figures) == 3 and not name.startswith("(")}
    share, marked, _ = corrected.pop("attribution, mean over the errors")
    assert len(corrected) == 5
    assert all(share > other[0] and marked < other[1] for other in corrected.values())
    assert marked < rows["(nothing)"][1] / 2
    copies = printed.split("leaked into the training set")[1].split("Each wrong")[0]
    found = {name: [float(n) for n in figures.split()] for name, figures in _rows(copies)}
    assert found["nearest in pixels"] == [1, 1]  # a baseline that serves better, and the demo shows it
    assert found["attribution"][1] > 0.5
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "proponents.png").exists()


def _rows(printed: str) -> list[tuple[str, str]]:
    pattern = re.compile(r"^  (\S.*?) {2,}([\d. ]+)$", re.MULTILINE)
    return pattern.findall(printed)
