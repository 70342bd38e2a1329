"""The result of a run: data value, selection, metrics against numpy and scikit-learn, files, figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_attr import AttributionResult, ScoreMatrix
from lightning_attr.errors import CorruptedStoreError, MissingDependencyError
from lightning_attr.metrics import data_selection_curve, figures
from lightning_attr.results import score_matrix as scores_module

N, M = 40, 6
PLAIN = {"share_helpful", "share_harmful", "effective_proponents", "self_influence_overlap@10%"}
NOISE = {"noisy_label_auroc", "noisy_label_recall@10%", "selection_noise_share@10%"}


def made(**changes: Any) -> AttributionResult:
    generator = torch.Generator().manual_seed(5)
    arguments: dict[str, Any] = {
        "scores": ScoreMatrix(torch.randn(N, M, generator=generator), provenance={"method": "TRAK"}),
        "self_influence": torch.rand(N, generator=generator),
        "loss": torch.rand(N, generator=generator),
        "labels": torch.arange(N) % 3,
        "noise_mask": torch.rand(N, generator=generator) < 0.3,
        "exposure": torch.arange(N) % 5,
    }
    return AttributionResult(**{**arguments, **changes})


# Data value and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**24, 7 * M, 1])
def test_data_value_is_the_mean_score_over_the_targets(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "_BLOCK_ELEMENTS", block)
    result = made()
    np.testing.assert_allclose(result.data_value, result.scores.values.numpy().mean(1), rtol=1e-6, atol=1e-7)
    assert result.data_value.shape == (N,)


def test_metrics_without_a_mask_are_the_plain_ones() -> None:
    result = made(noise_mask=None)
    assert result.metrics.keys() == PLAIN
    values = result.scores.values.double().numpy()
    mean, positive = values.mean(1), values.clip(min=0)
    assert result.metrics["share_helpful"] == (mean > 0).mean()
    assert result.metrics["share_harmful"] == (mean < 0).mean()
    effective = (positive.sum(0) ** 2 / (positive**2).sum(0)).mean()
    assert result.metrics["effective_proponents"] == pytest.approx(effective)
    suspicious = set(np.argsort(-result.self_influence.numpy())[:4])
    worst = set(np.argsort(mean)[:4])
    assert result.metrics["self_influence_overlap@10%"] == pytest.approx(len(suspicious & worst) / 4)


def test_metrics_with_a_mask_stand_beside_those_of_plain_loss() -> None:
    result = made()
    assert result.metrics.keys() == PLAIN | NOISE | {f"loss_{name}" for name in NOISE}
    noisy = result.noise_mask.numpy()
    mean = result.scores.values.double().numpy().mean(1)
    for prefix, suspicion, worth in (
        ("", result.self_influence.numpy(), mean),
        ("loss_", result.loss.numpy(), -result.loss.numpy()),
    ):
        assert result.metrics[f"{prefix}noisy_label_auroc"] == pytest.approx(roc_auc_score(noisy, suspicion))
        inspected = np.argsort(-suspicion)[:4]
        assert result.metrics[f"{prefix}noisy_label_recall@10%"] == pytest.approx(noisy[inspected].sum() / noisy.sum())
        dropped = np.argsort(worth)[:4]
        assert result.metrics[f"{prefix}selection_noise_share@10%"] == pytest.approx(noisy[dropped].mean())
    assert all(type(figure) is float and math.isfinite(figure) for figure in result.metrics.values())


def test_metrics_of_a_perfect_detector() -> None:
    noisy = torch.zeros(N, dtype=torch.bool)
    noisy[[3, 8, 20, 31]] = True
    scores = torch.where(noisy, -1.0, 1.0)[:, None].expand(-1, M).contiguous()
    metrics = made(
        scores=ScoreMatrix(scores), self_influence=noisy.float(), loss=(~noisy).float(), noise_mask=noisy
    ).metrics
    assert {name: metrics[name] for name in NOISE} == dict.fromkeys(NOISE, 1.0)
    assert {name: metrics[f"loss_{name}"] for name in NOISE} == dict.fromkeys(NOISE, 0.0)
    assert metrics["self_influence_overlap@10%"] == 1.0
    assert (metrics["share_helpful"], metrics["share_harmful"]) == (0.9, 0.1)
    assert metrics["effective_proponents"] == 36


@pytest.mark.parametrize("value", [True, False])
def test_a_mask_without_both_kinds_gives_the_plain_metrics(value: bool) -> None:
    assert made(noise_mask=torch.full((N,), value)).metrics.keys() == PLAIN


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="`scores` to be finite"):
        made(scores=ScoreMatrix(torch.full((N, M), float("nan"))))


# Selection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("by", ["data_value", "self_influence"])
def test_select_keeps_the_best(fraction: float, by: str) -> None:
    result = made()
    worth = result.data_value if by == "data_value" else -result.self_influence
    kept = result.select(fraction, by=by)
    assert len(kept) == max(1, round(fraction * N))
    assert sorted(kept.tolist()) == kept.tolist() == sorted(np.argsort(-worth.numpy())[: len(kept)].tolist())
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("by", ["data_value", "self_influence"])
def test_select_per_class_keeps_the_shares_of_the_classes(by: str) -> None:
    result = made(labels=torch.tensor([0] * 20 + [7] * 15 + [3] * 5))
    worth = (result.data_value if by == "data_value" else -result.self_influence).numpy()
    kept = result.select(0.6, by=by, per_class=True).tolist()
    expected = []
    for label, count in ((0, 12), (7, 9), (3, 3)):
        members = np.flatnonzero(result.labels.numpy() == label)
        expected += members[np.argsort(-worth[members])[:count]].tolist()
    assert kept == sorted(expected)


def test_select_per_class_keeps_something_of_every_class() -> None:
    result = made(labels=torch.tensor([0] * (N - 1) + [1]))
    assert result.select(0.05, per_class=True)[-1] == N - 1


def test_select_gives_indices_into_the_data_set() -> None:
    train_indices = torch.arange(N) * 10
    result = made(scores=ScoreMatrix(made().scores.values, train_indices))
    assert torch.equal(result.select(0.3), made().select(0.3) * 10)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_select_refuses_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"`fraction` of .*select to be a number in \(0, 1\], but got {fraction}"):
        made().select(fraction)


def test_select_refuses_unknown_orders_and_missing_labels() -> None:
    with pytest.raises(ValueError, match=r"`by` of .*select to be 'data_value' or 'self_influence', but got 'loss'"):
        made().select(0.5, by="loss")
    with pytest.raises(ValueError, match="Expected class labels for `per_class=True`"):
        made(labels=None).select(0.5, per_class=True)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [[], ["labels"], ["noise_mask"], ["labels", "noise_mask", "exposure"]])
def test_save_and_load_keep_every_bit(tmp_path: Path, absent: list[str]) -> None:
    result = made(**dict.fromkeys(absent))
    result.save(tmp_path / "result")
    found = AttributionResult.load(str(tmp_path / "result"))
    for name in ("self_influence", "loss", "labels", "noise_mask", "exposure", "data_value"):
        expected = getattr(result, name)
        assert (expected is None) == (name in absent)
        assert getattr(found, name) is None if expected is None else torch.equal(getattr(found, name), expected)
    assert torch.equal(found.scores.values, result.scores.values)
    assert found.scores.provenance == {"method": "TRAK"}
    assert found.metrics == result.metrics == json.loads((tmp_path / "result" / "metrics.json").read_text())


def test_load_names_what_is_damaged(tmp_path: Path) -> None:
    made().save(tmp_path)
    (tmp_path / "result.safetensors").write_bytes(b"")
    with pytest.raises(CorruptedStoreError, match=r"result\.safetensors is truncated or damaged"):
        AttributionResult.load(tmp_path)


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plot_scores", "plot_self_influence", "plot_detection"])
def test_figures_are_drawn_on_new_or_on_given_axes(name: str) -> None:
    figure, axes = getattr(made(), name)()
    assert axes in figure.axes
    own = figures.new_figure()
    given = own.subplots()
    assert getattr(made(), name)(ax=given) == (own, given)


def test_the_detection_curve_compares_with_loss() -> None:
    _, axes = made().plot_detection()
    assert {"self-influence", "training loss"} <= set(axes.get_legend_handles_labels()[1])


def test_the_detection_curve_needs_a_mask() -> None:
    with pytest.raises(ValueError, match=r"Expected a noise mask for the detection curve.*pass `noise_mask`"):
        made(noise_mask=None).plot_detection()


def test_self_influence_without_a_mask() -> None:
    figure, axes = made(noise_mask=None).plot_self_influence()
    assert axes in figure.axes


class Images:
    """Counts what is looked at; image i of the training data is not image i of the targets."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        self.seen.append(index)
        return torch.full((3, 4, 4), index / 1000)


