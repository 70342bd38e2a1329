"""What every method shares: its default projection, its snapshots, the record of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from lightning_attr.methods import TRAK, AttributionMethod, GradCos, GradDot, ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.base import compute_precision
from lightning_attr.projectors import IdentityProjector, KroneckerProjector, RademacherProjector


class Loss(AttributionMethod):
    """A method of one's own: the loss, for every target."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        m = len(snapshots[0].targets["features"])
        for rows, train in in_step(snapshots):
            loss = sum(columns["loss"] ** self.power for columns in train)
            yield ScoreBlock(rows, loss[:, None].expand(-1, m), loss)


def test_a_method_of_your_own_needs_only_score() -> None:
    train = {"features": torch.zeros(3, 4), "loss": torch.tensor([1.0, 2.0, 3.0])}
    method = Loss(power=2)
    assert method.select(["a", "b"]) == ["a", "b"]
    snapshot = SnapshotFeatures.of(train, {"features": torch.zeros(2, 4)})
    (block,) = method.score([snapshot, snapshot])
    assert block.scores.tolist() == [[2, 2], [8, 8], [18, 18]]
    assert block.self_influence.tolist() == [2, 8, 18]
    assert method.config == {
        "method": "Loss",
        "scale": "measurement",
        "power": 2,
        "projector": KroneckerProjector().config,
    }


@pytest.mark.parametrize("method", [Loss(), GradDot(), GradCos()])
def test_the_default_projection(method: AttributionMethod) -> None:
    assert method.projector.config == {"kind": "kronecker", "proj_dim": 2048, "seed": 0}


def test_the_default_projection_of_trak_is_learned() -> None:
    assert TRAK().projector.config == {"kind": "eigen", "proj_dim": 2048, "seed": 0, "samples": 512}


def test_trak_config() -> None:
    assert TRAK(proj_dim=100, seed=5, damping=0.5, newton_weights=False).config == {
        "method": "TRAK",
        "scale": "measurement",
        "damping": 0.5,
        "per_layer": False,
        "newton_weights": False,
        "loo_correction": False,
        "balanced": True,
        "exact": False,
        "sampling": True,
        "kernel": "auto",
        "directions": 1,
        "projector": {"kind": "eigen", "proj_dim": 100, "seed": 5, "samples": 512},
    }
    exact = TRAK(proj_dim=100, exact=True).config
    assert (exact["exact"], exact["proj_dim"], exact["projector"]) == (True, 100, None)
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


def test_snapshots_are_walked_in_step() -> None:
    train = {"features": torch.randn(7, 2)}

    def snapshot(ranges: Sequence[range]) -> SnapshotFeatures:
        return SnapshotFeatures(lambda: ((rows, {"features": train["features"][rows]}) for rows in ranges), {})

    ranges = [range(4, 7), range(4)]
    for rows, columns in in_step([snapshot(ranges)] * 3):
        assert len(columns) == 3
        assert all(torch.equal(own["features"], train["features"][rows]) for own in columns)
    with pytest.raises(ValueError, match=r"same training rows .*, but got \[range\(4, 7\), range\(0, 7\)"):
        list(in_step([snapshot(ranges), snapshot([range(7)])]))
    with pytest.raises(ValueError, match="shorter"):
        list(in_step([snapshot(ranges), snapshot(ranges[:1])]))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_half_precision_is_for_storage(stored: torch.dtype, computed: torch.dtype) -> None:
    features = torch.randn(3, 2).to(stored)
    assert compute_precision(features).dtype == computed
    assert torch.equal(compute_precision(features), features.to(computed))


def test_methods_print_their_arguments() -> None:
    found = repr(TRAK(proj_dim=16, damping=0.5))
    assert found.startswith("TRAK(damping=0.5, ")
    assert found.endswith("projector={'kind': 'eigen', 'proj_dim': 16, 'seed': 0, 'samples': 512})")
