"""TrackStar: cosines of gradients, whitened by what is common to the training set and to the queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, compute_precision
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.kernels.feature_kernel import Blocks, KernelMethod
from lightning_attr.methods.over_snapshots import sum_over_snapshots
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import Projection, Projector, ScaledProjection

T = TypeVar("T")

_QUERIES: CacheKey[list[Tensor]] = CacheKey("second moments of the queries")


class TrackStar(KernelMethod):
    r"""TrackStar (Chang et al., 2024): retrieval of the training samples whose gradients point where the query's does.

    .. math::
        S_{ij} = -\cos(R^{-1/2} \nabla\ell_i, R^{-1/2} \nabla f_j), \qquad
        R = \lambda R_{\text{query}} + (1 - \lambda) R_{\text{train}} + \delta I

    with the second moments of the loss gradients of all targets and of the training samples, in the space of the
    projected gradients. What all gradients have in common counts little so, and no sample counts for its size alone.
    All targets that are attributed together have a part in each other's scores.

    Scores are rank-only, and self-influence is the sign of :math:`q` and tells nothing. It finds candidates, which
    ``trainer.attribute(..., method=TrackStar(), rerank=Influence())`` lets a dearer method score.

    Args:
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector`, which projects each
            layer from both sides, as published.
        mixing: :math:`\lambda`, in [0, 1].
        damping: :math:`\delta` of each matrix, as a multiple of its mean diagonal entry.
        per_layer: a matrix a layer; without, one for all.
        preconditioner: "adam" for gradients over the root of Adam's second moments,
            :math:`\nabla / (\sqrt{\hat v} + \epsilon)`, at the snapshot.
        snapshots: "last" for the last snapshot, "all" for the mean over all of them.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> targets = {"features": torch.tensor([[2.0, 0.0]]), "out_to_loss": torch.tensor([1.0])}
        >>> (block,) = TrackStar(per_layer=False).score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten()
        tensor([1.0000, 0.0901])
    """

    scale = "rank_only"

    def __init__(
        self,
        projector: Projector | None = None,
        mixing: float = 0.5,
        damping: float = 0.1,
        per_layer: bool = True,
        preconditioner: str | None = None,
        snapshots: str = "last",
    ) -> None:
        super().__init__(projector, check_float(self, "damping", damping, minimum=0), per_layer)
        self.mixing = check_float(self, "mixing", mixing, minimum=0, maximum=1)
        check_choice(self, "preconditioner", preconditioner, ("adam", None))
        check_choice(self, "snapshots", snapshots, ("last", "all"))
        self.preconditioner = preconditioner
        self.snapshots = snapshots

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether there is a preconditioner."""
        return self.preconditioner is not None

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """What a store records: features of gradients over their root moments are others."""
        config = super().projector_config
        return config if self.preconditioner is None else {"kind": "adam_normalised", "projector": config}

    def precondition(self, projection: Projection, layout: ParameterLayout, state: OptimizerState) -> Projection:
        """Scale gradients as Adam does; see :meth:`AttributionMethod.precondition`.

        Args:
            projection: of the scaled gradients.
            layout: the parameters.
            state: the optimizer's.

        Returns:
            The map.
        """
        scales = {name: moments.preconditioner() for name, moments in state.moments.items()}
        return ScaledProjection(projection, layout, scales)

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the last snapshot, or all; see :meth:`AttributionMethod.select`.

        Args:
            snapshots: all that a run has.

        Returns:
            Those it uses.
        """
        return snapshots[-1:] if self.snapshots == "last" else snapshots

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:
        """Add up the second moments of all targets; see :meth:`AttributionMethod.prepare`.

        Args:
            snapshots: with all targets.
        """
        for snapshot in snapshots:
            snapshot.cache.keep(_QUERIES, self._queries(snapshot))

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the squared slope of the loss: second moments are of its gradients.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``.
        """
        return columns["out_to_loss"].double().square()

    def kernels(self, snapshot: SnapshotFeatures, sampled: int | None = None) -> Blocks:
        """Mix the second moments of training samples and targets; see :meth:`KernelMethod.kernels`.

        Args:
            snapshot: with the training features.
            sampled: how many random rows to add the former up from; None for all.

        Returns:
            Columns and matrix of each block, float64.
        """
        queries = snapshot.cache.find(_QUERIES)
        queries = self._queries(snapshot) if queries is None else queries
        mixing = self.mixing if any(matrix.any() for matrix in queries) else 0.0
        n = snapshot.n_drawn or snapshot.n_train
        return [
            (columns, (1 - mixing) / n * matrix + mixing * own)
            for (columns, matrix), own in zip(super().kernels(snapshot, sampled), queries, strict=True)
        ]

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average the cosines over the snapshots; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if a matrix is singular, or not finite.
        """
        kernels = [self.solve(snapshot) for snapshot in snapshots]
        targets = []
        for snapshot, kernel in zip(snapshots, kernels, strict=True):
            forms = (compute_precision(snapshot.targets["features"]) * kernel.targets.T).sum(1, keepdim=True)
            targets.append(kernel.targets.T * _reciprocal_root(forms))

        def term(number: int, rows: range, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            kernel = kernels[number]
            features = columns["features"].to(kernel.targets)
            leverage = kernel.leverage(features, rows)
            push = columns["out_to_loss"].to(features).sign() / len(kernels)
            shrink = push * _reciprocal_root(leverage)
            return shrink[:, None] * features, push * (leverage > 0)

        yield from sum_over_snapshots(snapshots, targets, term)

    def _queries(self, snapshot: SnapshotFeatures) -> list[Tensor]:
        """Second moments of the loss gradients of the targets, a matrix a block, float64."""
        features = snapshot.targets["features"].double() * snapshot.targets["out_to_loss"].double()[:, None]
        parts = [features[:, columns] for columns in self.columns(snapshot)]
        return [part.T @ part / max(1, len(part)) for part in parts]


def _reciprocal_root(forms: Tensor) -> Tensor:
    """Of the squared length of a gradient; a gradient of zeros has the cosine zero with all others."""
    return torch.where(forms > 0, forms, torch.inf).rsqrt()