@pytest.mark.parametrize("labels", [True, False])
def test_proponents_and_opponents_are_those_of_the_scores(labels: bool) -> None:
    train_indices, target_indices = torch.randperm(500)[:N], torch.randperm(500)[:M]
    scores = ScoreMatrix(made().scores.values, train_indices, target_indices)
    result = made(scores=scores, labels=torch.arange(N) if labels else None)
    train, targets = Images(), Images()
    figure, axes = result.plot_proponents(train, targets, targets=[4, 1], k=3)
    assert targets.seen == [int(target_indices[4]), int(target_indices[1])]
    up, down = scores.topk(3)[0], scores.bottomk(3)[0]
    assert train.seen == [*up[4].tolist(), *down[4].tolist()[::-1], *up[1].tolist(), *down[1].tolist()[::-1]]
    assert np.asarray(axes).shape[0] == 2
    titles = " ".join(f"{ax.get_title()}{ax.get_xlabel()}" for ax in figure.axes)
    best = int(up[4, 0])
    row = int((train_indices == best).nonzero())
    assert (f"#{best}: “{row}”" if labels else f"#{best}\n") in titles


def test_proponents_in_a_column_of_a_paper() -> None:
    images = Images()
    figure, axes = made().plot_proponents(images, images, targets=[0], k=2, width=3.3)
    assert figure.get_size_inches()[0] == pytest.approx(3.3)
    assert 5 <= axes[0, 1].xaxis.label.get_size() < 8
    wide, axes = made().plot_proponents(images, images, targets=[0], k=2)
    assert wide.get_size_inches()[0] == pytest.approx(5.25)
    assert axes[0, 1].xaxis.label.get_size() == 8


