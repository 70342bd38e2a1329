"""LESS: training samples by what an Adam step on them would do to the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, compute_precision
from lightning_attr.methods.over_snapshots import sum_over_snapshots
from lightning_attr.methods.tracin import learning_rates, unit_rows
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import AdamDirection, KroneckerProjector, Projection, Projector


class LESS(AttributionMethod):
    r"""Low-rank gradient similarity search (Xia et al., 2024): Adam's step for a sample against the target's gradient.

    .. math::
        S_{ij} = -\sum_c \omega_c \cos(P \Gamma_i(\theta_c), P \nabla f_j(\theta_c)), \qquad
        \Gamma_i = \frac{m'}{\sqrt{v' + \epsilon}},

    where :math:`m'` and :math:`v'` are the optimizer's moments at the snapshot after a step on :math:`\nabla\ell_i`
    alone, see :class:`lightning_attr.projectors.AdamDirection`. The weights :math:`\omega_c` are the learning rates of
    the steps that a snapshot stands for, and sum to one: with a snapshot at every epoch, the mean learning rate of the
    epoch. Scores are rank-only. To select data as published, score the samples of each sub-task, average over them and
    take the largest of the sub-tasks.

    Every sample's whole gradient is in memory, ``b * p`` numbers for a batch: it is for models with few trainable
    parameters, such as those of LoRA; a :class:`lightning_attr.projectors.LayerSubset` helps. Runs need an optimizer of
    the Adam family, and the callback this method or ``optimizer_state=True``.

    Args:
        projector: ``P``; by default :class:`lightning_attr.projectors.KroneckerProjector` to 8192 dimensions.

    Example:
        >>> import torch
        >>> train = {"features": torch.tensor([[0.0, 2.0], [3.0, 4.0]]), "alignment": torch.tensor([0.5, 0.9])}
        >>> snapshot = SnapshotFeatures.of(train, {"features": torch.tensor([[2.0, 0.0]])})
        >>> (block,) = LESS().score([snapshot])
        >>> block.scores.flatten(), block.self_influence
        (tensor([0.0000, 0.6000]), tensor([0.5000, 0.9000]))
    """

    scale = "rank_only"

    def __init__(self, projector: Projector | None = None) -> None:
        super().__init__(KroneckerProjector(8192) if projector is None else projector)

    @property
    def needs_optimizer_state(self) -> bool:
        """Always."""
        return True

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """What a store records: features are of Adam's direction, not of gradients."""
        return {"kind": "adam_direction", "projector": super().projector_config}

    def precondition(self, projection: Projection, layout: ParameterLayout, state: OptimizerState) -> Projection:
        """Put Adam's direction before the projection, for training samples; see :meth:`AttributionMethod.precondition`.

        Args:
            projection: of the directions.
            layout: the parameters.
            state: the optimizer's.

        Returns:
            The map.
        """
        return AdamDirection(projection, layout, state.moments)

    def bind_targets(self, projection: Projection) -> Projection:
        """Take targets as their plain gradients; see :meth:`AttributionMethod.bind_targets`.

        Args:
            projection: of the training samples.

        Returns:
            The projection behind Adam's direction.
        """
        return projection.projection if isinstance(projection, AdamDirection) else projection

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Add up over the snapshots; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training; training rows with a column ``alignment``.

        Yields:
            Scores, block after block.

        Raises:
            AttributionError: if the snapshots have no learning rates.
        """
        rates = learning_rates(snapshots)
        omegas = [rate / sum(rates) for rate in rates]
        targets = [
            omega * unit_rows(compute_precision(snapshot.targets["features"]))
            for snapshot, omega in zip(snapshots, omegas, strict=True)
        ]

        def term(number: int, rows: range, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            like = targets[number]
            return unit_rows(columns["features"].to(like)), omegas[number] * columns["alignment"].to(like)

        yield from sum_over_snapshots(snapshots, targets, term)
