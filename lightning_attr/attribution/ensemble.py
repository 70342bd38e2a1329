"""Which snapshots of a store score together, and how the scores of a run and of its pilots are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lightning_attr.errors import AttributionError
from lightning_attr.methods import AttributionMethod, ScoreBlock, SnapshotFeatures
from lightning_attr.methods.over_snapshots import balanced_weights
from lightning_attr.store.manifest import Snapshot

_RUN_SHARE = 2.0
"""Of a recorded run in the sum of scores; a pilot has one. With 1 and 3 two pilots lose .003 on the digits MLP."""
_ELEMENTS = 2**28
"""Scores of all parts for the targets at hand: 1 GiB of float32."""


@dataclass(frozen=True)
class Part:
    """Snapshots that a method scores together: of a run, or of a pilot.

    Args:
        name: for the record of a result.
        share: its part in the sum.
        snapshots: in the order of training.

    Example:
        >>> Part("pilot=0000", 1.0, ()).share
        1.0
    """

    name: str
    share: float
    snapshots: Sequence[Snapshot]


def parts_of(
    snapshots: Sequence[Snapshot], pilots: int, select: Callable[[Sequence[Snapshot]], Sequence[Snapshot]]
) -> list[Part]:
    """Choose the snapshots of an attribution.

    Returns pilots, then the runs: the last snapshot is one of the run itself.
    """
    recorded = [snapshot for snapshot in snapshots if snapshot.pilot is None]
    if not pilots:
        return [Part("run", 1.0, select(recorded))]
    found = [snapshot for snapshot in snapshots if snapshot.pilot is not None][:pilots]
    if len(found) < pilots:
        raise AttributionError(
            f"Expected {pilots} pilots, but the store has {len(found)} that can be scored. Let one process call "
            f"`trainer.attribute(..., pilots={pilots})` that may write the store: it trains those that are missing."
        )
    runs = groupby(recorded, key=lambda snapshot: snapshot.key.rpartition("/")[0])
    return [
        *(Part(snapshot.key, 1.0, select([snapshot])) for snapshot in found),
        *(Part(name or "run", _RUN_SHARE, select(list(own))) for name, own in runs),
    ]


class Ensemble:
    r"""Scores the parts of an attribution apart, and sums them in units of their own spread.

    .. math::
        S = \sum_r w_r S_r, \qquad w_r \propto c_r / \operatorname{std}(S_r), \qquad \sum_r w_r = 1

    with the scores :math:`S_r` of each part by the method alone, and its share :math:`c_r`. The spread is that over all
    training samples and the targets that are scored first. One part is scored as it is.

    Args:
        method: what scores.
        parts: share and number of snapshots of each part; None for one part.

    Attributes:
        weights: :math:`w_r`, once the first targets are scored.

    Example:
        >>> from lightning_attr.methods import GradDot
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2)}
        >>> one, ten = (SnapshotFeatures.of(train, {"features": torch.tensor([[f, 0.0]])}) for f in (1.0, 10.0))
        >>> ensemble = Ensemble(GradDot(), [(1.0, 1), (1.0, 1)])
        >>> [block.scores.flatten() for block in ensemble.score([one, ten])], ensemble.weights
        ([tensor([1.8182, 0.0000])], [0.9090909090909091, 0.09090909090909091])
    """

    def __init__(self, method: AttributionMethod, parts: Sequence[tuple[float, int]] | None = None) -> None:
        self.method = method
        self.parts = parts or [(1.0, -1)]
        self.weights = [1.0] if len(self.parts) == 1 else []

    def most_targets(self, n_train: int) -> int:
        """Bound the targets at once: the scores of each part are kept until all are there."""
        return max(1, _ELEMENTS // (n_train * len(self.parts))) if len(self.parts) > 1 else _ELEMENTS

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Score the rows of this process."""
        if len(self.parts) == 1:
            yield from self.method.score(snapshots)
            return
        found = [self.method.score(own) for own in self._apart(snapshots)]
        # One part after the other where the module runs: it has the weights of one snapshot at a time.
        apart = not self.weights or self.method.projector is None
        blocks = [list(part) for part in found] if apart else found
        self.weights = self.weights or self._weights(blocks, snapshots[0])  # type: ignore[arg-type]  # lists, then
        for together in zip(*blocks, strict=True):
            scores, self_influence = together[0].scores * self.weights[0], together[0].self_influence * self.weights[0]
            for block, weight in zip(together[1:], self.weights[1:], strict=True):
                scores = scores.add(block.scores.to(scores), alpha=weight)
                self_influence = self_influence.add(block.self_influence.to(self_influence), alpha=weight)
            yield ScoreBlock(together[0].rows, scores, self_influence)

    def _apart(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[Sequence[SnapshotFeatures]]:
        start = 0
        for _, count in self.parts:
            yield snapshots[start : start + count]
            start += count

    def _weights(self, parts: Sequence[Sequence[ScoreBlock]], snapshot: SnapshotFeatures) -> list[float]:
        """Weigh each part by its share over the standard deviation of its scores, of all processes."""
        deviations = []
        for blocks in parts:
            sums = torch.zeros(3, dtype=torch.float64)
            for block in blocks:
                scores = block.scores.double()
                sums += torch.stack([scores.sum(), scores.square().sum(), torch.tensor(float(scores.numel()))]).cpu()
            total, squares, count = snapshot.reduce(sums).tolist()
            mean = total / max(count, 1.0)
            deviations.append(max(0.0, squares / max(count, 1.0) - mean**2) ** 0.5)
        weights = [weight * c for weight, (c, _) in zip(balanced_weights(deviations), self.parts, strict=True)]
        return [weight / sum(weights) for weight in weights]
