"""Shapley values of nearest neighbours, against all subsets."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import KNNShapley, SnapshotFeatures, knn_shapley
from lightning_attr.methods.knn_shapley import shapley_values

N, M = 9, 4


class Classifier(AttributionMixin, nn.Linear):
    """The representations are the inputs."""


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator).double(), torch.randint(2, (n,), generator=generator)


TRAIN, TARGETS = data(N, 0), data(M, 1)


def scores_of(
    method: KNNShapley, train: tuple[Tensor, Tensor] = TRAIN, targets: tuple[Tensor, Tensor] = TARGETS
) -> tuple[Tensor, Tensor]:
    parts = [(train[0][:4], train[1][:4]), (train[0][4:], train[1][4:])]
    model = SnapshotModel.of(Classifier(2, 2).double().eval(), parts, [targets])
    blocks = list(method.score([SnapshotFeatures.at(model, {})]))
    assert [row for block in blocks for row in block.rows] == list(range(len(train[0])))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def worth(distances: Tensor, correct: Tensor, subset: tuple[int, ...], k: int) -> float:
    nearest = sorted(subset, key=lambda i: (float(distances[i]), i))[:k]
    return sum(float(correct[i]) for i in nearest) / k


def brute_force(distances: Tensor, correct: Tensor, k: int) -> Tensor:
    n, values = len(distances), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        value = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for subset in combinations(others, size):
                gain = worth(distances, correct, (*subset, i), k) - worth(distances, correct, subset, k)
                value += weight * gain
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("ties", [False, True])
def test_values_are_those_of_all_subsets(k: int, ties: bool) -> None:
    distances = torch.randint(1, 3, (3, 6)).double() if ties else torch.rand(3, 6).double()
    correct = torch.rand(3, 6) < 0.5
    found = shapley_values(distances, correct, k)
    expected = torch.stack([brute_force(*pair, k) for pair in zip(distances, correct, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    total = [worth(*pair, tuple(range(6)), k) for pair in zip(distances, correct, strict=True)]
    torch.testing.assert_close(found.sum(1), torch.tensor(total, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("few", [1, 10**6])
def test_scores_are_those_of_distances_between_representations(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_shapley, "_DISTANCES", few)
    scores, self_influence = scores_of(KNNShapley(k=2))
    for j in range(M):
        distances = (TRAIN[0] - TARGETS[0][j]).norm(dim=1)
        torch.testing.assert_close(scores[:, j], brute_force(distances, TRAIN[1] == TARGETS[1][j], 2))
    for i in range(N):
        distances = (TRAIN[0] - TRAIN[0][i]).norm(dim=1)
        own = brute_force(distances, TRAIN[1] == TRAIN[1][i], 2)[i]
        assert self_influence[i].item() == pytest.approx(own.item())
    assert self_influence.std() > 0


def test_targets_a_tile_at_a_time_change_nothing() -> None:
    parts = [(TRAIN[0][:4], TRAIN[1][:4]), (TRAIN[0][4:], TRAIN[1][4:])]
    whole = SnapshotFeatures.at(SnapshotModel.of(Classifier(2, 2).double().eval(), parts, [TARGETS]), {})
    expected = torch.cat([block.scores for block in KNNShapley(2).score([whole])])
    for rows in (range(1), range(1, M)):
        object.__setattr__(whole, "target_rows", rows)
        found = torch.cat([block.scores for block in KNNShapley(2).score([whole])])
        torch.testing.assert_close(found, expected[:, rows.start : rows.stop])


def test_copies_have_equal_values() -> None:
    x, y = (tensor.clone() for tensor in TRAIN)
    x[7], y[7] = x[2], y[2]
    scores, self_influence = scores_of(KNNShapley(k=2), (x, y))
    assert torch.equal(scores[7], scores[2])
    assert self_influence[7].item() == pytest.approx(self_influence[2].item())


def test_values_of_dattri_are_the_same_transposed() -> None:
    algorithm = pytest.importorskip("dattri.algorithm.data_shapley")
    train, targets = (DataLoader(TensorDataset(*d), batch_size=3) for d in (TRAIN, TARGETS))
    found = algorithm.KNNShapleyAttributor(3).attribute(train, targets)
    torch.testing.assert_close(found.T, scores_of(KNNShapley(k=3))[0].float())


def test_end_to_end() -> None:
    module, train, targets = BlobClassifier(), blobs(20), blobs(6, seed=1)
    result = quiet_trainer().attribute(
        model=module,
        method=KNNShapley(k=3, layer="network.1"),
        train_dataloaders=loader_of(train),
        target_dataloaders=loader_of(targets, batch_size=4),
    )
    h, z = (module.network[:2](x).detach().double() for x in (train.tensors[0], targets.tensors[0]))
    expected = shapley_values(torch.cdist(z, h), train.tensors[1] == targets.tensors[1][:, None], 3)
    torch.testing.assert_close(result.scores.values, expected.T.float(), rtol=1e-5, atol=1e-6)
    assert result.scores.provenance["scale"] == "rank_only"
    assert result.scores.provenance["k"] == 3


def test_labels_are_needed() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

    model = SnapshotModel.of(Plain().double().eval(), [TRAIN], [TARGETS])
    with pytest.raises(ValueError, match="compares the labels of neighbours, but the attribution step of Plain"):
        list(KNNShapley().score([SnapshotFeatures.at(model, {})]))


def test_a_function_of_the_targets_is_refused() -> None:
    loader = loader_of(blobs(8))
    with pytest.raises(AttributionError, match="KNNShapley does not measure an output of the targets"):
        quiet_trainer().attribute(
            model=BlobClassifier(),
            method=KNNShapley(),
            train_dataloaders=loader,
            target_dataloaders=loader,
            target_function=lambda module, batch: module(batch[0]).sum(1),
        )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`k` of .+ to be an integer >= 1, but got 0"):
        KNNShapley(k=0)
