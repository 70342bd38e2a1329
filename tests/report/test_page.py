"""The page holds what the result says, and text of strangers stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_attr import AttributionResult, ScoreMatrix
from lightning_attr.report import TextRenderer, page

HOSTILE = "</script><script>alert(1)</script>"


def result(n: int = 6, m: int = 3, **known: Any) -> AttributionResult:
    generator = torch.Generator().manual_seed(0)
    scores = ScoreMatrix(torch.randn(n, m, generator=generator), provenance={"method": "TRAK", "snapshots": ["a", "b"]})
    return AttributionResult(scores, torch.rand(n, generator=generator), torch.rand(n, generator=generator), **known)


def data(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    assert found
    read: dict[str, Any] = json.loads(found[1])
    return read


def test_the_page_holds_the_result(tmp_path: Path) -> None:
    known = {"labels": torch.tensor([0, 1, 0, 1, 0, 1]), "noise_mask": torch.tensor([True] + [False] * 5)}
    own = result(**known, trained_on=torch.tensor([True] * 5 + [False]))
    train = [(f"text {i}", i % 2) for i in range(6)]
    targets = [{"text": f"target {j}", "label": 1} for j in range(3)]
    outputs, classes = [0.5, 1.5, 2.5], ["a", "b"]
    path = own.report(tmp_path / "report.html", train, targets, k=2, outputs=outputs, classes=classes)
    read = data(path)
    assert read["train"]["index"] == [0, 1, 2, 3, 4, 5]
    assert read["train"]["selfInfluence"] == pytest.approx(own.self_influence.tolist(), rel=1e-4)
    assert read["train"]["label"] == [0, 1, 0, 1, 0, 1]
    assert read["classes"] == {"0": "a", "1": "b"}
    assert read["train"]["noise"][0]
    assert not any(read["train"]["noise"][1:])
    assert read["train"]["trainedOn"][5] is False
    assert "text 4" in read["samples"]["4"]
    for j, target in enumerate(read["targets"]):
        assert (target["label"], target["output"]) == (1, f"{j + 0.5:.4g}")
        assert f"target {j}" in target["sample"]
        column = own.scores.values[:, j]
        expected = [i for i in column.argsort(descending=True).tolist() if column[i] > 0][:2]
        assert [index for index, _ in target["proponents"]] == expected
        worst = [i for i in column.argsort().tolist() if column[i] < 0][:2]
        assert [index for index, _ in target["opponents"]] == worst


def test_figures_are_said_in_words(tmp_path: Path) -> None:
    plain, noisy = result(), result(noise_mask=torch.tensor([True] + [False] * 5))
    for own in (plain, noisy):
        text = own.report(tmp_path / "report.html").read_text("utf-8")
        said = re.findall(r"<div><dt>([^<]*)</dt><dd>[\d.]+</dd></div>", text.split('"summary measured"')[1])
        assert len(said) == len(set(said)) == len(own.metrics)
        assert f"<dd>{own.metrics['share_helpful']:.4g}</dd>" in text
        assert "_" not in re.sub("<script.*?</script>|<style.*?</style>", "", text, flags=re.DOTALL)
        assert ("wrong on purpose" in text) == (own is noisy)


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    path = result().report(
        tmp_path / "report.html",
        [HOSTILE] * 6,
        [(HOSTILE, HOSTILE)] * 3,
        outputs=[HOSTILE] * 3,
        title=HOSTILE,
        classes=[HOSTILE],
    )
    text = path.read_text("utf-8")
    assert text.count("<script") == 2
    assert "<script>alert" not in text
    assert data(path)["targets"][0]["label"] == HOSTILE


def test_a_renderer_of_ones_own_is_escaped_unless_it_gives_markup(tmp_path: Path) -> None:
    read = data(result().report(tmp_path / "report.html", range(6), renderer=lambda sample: f"<b>{sample}</b>"))
    assert read["samples"]["3"] == "&lt;b&gt;3&lt;/b&gt;"
    read = data(result().report(tmp_path / "report.html", range(6), renderer=TextRenderer()))
    assert read["samples"]["3"] == '<span class="text">3</span>'


def test_a_page_has_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BUDGET", 100)
    own = result()
    path = own.report(tmp_path / "report.html", ["x" * 90] * 6)
    read = data(path)
    assert list(read["samples"]) == [str(int(own.self_influence.argmax()))]
    assert "5 samples are without a picture" in path.read_text("utf-8")


def test_scores_that_are_not_finite_are_no_numbers(tmp_path: Path) -> None:
    own = AttributionResult(ScoreMatrix(torch.ones(2, 1)), torch.tensor([0.5, 1.0]), torch.tensor([float("inf"), 1.0]))
    assert data(own.report(tmp_path / "report.html"))["train"]["loss"] == [None, 1.0]


def test_only_the_strongest_scores_are_enough(tmp_path: Path) -> None:
    from lightning_attr.results.top_scores import TopScoresSum

    found = TopScoresSum(n_train=6, n_target=3, k=2)
    found.add(range(6), slice(0, 3), result().scores.values)
    own = AttributionResult(found.total(), torch.rand(6), torch.rand(6))
    read = data(own.report(tmp_path / "report.html", k=2))
    assert read["targets"] == data(result().report(tmp_path / "whole.html", k=2))["targets"]


def missing(index: int) -> Any:
    raise FileNotFoundError(f"{index}.png")


class Missing:
    def __getitem__(self, index: int) -> Any:
        return missing(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "`k` of AttributionResult.report"),
        ({"path": 3}, "`path` of AttributionResult.report"),
        ({"renderer": "image"}, "`renderer` of AttributionResult.report to be a function from a sample to HTML"),
        ({"train": 3}, "`train` of AttributionResult.report to be a data set or sequence"),
        ({"outputs": [1.0]}, "`outputs` of AttributionResult.report to be one value for each of the 3 targets"),
        ({"classes": "ab"}, "`classes` of AttributionResult.report"),
        ({"train": Missing()}, r"Item \d of Missing could not be read: FileNotFoundError: \d.png"),
        (
            {"train": [1, 2]},
            r"`train` .* the data set that was attributed, which has an item 5, but got \[1, 2\]\. It has 2 items",
        ),
        (
            {"train": [torch.zeros(1, 2, 3, 4)] * 6, "renderer": lambda sample: 1 / 0},
            "Sample . of list could not be drawn",
        ),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        result().report(**{"path": tmp_path / "report.html", **arguments})
    assert not list(tmp_path.iterdir())


def test_print_gives_ten_readable_lines() -> None:
    own = result(
        labels=torch.tensor([0, 1, 0, 1, 0, 1]),
        noise_mask=torch.tensor([True] + [False] * 5),
        trained_on=torch.tensor([True] * 5 + [False]),
    )
    lines = repr(own).splitlines()
    assert lines[0] == "AttributionResult by TRAK: 6 training samples x 3 targets, 2 snapshots"
    assert len(lines) <= 10
    assert all(len(line) <= 120 for line in lines)
    top = int(own.self_influence.argmax())
    assert f"suspicious   #{top} ({own.self_influence[top]:+.3g})" in repr(own)
    assert "tensor(" not in repr(own)
    assert "<td>2 classes</td>" in own._repr_html_()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456789, "0.1235"),
        (["a", "b"], "a, b"),
        ([1, 2, 3, 4, 5], "5: 1, …, 5"),
        ({"kind": "eigen", "sizes": [2, 3]}, "kind: eigen, sizes: (2, 3)"),
        (
            {f"epoch={i}": {"kernel": "ggn", "rank": 1 / 3} for i in range(7)},
            "7: epoch=0: (kernel: ggn, rank: 0.3333), …, epoch=6: (kernel: ggn, rank: 0.3333)",
        ),
    ],
)
def test_facts_take_one_line(value: object, text: str) -> None:
    assert page._fact(value) == text
