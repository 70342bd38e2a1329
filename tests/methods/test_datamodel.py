"""Scores from retrained models alone: against what the models were made of, loops, and what does not belong."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import truth_of

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation.evaluate import evaluate
from lightning_attr.methods import Datamodel, EmpiricalInfluence, SnapshotFeatures, datamodel
from lightning_attr.methods.datamodel import RetrainingMethod
from lightning_attr.methods.support.subset_truth import mask_digests

N, M = 12, 5
WEIGHTS = torch.randn(N, M, generator=torch.Generator().manual_seed(3)).double()


def snapshot(n: int = N, m: int = M) -> SnapshotFeatures:
    return SnapshotFeatures.of({"features": torch.zeros(n, 0).double()}, {"features": torch.zeros(m, 0).double()})


def scores_of(method: RetrainingMethod) -> tuple[Tensor, Tensor]:
    snapshots = method.select([snapshot(), snapshot()])
    method.prepare(snapshots)
    (block,) = method.score(snapshots)
    assert block.rows == range(N)
    return block.scores, block.self_influence


def bernoulli(m: int, seed: int = 0) -> Tensor:
    return torch.rand(m, N, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_empirical_influence_is_a_difference_of_means() -> None:
    truth = truth_of(WEIGHTS, subsets=30, seeds=2, noise=1.0)
    scores, _ = scores_of(EmpiricalInfluence(truth))
    for i in range(N):
        inside, outputs = truth.masks[:, i], truth.outputs.mean(0)
        torch.testing.assert_close(scores[i], outputs[inside].mean(0) - outputs[~inside].mean(0))


def test_least_squares_recovers_the_weights_of_models_without_noise() -> None:
    masks = bernoulli(40)
    outputs = masks.double() @ WEIGHTS + 7.0
    scores, _ = scores_of(Datamodel((masks, outputs), "ridge", strength=0.0))
    torch.testing.assert_close(scores, WEIGHTS, rtol=0, atol=1e-10)


def test_least_squares_is_the_difference_of_means_on_a_balanced_design() -> None:
    masks = torch.cartesian_prod(*[torch.tensor([False, True])] * 4)  # orthogonal: every sample half of the time
    outputs = torch.randn(16, 3).double()
    means = EmpiricalInfluence((masks, outputs)).weights
    torch.testing.assert_close(Datamodel((masks, outputs), "ridge", strength=0.0).weights, means)
    halves = torch.tensor([[i in subset for i in range(6)] for subset in combinations(range(6), 3)])
    outputs = halves.double() @ torch.randn(6, 2).double()
    means = EmpiricalInfluence((halves, outputs)).weights
    found = Datamodel((halves, outputs), "ridge", strength=0.0).weights
    torch.testing.assert_close(found, means * 5 / 6)  # subsets of one size: adding one sample drops another
    torch.testing.assert_close(found.sum(0), torch.zeros(2).double())


def test_lasso_finds_the_few_that_matter() -> None:
    sparse = torch.zeros(N, M).double()
    sparse[2], sparse[7] = 3.0, -2.0
    masks = bernoulli(60)
    outputs = masks.double() @ sparse + 0.05 * torch.randn(60, M).double()
    scores, _ = scores_of(Datamodel((masks, outputs)))
    torch.testing.assert_close(scores, sparse, rtol=0, atol=0.1)
    fixed = Datamodel((masks, outputs), strength=0.2).weights
    assert ((fixed != 0) == (sparse != 0)).all()


@pytest.mark.parametrize("penalty", ["lasso", "ridge"])
@pytest.mark.parametrize("block", [1, 10**7])
def test_the_strength_of_each_target_has_the_least_error_on_held_out_subsets(
    penalty: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodel, "_BLOCK", block)
    masks = bernoulli(30)
    noise = torch.logspace(-2, 1, M).double() * torch.randn(30, M, generator=torch.Generator().manual_seed(1)).double()
    outputs = masks.double() @ WEIGHTS + noise
    method = Datamodel((masks, outputs), penalty)
    order = datamodel.random_words(30, "datamodel hold-out").argsort(kind="stable").tolist()
    held, used = order[:3], order[3:]
    errors, center = [], outputs[used].mean(0)
    for strength in datamodel._GRIDS[penalty]:
        weights = method._solver(masks[used]).solve(outputs[used] - center, torch.full((M,), strength))
        predicted = center + (masks[held].double() - masks[used].double().mean(0)) @ weights
        errors.append((predicted - outputs[held]).square().sum(0))
    error = torch.stack(errors)
    best = error.argmin(0)
    grid = torch.tensor(datamodel._GRIDS[penalty], dtype=torch.float64)
    torch.testing.assert_close(method.fit.strengths, grid[best])
    assert len(best.unique()) > 1
    for j in range(M):
        alone = Datamodel((masks, outputs[:, j : j + 1]), penalty, float(grid[best[j]])).weights
        torch.testing.assert_close(method.weights[:, j : j + 1], alone, rtol=1e-4, atol=1e-6)
    choice = method.evidence["strength_choice"]
    assert choice["targets"] == best.bincount(minlength=len(grid)).tolist()
    assert choice["held_out_subsets"] == 3
    variance = (outputs[held] - center).square().sum()
    assert choice["held_out_r2"] == pytest.approx(float(1 - error.min(0).values.sum() / variance))


def test_a_datamodel_predicts_unseen_subsets() -> None:
    method = Datamodel(truth_of(WEIGHTS, subsets=60, noise=0.1), "ridge")
    unseen = truth_of(WEIGHTS, subsets=20, seed=9)
    predicted, outputs = unseen.masks.double() @ method.weights, unseen.outputs[0]
    for j in range(M):
        assert torch.corrcoef(torch.stack([predicted[:, j], outputs[:, j]]))[0, 1] > 0.99


@pytest.mark.parametrize("make", [EmpiricalInfluence, lambda truth: Datamodel(truth, strength=0.1)])
def test_tiles_and_blocks_change_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(truth_of(WEIGHTS))
    whole = scores_of(method)
    monkeypatch.setattr(datamodel, "_BLOCK", 10)
    blocks = list(method.score([replace(snapshot(), target_rows=range(1, 4))]))
    assert [row for block in blocks for row in block.rows] == list(range(N))
    assert len(blocks) > 1
    torch.testing.assert_close(torch.cat([block.scores for block in blocks]), whole[0][:, 1:4])
    torch.testing.assert_close(torch.cat([block.self_influence for block in blocks]), whole[1])


def test_self_influence_of_other_targets_is_the_size_of_the_scores() -> None:
    scores, self_influence = scores_of(EmpiricalInfluence(truth_of(WEIGHTS)))
    expected = [math.sqrt(sum(float(score) ** 2 for score in row) / M) for row in scores]
    torch.testing.assert_close(self_influence, torch.tensor(expected, dtype=torch.float64))


# The whole way ----------------------------------------------------------------------------------------------------


def attribute(method: RetrainingMethod, targets: Any = None, **settings: Any) -> AttributionResult:
    loaders = {
        "train_dataloaders": loader_of(blobs(N)),
        "target_dataloaders": loader_of(blobs(M, seed=1) if targets is None else targets, batch_size=2),
    }
    return quiet_trainer().attribute(model=BlobClassifier(), method=method, **loaders, **settings)


def test_end_to_end() -> None:
    truth = truth_of(WEIGHTS, subsets=40, noise=0.1)
    result = attribute(Datamodel(truth))
    torch.testing.assert_close(result.scores.values, Datamodel(truth).weights.float())
    provenance = result.scores.provenance
    assert provenance["method"] == "Datamodel"
    assert provenance["scale"] == "measurement"
    assert (provenance["penalty"], provenance["strength"]) == ("lasso", "auto")
    assert provenance["fitted_on"] == mask_digests(truth.masks)
    assert provenance["evidence"]["current"]["strength_choice"]["held_out_subsets"] == 4
    result = attribute(EmpiricalInfluence(truth), topk=2)
    torch.testing.assert_close(result.scores.topk(2)[1], EmpiricalInfluence(truth).weights.float().T.topk(2).values)


def test_self_influence_is_the_diagonal_where_the_targets_are_the_training_samples() -> None:
    square = torch.randn(N, N).double()
    result = attribute(EmpiricalInfluence(truth_of(square)), targets=blobs(N))
    torch.testing.assert_close(result.self_influence, result.scores.values.diagonal())


def test_results_are_saved_and_loaded(tmp_path: Path) -> None:
    result = attribute(Datamodel(truth_of(WEIGHTS), "ridge"))
    result.save(tmp_path)
    assert AttributionResult.load(tmp_path).scores.provenance == result.scores.provenance


def test_truth_of_other_data_is_refused() -> None:
    with pytest.raises(StoreMismatchError, match="the truth has 13 training samples, here are 12"):
        attribute(EmpiricalInfluence(truth_of(torch.randn(13, M))))
    with pytest.raises(StoreMismatchError, match=r"of EmpiricalInfluence .* the truth has 4 targets, here are 5"):
        attribute(EmpiricalInfluence(truth_of(torch.randn(N, 4))))
    truth = truth_of(WEIGHTS)
    same = attribute(EmpiricalInfluence(truth)).scores.provenance
    known = {key: same[key] for key in ("train_data", "target_probe")}
    attribute(EmpiricalInfluence(replace(truth, provenance=known)))
    with pytest.raises(StoreMismatchError, match="its training samples differ from those here, though there are as"):
        attribute(EmpiricalInfluence(replace(truth, provenance={**known, "train_data": "other"})))
    with pytest.raises(StoreMismatchError, match="its targets differ from those here"):
        attribute(EmpiricalInfluence(replace(truth, provenance=known)), targets=blobs(M, seed=2))


def test_a_function_of_the_targets_is_refused() -> None:
    with pytest.raises(AttributionError, match="Datamodel does not measure an output of the targets"):
        attribute(Datamodel(truth_of(WEIGHTS)), target_function=lambda module, batch: module(batch[0]).sum(1))


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
def test_scores_are_not_evaluated_on_the_subsets_they_come_from(method: Any) -> None:
    truth, other = truth_of(WEIGHTS, subsets=40), truth_of(WEIGHTS, subsets=30, seed=5)
    known = set(mask_digests(truth.masks))
    new = [name not in known for name in mask_digests(other.masks)]  # of so few samples, some subsets are drawn twice
    result = attribute(method(truth))
    unseen = replace(other, masks=other.masks[new], outputs=other.outputs[:, new])
    assert evaluate(result, unseen, bootstrap=0).metrics["lds"] > 0.5
    for overlapping in (truth, other):
        count = len(truth.masks) if overlapping is truth else new.count(False)
        message = rf"fitted to models retrained on {count} of the subsets \(of {len(overlapping.masks)}\)"
        with pytest.raises(AttributionError, match=message):
            evaluate(result, overlapping, bootstrap=0)


# What is no truth ---------------------------------------------------------------------------------------------------


def test_bad_truth() -> None:
    masks, outputs = bernoulli(30), torch.randn(30, M)
    with pytest.raises(TypeError, match=r"a GroundTruth, or a pair of tensors .* got str. Open .* `GroundTruth.open"):
        EmpiricalInfluence("folder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"to hold masks \(m, n_train\) .* but got \(30, 12\) and \(29, 5\)"):
        EmpiricalInfluence((masks, outputs[1:]))
    with pytest.raises(ValueError, match="masks of argument `truth` to hold only True and False"):
        EmpiricalInfluence((masks.float() + 0.5, outputs))
    with pytest.raises(AttributionError, match="finite outputs of finished retrainings, but some are NaN or Inf"):
        EmpiricalInfluence((masks, outputs.masked_fill(outputs > 1, torch.nan)))
    masks[:, 4] = True
    with pytest.raises(ValueError, match="1 are in all or in none, among them sample 4"):
        EmpiricalInfluence((masks, outputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": "elastic"}, "`penalty` of .+ to be 'lasso' or 'ridge', but got 'elastic'"),
        ({"strength": "best"}, "`strength` of .+ to be a number in \\(0, 1\\], or 'auto', but got 'best'"),
        ({"strength": 0.0}, r"`strength` of .+ to be a number in \(0, 1\], or 'auto', but got 0.0"),
        ({"strength": 1.5}, r"`strength` of .+ to be a number in \(0, 1\], or 'auto', but got 1.5"),
        (
            {"penalty": "ridge", "strength": -1.0},
            "`strength` of .+ a finite number >= 0, or 'auto', but got -1.0",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Datamodel(truth_of(WEIGHTS), **arguments)


def test_few_subsets_do_not_choose_a_strength() -> None:
    truth = truth_of(WEIGHTS, subsets=19)
    with pytest.raises(ValueError, match="at least 20 subsets to choose the strength with, but it has 19"):
        Datamodel(truth)
    assert Datamodel(truth, strength=0.1).evidence == {}
