"""TracIn: inner products of gradients, added up over the snapshots of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_flag, check_float
from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, compute_precision
from lightning_attr.methods.over_snapshots import sum_over_snapshots
from lightning_attr.methods.support.rate_weights import column_scales, relative_rates
from lightning_attr.methods.support.whole_gradients import exact_sum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import Projection, Projector, ScaledProjection

_WEIGHTS = ("integrated", "lr", "uniform")


class TracIn(AttributionMethod):
    r"""TracInCP (Pruthi et al., 2020): what gradient descent on a sample alone would have changed, step by step.

    .. math::
        S_{ij} = -\sum_c \omega_c \nabla\ell_i(\theta_c) \cdot \nabla f_j(\theta_c), \qquad
        \omega_c = \tfrac1n \sum_{t \in c} \eta_t,

    with the learning rates of the optimizer steps that snapshot ``c`` stands for: a step visits one of ``n`` samples
    with probability ``b/n``, and weighs it ``1/b``. Of several merged runs it is the mean. Where parameter groups have
    learning rates of their own, the products of each parameter's gradients are weighed by its own; frozen parameters
    do not count. To first order in the learning rate, and for plain SGD, that is the change of the output by leaving a
    sample out; momentum multiplies all scores by about the same.

    Scores are in units of the model output with ``weights="integrated"`` and without ``normalize``; else rank-only.

    With ``exact=True``, nothing is projected and nothing stored: the module runs at each snapshot, and gradients are
    multiplied as they come, those of linear layers by their factors, see
    :class:`lightning_attr.projectors.GradientFactors`. Scores of several snapshots are added up in memory.

    Args:
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector`. With
            :class:`lightning_attr.projectors.IdentityProjector` it is exact; a
            :class:`lightning_attr.projectors.LayerSubset` looks at some layers only.
        weights: :math:`\omega_c`. "integrated" as above; "lr" without the ``1/n``, as published; "uniform" for ones; or
            one number per snapshot.
        preconditioner: "adam" for :math:`\nabla\ell_i^\top D \nabla f_j` with :math:`D = 1 / (\sqrt{\hat v} +
            \epsilon)`, the scale that Adam gave each entry at the snapshot. Each side gets :math:`D^{1/2}`, so that
            self-influence is a norm.
        normalize: cosines in place of inner products: True for those of the whole gradient, "layer" for the mean of
            those of each layer.
        exact: whole gradients in place of projected ones.

    Raises:
        ValueError: if an argument is none of these, or ``exact`` comes with a projector or a preconditioner.

    Example:
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> snapshot = SnapshotFeatures.of(train, {"features": torch.tensor([[2.0, 0.0]])})  # learning rate 1
        >>> (block,) = TracIn().score([snapshot, snapshot])
        >>> block.scores.flatten(), block.self_influence
        (tensor([1., 6.]), tensor([ 0.5000, 25.0000]))
    """

    def __init__(
        self,
        projector: Projector | None = None,
        weights: str | Sequence[float] = "integrated",
        preconditioner: str | None = None,
        normalize: bool | str = False,
        exact: bool = False,
    ) -> None:
        several = isinstance(weights, (Sequence, Tensor, np.ndarray)) and not isinstance(weights, (str, bytes))
        if several and len(weights):
            weights = [check_float(self, f"weights[{i}]", weight) for i, weight in enumerate(weights)]
        else:
            check_choice(self, "weights", weights, _WEIGHTS, also="a list of one finite number a snapshot")
        check_choice(self, "preconditioner", preconditioner, ("adam", None))
        check_choice(self, "normalize", normalize, (True, False, "layer"))
        if check_flag(self, "exact", exact) and (projector is not None or preconditioner is not None):
            raise ValueError(
                "Expected argument `exact` to come without `projector` and `preconditioner`, which it would ignore. "
                "Take `projector=IdentityProjector()` for whole gradients in Adam's metric."
            )
        super().__init__(projector)
        if exact:
            self.projector = None
        self.exact = exact
        self.weights = weights if isinstance(weights, str) else list(weights)
        self.preconditioner = preconditioner
        self.normalize = normalize
        self.scale = "measurement" if weights == "integrated" and not normalize else "rank_only"

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether there is a preconditioner."""
        return self.preconditioner is not None

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """What a store records: features with a preconditioner are others."""
        config = super().projector_config
        return config if self.preconditioner is None else {"kind": "adam_preconditioned", "projector": config}

    def precondition(self, projection: Projection, layout: ParameterLayout, state: OptimizerState) -> Projection:
        """Scale gradients by the root of Adam's scale; see :meth:`AttributionMethod.precondition`.

        Args:
            projection: of the scaled gradients.
            layout: the parameters.
            state: the optimizer's.

        Returns:
            The map.
        """
        scales = {name: moments.preconditioner().sqrt() for name, moments in state.moments.items()}
        return ScaledProjection(projection, layout, scales)

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Add up over the snapshots; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            AttributionError: if the snapshots have no learning rates, and are to be weighed by them.
            ValueError: if there are more or fewer ``weights`` than snapshots, or the features mix the layers that are
                to be normalized.
        """
        omegas = self._omegas(snapshots)
        rated = self.weights in ("integrated", "lr")
        if self.exact:
            rates = [relative_rates(snapshot) if rated else None for snapshot in snapshots]
            yield from exact_sum(snapshots, omegas, self.normalize, rates)
            return
        layers = [self._layers(snapshot) for snapshot in snapshots]
        scales = [column_scales(snapshot, type(self).__name__) if rated else None for snapshot in snapshots]
        targets = [
            omega * self._scaled(compute_precision(snapshot.targets["features"]), own, scale)
            for snapshot, omega, own, scale in zip(snapshots, omegas, layers, scales, strict=True)
        ]  # (m, k)

        def term(number: int, rows: range, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            features = columns["features"].to(targets[number])  # (b, k)
            features = self._scaled(features, layers[number], scales[number])
            q = columns["out_to_loss"].to(targets[number])
            q = q.sign() if self.normalize else q
            return q[:, None] * features, omegas[number] * q * features.square().sum(1)

        yield from sum_over_snapshots(snapshots, targets, term)

    def _omegas(self, snapshots: Sequence[SnapshotFeatures]) -> list[float]:
        if isinstance(self.weights, list):
            if len(self.weights) != len(snapshots):
                raise ValueError(
                    f"Expected argument `weights` to have one number for each of the {len(snapshots)} snapshots, but "
                    f"got {len(self.weights)}."
                )
            return self.weights
        if self.weights == "uniform":
            return [1.0] * len(snapshots)
        rates = learning_rates(snapshots)
        if self.weights == "lr":
            return rates
        if snapshots[0].n_train < 1:
            raise ValueError(
                'Expected snapshots with `n_train`, the number of training samples, for `weights="integrated"`, but '
                "got 0. Use SnapshotFeatures(..., n_train=...), or other `weights`."
            )
        return [rate / (snapshots[0].n_drawn or snapshots[0].n_train) for rate in rates]

    def _layers(self, snapshot: SnapshotFeatures) -> Sequence[slice]:
        """Columns that are normalized together."""
        if self.normalize != "layer":
            return [slice(None)]
        if snapshot.layers is None:
            raise ValueError(
                f"Expected features that keep the layers apart to normalize each, but {type(self.projector).__name__} "
                "mixes them. Use KroneckerProjector or IdentityProjector, or normalize the whole."
            )
        return list(snapshot.layers.values())

    def _scaled(self, features: Tensor, layers: Sequence[slice], scales: Tensor | None) -> Tensor:
        """Weigh columns by learning rates and normalize; cosines of layers are weighed when they are cosines."""
        if scales is not None and self.normalize != "layer":
            features = features * scales.to(features)
        features = unit_rows(features, layers) if self.normalize else features
        return features * scales.to(features) if scales is not None and self.normalize == "layer" else features


class GAS(TracIn):
    r"""Gradient aggregated similarity (Hammoudeh and Lowd, 2022): TracIn with cosines.

    .. math::
        S_{ij} = -\sum_c \omega_c \cos(\nabla\ell_i(\theta_c), \nabla f_j(\theta_c))

    Every snapshot counts the same whatever the size of its gradients, and no sample counts for its large loss alone.
    Scores are rank-only, and self-influence is constant up to its sign.

    Args:
        projector: as in :class:`TracIn`.
        weights: as in :class:`TracIn`.
        preconditioner: as in :class:`TracIn`.
        layerwise: the mean of the cosines of the layers in place of that of the whole gradient; the projector has to
            keep layers apart.
        exact: as in :class:`TracIn`.

    Example:
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> snapshot = SnapshotFeatures.of(train, {"features": torch.tensor([[2.0, 0.0]])})
        >>> [block.scores.flatten() for block in GAS(weights="lr").score([snapshot])]
        [tensor([1.0000, 0.6000])]
    """

    def __init__(
        self,
        projector: Projector | None = None,
        weights: str | Sequence[float] = "integrated",
        preconditioner: str | None = None,
        layerwise: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__(
            projector, weights, preconditioner, "layer" if check_flag(self, "layerwise", layerwise) else True, exact
        )


def learning_rates(snapshots: Sequence[SnapshotFeatures]) -> list[float]:
    """Give the learning rate of each snapshot, summed over the steps it stands for, over the number of runs.

    Returns one number a snapshot.
    """
    runs: dict[str, float] = {}
    for snapshot in snapshots:
        run = snapshot.key.rpartition("/")[0]
        runs[run] = runs.get(run, 0.0) + snapshot.learning_rate
    for run, total in runs.items():
        if not 0 < total < math.inf:
            keys = [snapshot.key for snapshot in snapshots if snapshot.key.rpartition("/")[0] == run]
            raise AttributionError(
                f"The learning rates of the snapshots {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''} add up to "
                f"{total}: nothing was recorded while they were trained, or no optimizer step was seen. Fit with "
                "AttributionCallback and optimizers that go through Lightning (`self.optimizers()`), or use TracIn or "
                'GAS with `weights`: "uniform", or one number a snapshot.'
            )
    return [snapshot.learning_rate / len(runs) for snapshot in snapshots]


def unit_rows(features: Tensor, layers: Sequence[slice] = (slice(None),)) -> Tensor:
    """Scale each row to length one, with equal shares of all layers.

    Shapes: features (b, k). Returns ``(b, k)``; a layer of zeros stays so.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    scaled = torch.zeros_like(features)
    for columns in layers:
        scaled[:, columns] = F.normalize(features[:, columns], dim=1)
    return scaled / math.sqrt(len(layers))