SELECTION = data_selection_curve(torch.tensor([0.5, 1.0]), torch.tensor([[0.7, 0.9]]), torch.tensor([[0.5, 0.9]]))
COSTS = {"TRAK": (20.0, 0.4, 0.37, 0.43)}


@pytest.mark.parametrize(
    ("kind", "arguments", "xlabel", "ylabel"),
    [
        ("scores", (), "target", "training sample"),
        ("self_influence", (), "self-influence", "share of each group"),
        ("detection", (), "training samples inspected", "mislabelled samples found"),
        ("precision", (), "training samples inspected", "mislabelled among inspected"),
        ("selection", (SELECTION,), "training samples kept", "validation metric"),
        ("cost", (COSTS,), "cost in seconds", "LDS"),
    ],
)
def test_figures_by_name(kind: str, arguments: tuple[Any, ...], xlabel: str, ylabel: str) -> None:
    own = figures.new_figure()
    given = own.subplots()
    assert made().plot(kind, *arguments, ax=given) == (own, given)
    assert (given.get_xlabel(), given.get_ylabel()) == (xlabel, ylabel)


def test_proponents_by_name() -> None:
    images = Images()
    _, axes = made().plot("proponents", images, images, targets=[0, 1], k=1)
    assert axes.shape == (2, 3)


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`kind` of .*plot to be 'scores', .* or 'cost', but got 'heatmap'"):
        made().plot("heatmap")
    with pytest.raises(ValueError, match=r"noise mask for the precision curve.*pass `noise_mask`"):
        made(noise_mask=None).plot("precision")


