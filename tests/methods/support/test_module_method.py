"""Methods that run the module: which snapshots, in which order, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cases import BlobClassifier, blobs
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import ModelMethod, ScoreBlock, SnapshotFeatures, model_of
from lightning_attr.parameters.weights import load_weights, weights_of
from lightning_attr.projectors import NoProjection

TRAIN = blobs(6).tensors


class FirstWeight(ModelMethod):
    """The first weight of the module, for every sample and target."""

    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        model = model_of(snapshot)
        for rows, _ in model.train_batches():
            scores = model.module.network[0].weight[0, 0].detach().expand(len(rows), len(snapshot.target_rows)).clone()
            yield ScoreBlock(range(rows[0], rows[-1] + 1), scores, scores[:, 0].clone())


def snapshots(*values: float) -> list[SnapshotFeatures]:
    module = BlobClassifier().eval()
    found = []
    for value in values:
        with torch.no_grad():
            module.network[0].weight[0, 0] = value
        weights = {name: tensor.clone() for name, tensor in weights_of(module).items()}
        model = SnapshotModel.of(module, [(TRAIN[0][:4], TRAIN[1][:4]), (TRAIN[0][4:], TRAIN[1][4:])], [TRAIN])
        object.__setattr__(model, "load", lambda weights=weights: load_weights(module, weights))
        found.append(SnapshotFeatures.at(model, {}))
    return found


def test_scores_are_the_mean_over_the_snapshots_each_with_an_equal_part() -> None:
    method = FirstWeight(snapshots="all")
    blocks = list(method.score(method.select(snapshots(1.0, 2.0, 6.0))))  # weights 6/10, 3/10, 1/10
    assert [block.rows for block in blocks] == [range(4), range(4, 6)]
    assert all(block.scores.shape == (len(block.rows), 6) for block in blocks)
    for block in blocks:
        torch.testing.assert_close(block.scores, torch.full_like(block.scores, 1.8))
        torch.testing.assert_close(block.self_influence, torch.full_like(block.self_influence, 1.8))


def test_snapshots_without_any_scores_do_no_harm() -> None:
    method = FirstWeight(snapshots="all")
    (first, _) = method.score(snapshots(0.0, 0.0))
    assert (first.scores == 0).all()


def test_the_last_snapshot_is_the_default() -> None:
    method = FirstWeight()
    assert method.select("abc") == "c"
    (first, _) = method.score(method.select(snapshots(1.0, 2.0, 6.0)))
    assert first.scores.unique().item() == 6


def test_nothing_is_featurized_for_them() -> None:
    method = FirstWeight()
    (snapshot,) = snapshots(1.0)
    assert method.projector is None
    assert method.projector_config is None
    assert isinstance(method.bind(snapshot.model.layout, "final"), NoProjection)
    assert method.config == {"method": "FirstWeight", "scale": "measurement", "snapshots": "last", "projector": None}
    assert snapshot.numel == snapshot.model.layout.numel


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`snapshots` of .+ to be 'last' or 'all', but got 'first'"):
        FirstWeight(snapshots="first")
    features = SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)})
    with pytest.raises(TypeError, match="snapshot with its `model`, but got features only"):
        list(FirstWeight().score([features]))
