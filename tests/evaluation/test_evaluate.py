"""One call for all that needs retraining: against scipy, and what does not belong together."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.retraining_cases import N_TARGET, N_TRAIN, Data, Tiny, trainer
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from cases import blobs, quiet_trainer
from lightning_attr import AttributionResult, ScoreMatrix, attribute
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation import Evaluation, GroundTruth, evaluate, retrain_lds
from lightning_attr.metrics import figures, linear_datamodeling_score
from lightning_attr.results.top_scores import TopScoresSum

N, M, SEEDS = 20, 4, 3
KINDS = ("lds", "loo", "without")


def result_of(values: Tensor, **changes: Any) -> AttributionResult:
    return AttributionResult(ScoreMatrix(values, **changes), torch.ones(len(values)), torch.ones(len(values)))


def made(kind: str, **changes: Any) -> tuple[AttributionResult, GroundTruth]:
    """Scores that know something of the ground truth."""
    generator = torch.Generator().manual_seed(3)
    effects = torch.randn(N, M, generator=generator, dtype=torch.float64)
    if kind == "lds":
        masks = torch.rand(12, N, generator=generator).argsort(1) < N // 2
    else:
        removed = [[i] for i in (7, 2, 11, 5, 16)] if kind == "loo" else [[1, 2], [5], [3, 9, 11], [0, 19], [7, 8]]
        masks = torch.ones(1 + len(removed), N, dtype=torch.bool)
        for row, indices in enumerate(removed, start=1):
            masks[row, indices] = False
    outputs = masks.double() @ effects + torch.randn(SEEDS, len(masks), M, generator=generator, dtype=torch.float64)
    scores = effects + torch.randn(N, M, generator=generator, dtype=torch.float64)
    truth = GroundTruth(Path("truth"), kind, masks, outputs, torch.zeros(outputs.shape[:2], dtype=torch.int64), {})
    return result_of(scores), replace(truth, **changes)


# Figures --------------------------------------------------------------------------------------------------------------


def test_lds_is_that_of_scipy() -> None:
    result, truth = made("lds")
    found = evaluate(result, truth)
    summed, outputs = truth.masks.double() @ result.scores.values, truth.outputs.mean(0)
    expected = [spearmanr(summed[:, j], outputs[:, j]).statistic for j in range(M)]
    metrics = found.metrics
    assert metrics["lds"] == pytest.approx(np.mean(expected))
    assert metrics["lds_low"] < metrics["lds"] < metrics["lds_high"]
    assert metrics["lds_of_ceiling"] == pytest.approx(metrics["lds"] / metrics["lds_ceiling"])
    assert set(metrics) == {f"lds{end}" for end in ("", "_low", "_high", "_ceiling", "_of_ceiling", "_undefined")}
    assert metrics["lds_undefined"] == 0
    assert all(type(figure) is float for figure in metrics.values())


@pytest.mark.parametrize(("kind", "prefix"), [("loo", "loo"), ("without", "removal")])
def test_effects_of_removals_are_correlated_as_by_scipy(kind: str, prefix: str) -> None:
    result, truth = made(kind)
    metrics = evaluate(result, truth, bootstrap=50).metrics
    predicted = np.stack([result.scores.values[indices].sum(0).numpy() for indices in truth.removed])
    effects = (truth.outputs[:, :1] - truth.outputs[:, 1:]).mean(0).numpy()
    for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr)):
        expected = np.mean([correlation(predicted[:, j], effects[:, j]).statistic for j in range(M)])
        assert metrics[f"{prefix}_{name}"] == pytest.approx(expected)
        assert metrics[f"{prefix}_{name}_low"] <= metrics[f"{prefix}_{name}"] <= metrics[f"{prefix}_{name}_high"]
    assert metrics[f"{prefix}_pearson"] > 0  # removing what has high scores lowers the output
    assert metrics[f"{prefix}_signal_to_noise"] > 0


def test_what_cannot_be_known_is_nan() -> None:
    result, truth = made("lds")
    metrics = evaluate(result, replace(truth, outputs=truth.outputs[:1]), bootstrap=0).metrics
    assert np.isnan([metrics[f"lds_{name}"] for name in ("low", "high", "ceiling", "of_ceiling")]).all()


def test_bootstrap_arguments_are_passed_on() -> None:
    result, truth = made("lds")
    expected = linear_datamodeling_score(result.scores.values, truth.masks, truth.outputs, 20, 0.5, 7)
    metrics = evaluate(result, truth, bootstrap=20, confidence=0.5, seed=7).metrics
    assert (metrics["lds_low"], metrics["lds_high"]) == (float(expected.low), float(expected.high))
    with pytest.raises(ValueError, match="`confidence`"):
        evaluate(result, truth, confidence=1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_are_found_by_their_indices(kind: str) -> None:
    result, truth = made(kind)
    rows, columns = torch.randperm(N), torch.randperm(M)
    shuffled = result_of(result.scores.values[rows][:, columns], train_indices=rows, target_indices=columns)
    expected = evaluate(result, truth, bootstrap=0)
    torch.testing.assert_close(evaluate(shuffled, truth, bootstrap=0).score, expected.score, equal_nan=True)


def test_the_representation_says_it_all() -> None:
    result, truth = made("lds")
    lines = repr(evaluate(result, truth)).splitlines()
    assert lines[0] == "subsets: 12, seeds: 3, targets: 4"
    assert re.fullmatch(r"lds: 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\), ceiling 0\.\d{3}", lines[1])
    result, truth = made("without")
    lines = repr(evaluate(result, truth, bootstrap=0)).splitlines()
    assert lines[0] == "removed sets: 5, seeds: 3, targets: 4"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "removal_pearson", "removal_spearman", "removal_signal_to_noise",
    ]  # fmt: skip
    assert " to " not in lines[1]


@pytest.mark.filterwarnings("ignore:The correlation of 1 of 4 targets")
def test_targets_left_out_are_counted() -> None:
    result, truth = made("lds")
    outputs = truth.outputs.clone()
    outputs[:, :, 2] = 1.0
    found = evaluate(result, replace(truth, outputs=outputs), bootstrap=0)
    assert found.metrics["lds_undefined"] == 1
    assert "targets left out: 1" in repr(found)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("lds", "Spearman correlation over subsets"),
        ("loo", "correlation over left-out samples"),
        ("without", "correlation over removed sets"),
    ],
)
def test_figures(kind: str, label: str) -> None:
    found = evaluate(*made(kind), bootstrap=0)
    _, axes = found.plot()
    assert axes.get_xlabel() == label
    own = figures.new_figure()
    given = own.subplots()
    assert found.plot(ax=given) == (own, given)


# What does not belong together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_top_scores_are_refused(kind: str) -> None:
    result, truth = made(kind)
    found = TopScoresSum(N, M, k=2)
    found.add(range(N), slice(0, M), result.scores.values.float())
    top = AttributionResult(found.total(), torch.ones(N), torch.ones(N))
    with pytest.raises(AttributionError, match=r"computed with `topk=2` and has only the extremes.*without `topk`"):
        evaluate(top, truth)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((N - 1, M), "it has 20 training samples, the scores have 19"),
        ((N, M + 1), "it has 4 targets, the scores have 5"),
        ((N + 1, M + 1), "it has 20 training samples, the scores have 21, and it has 4 targets, the scores have 5"),
    ],
)
def test_another_number_of_samples_is_refused(shape: tuple[int, int], problem: str) -> None:
    with pytest.raises(StoreMismatchError, match=rf"ground truth of another dataset \(truth\): {problem}\."):
        evaluate(result_of(torch.rand(shape)), made("lds")[1])


@pytest.mark.parametrize(
    ("key", "problem"), [("train_data", "its training data differ"), ("target_probe", "its targets differ")]
)
def test_other_data_of_the_same_size_are_refused(key: str, problem: str) -> None:
    result, truth = made("lds", provenance={key: "ab"})
    evaluate(result, truth, bootstrap=0)  # these scores do not say what data they are of
    values = result.scores.values
    evaluate(result_of(values, provenance={key: "ab"}), truth, bootstrap=0)
    with pytest.raises(
        StoreMismatchError, match=f"ground truth of another dataset .*{problem} from those of the scores"
    ):
        evaluate(result_of(values, provenance={key: "cd"}), truth)
    evaluate(result_of(values, provenance={key: "cd"}), replace(truth, provenance={key: None}), bootstrap=0)


@pytest.mark.parametrize("name", ["train_indices", "target_indices"])
def test_parts_of_a_dataset_are_refused(name: str) -> None:
    result, truth = made("lds")
    size = result.scores.shape[name == "target_indices"]
    with pytest.raises(StoreMismatchError, match=f"their `{name}` are not the numbers from 0 to {size - 1}"):
        evaluate(result_of(result.scores.values, **{name: torch.arange(size) + 1}), truth)


def test_unfinished_ground_truth_is_refused() -> None:
    result, truth = made("lds")
    outputs = truth.outputs.clone()
    outputs[1, 4] = torch.nan
    with pytest.raises(AttributionError, match=r"1 of 36 retrainings in truth have no outputs yet.*call again"):
        evaluate(result, replace(truth, outputs=outputs))


@pytest.mark.parametrize(("kind", "subsets"), [("lds", 1), ("loo", 2), ("without", 2)])
def test_one_set_has_no_correlation(kind: str, subsets: int) -> None:
    result, truth = made(kind)
    with pytest.raises(
        ValueError, match=r"at least 2 sets of training samples to correlate over, but there is 1 in truth"
    ):
        evaluate(result, replace(truth, masks=truth.masks[:subsets], outputs=truth.outputs[:, :subsets]))


# With what was really retrained ---------------------------------------------------------------------------------------


def test_ground_truth_of_another_dataset(tmp_path: Path) -> None:
    truth = retrain_lds(Tiny, trainer, Data, dirpath=tmp_path, num_subsets=4, seeds=2, progress=False)
    result = attribute(quiet_trainer(), Data(), model=Tiny())
    found = evaluate(result, truth, bootstrap=0)
    assert isinstance(found, Evaluation)
    assert found.shape == (2, 4, N_TARGET)
    with pytest.raises(StoreMismatchError, match="ground truth of another dataset"):
        evaluate(attribute(quiet_trainer(), Data(train=blobs(N_TRAIN + 1)), model=Tiny()), truth)