def test_texts_are_those_of_the_scores() -> None:
    train_indices, target_indices = torch.randperm(500)[:N], torch.randperm(500)[:M]
    scores = ScoreMatrix(made().scores.values, train_indices, target_indices)
    train, targets = [f"text {i}" for i in range(500)], [f"aim {i}" for i in range(500)]
    table = made(scores=scores, labels=None).proponent_texts(train, targets, targets=[4, 1], k=2, width=60)
    for column, block in zip([4, 1], table.split("\n\n"), strict=True):
        head, *lines = block.splitlines()
        assert head == f"target #{target_indices[column]}  aim {target_indices[column]}"
        order = scores.values[:, column].argsort(descending=True)
        expected = train_indices[torch.cat([order[:2], order[-2:]])].tolist()
        assert [line.split()[1:] for line in lines] == [[f"#{i}", "text", f"{i}"] for i in expected]
        found = [float(line.split()[0]) for line in lines]
        assert found == pytest.approx(scores.values[torch.cat([order[:2], order[-2:]]), column].tolist(), rel=0.01)


# DataFrames -----------------------------------------------------------------------------------------------------------


def test_to_pandas_has_a_row_a_training_sample() -> None:
    pytest.importorskip("pandas")
    train_indices = torch.randperm(500)[:N]
    result = made(scores=ScoreMatrix(made().scores.values, train_indices))
    frame = result.to_pandas()
    assert frame.index.tolist() == train_indices.tolist()
    assert frame.index.name == "train_index"
    expected = {
        "self_influence": result.self_influence,
        "data_value": result.data_value,
        "loss": result.loss,
        "label": result.labels,
        "noise": result.noise_mask,
        "exposure": result.exposure,
    }
    assert list(frame.columns) == list(expected)
    for name, column in expected.items():
        assert frame[name].tolist() == column.tolist()
        assert frame[name].dtype == column.numpy().dtype


def test_to_pandas_leaves_out_what_is_unknown() -> None:
    pytest.importorskip("pandas")
    assert list(made(labels=None, noise_mask=None, exposure=None).to_pandas().columns) == [
        "self_influence",
        "data_value",
        "loss",
    ]


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lightning_attr\[plot\]"'):
        made().plot_scores()


WATCH = """
import builtins
found = []
real = builtins.__import__
def watching(name, globals=None, *rest, **more):
    if name.split(".")[0] == "matplotlib" and (globals or {}).get("__name__", "").startswith("lightning_attr"):
        found.append(globals["__name__"])
    return real(name, globals, *rest, **more)
builtins.__import__ = watching
import lightning_attr, torch
from lightning_attr import AttributionResult, ScoreMatrix
result = AttributionResult(ScoreMatrix(torch.eye(3)), torch.ones(3), torch.ones(3))
assert not found, found
result.plot_scores()
assert found, "the watch sees nothing"
"""


@pytest.mark.slow  # a process of its own imports Lightning anew
def test_importing_the_package_does_not_import_matplotlib() -> None:
    # torchmetrics imports matplotlib wherever it is installed: what counts is that none of our modules does.
    ran = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_overview_says_how_often_samples_were_trained_on() -> None:
    assert "0 to 4 times" in repr(made())
    assert "3 times each" in repr(made(exposure=torch.full((N,), 3)))
    assert "trained on" not in repr(made(exposure=None))


def test_exposure_is_a_count() -> None:
    with pytest.raises(TypeError, match=r"argument `exposure` of AttributionResult to be a tensor of whole numbers"):
        made(exposure=torch.ones(N))


def test_a_result_without_self_influence_leaves_it_out(tmp_path: Path) -> None:
    result = made(self_influence=torch.full((len(made().loss),), float("nan")))
    assert not any("self_influence" in name or name.startswith("noisy") for name in result.metrics)
    assert result.metrics["loss_noisy_label_auroc"] == made().metrics["loss_noisy_label_auroc"]
    assert "suspicious" not in repr(result)
    with pytest.raises(
        ValueError, match=r"select\(by='self_influence'\) needs it, but this result has NaN in its place"
    ):
        result.select(0.5, by="self_influence")
    page = result.report(tmp_path / "report.html").read_text("utf-8")
    assert "NaN" not in page
