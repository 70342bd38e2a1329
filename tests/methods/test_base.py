"""What every method shares: its default projection, its snapshots, the record of its arguments."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from lightning_attr.methods import TRAK, AttributionMethod, GradCos, GradDot, SnapshotFeatures
from lightning_attr.projectors import IdentityProjector, KroneckerProjector, RademacherProjector


class Loss(AttributionMethod):
    """A method of one's own: the loss, for every target."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def score(self, snapshots: Iterable[SnapshotFeatures], scores: Tensor, self_influence: Tensor) -> None:
        for snapshot in snapshots:
            for rows, columns in snapshot.blocks():
                loss = columns["loss"] ** self.power
                scores[rows.start : rows.stop] += loss[:, None]
                self_influence[rows.start : rows.stop] += loss


def test_a_method_of_your_own_needs_only_score() -> None:
    scores, self_influence = torch.zeros(3, 2), torch.zeros(3)
    train = {"features": torch.zeros(3, 4), "loss": torch.tensor([1.0, 2.0, 3.0])}
    method = Loss(power=2)
    assert method.select(["a", "b"]) == ["a", "b"]
    method.score([SnapshotFeatures.of(train, {"features": torch.zeros(2, 4)})], scores, self_influence)
    assert scores.tolist() == [[1, 1], [4, 4], [9, 9]]
    assert method.config == {"method": "Loss", "power": 2, "projector": KroneckerProjector().config}


@pytest.mark.parametrize("method", [Loss(), GradDot(), GradCos(), TRAK()])
def test_the_default_projection(method: AttributionMethod) -> None:
    assert method.projector.config == {"kind": "kronecker", "proj_dim": 2048, "seed": 0}


def test_trak_config() -> None:
    assert TRAK(proj_dim=100, seed=5, damping=0.5, newton_weights=False).config == {
        "method": "TRAK",
        "damping": 0.5,
        "newton_weights": False,
        "projector": {"kind": "kronecker", "proj_dim": 100, "seed": 5},
    }
    assert TRAK(projector=RademacherProjector(64)).config["projector"]["kind"] == "rademacher"
    assert TRAK(projector=IdentityProjector()).config["projector"] == {"kind": "identity"}


def test_snapshot_features_of_columns_in_memory() -> None:
    snapshot = SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.zeros(1, 2)})
    for _ in range(2):  # blocks can be read again
        ((rows, columns),) = snapshot.blocks()
        assert rows == range(3)
        assert torch.equal(columns["features"], torch.ones(3, 2))
    x = torch.randn(2)
    assert snapshot.reduce(x) is x
