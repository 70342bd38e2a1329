"""SOURCE on stored features: each snapshot's own curvature, without Kronecker factors and without the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float
from lightning_attr.curvature.unrolling import response
from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, compute_precision
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.kernels.feature_kernel import KernelMethod
from lightning_attr.methods.over_snapshots import sum_over_snapshots
from lightning_attr.methods.support.optimizer_forms import FORMS, OptimizerForm, check_momentum, recorded_form
from lightning_attr.methods.tracin import learning_rates
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import Projection, Projector, ScaledProjection

Eigen = list[tuple[slice, Tensor, Tensor]]
"""Columns of a kernel, its eigenvalues and, in columns, its eigenvectors."""

_EIGEN: CacheKey[Eigen] = CacheKey("eigenvectors of the kernels")


class ProjectedSOURCE(KernelMethod):
    r"""SOURCE (Bae et al., 2024) in the space of the projected gradients, each snapshot a segment of its own.

    .. math::
        \tau_{ij} = \frac1n \sum_c q_{ic} \phi_{ic}^\top e^{-T_c H_c} \frac{1 - e^{-t_c H_c}}{H_c} \psi_{jc}, \qquad
        H_c = \frac1n \sum_i w_{ic} \phi_{ic} \phi_{ic}^\top + \rho I

    with the learning rates :math:`t` that a snapshot stands for, and those after it, :math:`T`, both times
    :math:`1 / (1 - \beta)` with momentum. Every snapshot has a projection of its own. Targets are therefore seen at
    each of them as in :class:`TracIn`, where :class:`SOURCE` carries their gradient back from the last one; and what
    training has forgotten since is by the curvature there. For a linear model both are the same. Nothing is damped.
    Scores are in units of the model output.

    Args:
        projector: the projection; by default that of the store, else
            :class:`lightning_attr.projectors.KroneckerProjector`.
        curvature: "ggn", or "empirical_fisher" for :math:`w = q^2`.
        optimizer: "sgd"; "adam" for features in Adam's metric, as ``TracIn(preconditioner="adam")`` stores them;
            "auto" for what the store recorded, which has to be "sgd".
        momentum: of "sgd", in [0, 1); None for what the store recorded.
        weight_decay: :math:`\rho`; None for what the store recorded.
        per_layer: a curvature a layer; without, one for all, in which layers interact.

    Raises:
        ValueError: if an argument is none of these.

    Example:
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2), "newton_weight": torch.tensor([0.0, 4.0])}
        >>> snapshot = SnapshotFeatures.of(train, {"features": torch.ones(1, 2)})  # for a time of 1
        >>> (block,) = ProjectedSOURCE(optimizer="sgd", momentum=0.0).score([snapshot])
        >>> block.scores.flatten()                                 # 1 / 2, and (1 - exp(-2)) / 2 / 2
        tensor([0.5000, 0.2162])
    """

    def __init__(
        self,
        projector: Projector | None = None,
        curvature: str = "ggn",
        optimizer: str = "auto",
        momentum: float | None = None,
        weight_decay: float | None = None,
        per_layer: bool = False,
    ) -> None:
        super().__init__(projector, 0.0, per_layer)
        check_choice(self, "curvature", curvature, ("ggn", "empirical_fisher"))
        check_choice(self, "optimizer", optimizer, FORMS)
        self.curvature = curvature
        self.optimizer = optimizer
        self.momentum = check_momentum(self, momentum, optimizer)
        self.weight_decay = None if weight_decay is None else check_float(self, "weight_decay", weight_decay, minimum=0)

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether features are in Adam's metric."""
        return self.optimizer == "adam"

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """What a store records: features in Adam's metric are others."""
        config = super().projector_config
        return config if self.optimizer != "adam" else {"kind": "adam_preconditioned", "projector": config}

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

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the curvature of the loss in the output, or by its squared slope.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``.
        """
        return columns["newton_weight"] if self.curvature == "ggn" else columns["out_to_loss"].double().square()

    def second_directions(self, curvature: str) -> int:
        """Store one where the whole curvature has more than the model output's; see :class:`AttributionMethod`.

        Args:
            curvature: as there.

        Returns:
            How many.
        """
        return int(self.curvature == "ggn" and curvature in {"rest", "whole"})

    def beside(self, snapshot: SnapshotFeatures, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Give the second directions that are stored; see :meth:`KernelMethod.beside`.

        Args:
            snapshot: as there.
            columns: as there.

        Returns:
            Features, or None.
        """
        stored = snapshot.directions and self.second_directions(snapshot.curvature)
        return columns["second_features"].flatten(0, 1) if stored else None

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Add up over the snapshots, and average over runs; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            AttributionError: if there are no learning rates, or the optimizer is not known, or the features are not in
                its metric.
        """
        runs = [list(own) for _, own in groupby(snapshots, key=lambda snapshot: snapshot.key.rpartition("/")[0])]
        weights = [weight for own in runs for weight in self._weights(own)]
        eigen = [snapshot.cache.once(_EIGEN, partial(self._eigen, snapshot)) for snapshot in snapshots]
        targets = [
            _through(compute_precision(snapshot.targets["features"]), own, scales)
            for snapshot, own, scales in zip(snapshots, eigen, weights, strict=True)
        ]

        def term(number: int, rows: range, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            features = columns["features"].to(targets[number])
            count = snapshots[number].n_drawn or snapshots[number].n_train
            push = columns["out_to_loss"].to(features) / count / len(runs)
            own = (features * _through(features, eigen[number], weights[number])).sum(1)
            return push[:, None] * features, push * own

        yield from sum_over_snapshots(snapshots, targets, term)

    def _weights(self, run: Sequence[SnapshotFeatures]) -> list[list[Tensor]]:
        """The function of each snapshot's eigenvalues: what a push is, and what is left of it in the end."""
        name = type(self).__name__
        form = recorded_form(run[-1], name, self.optimizer, self.momentum)
        if form.form == "adam" and self.optimizer != "adam":
            raise AttributionError(
                f"Expected features in Adam's metric for a run that Adam trained, but those of plain gradients are "
                f'read. Take {name}(optimizer="adam"), whose features are others, or SOURCE(), which runs the module.'
            )
        momentum, decay = _common(form, name, run[-1]), _mean(form.weight_decay)
        decay = decay if self.weight_decay is None else self.weight_decay
        times = [rate / (1 - momentum) for rate in learning_rates(run)]
        after = [*accumulate(reversed(times[1:]), initial=0.0)][::-1]
        found = []
        for snapshot, time, later in zip(run, times, after, strict=True):
            eigen = snapshot.cache.once(_EIGEN, partial(self._eigen, snapshot))
            damped = [values + decay for _, values, _ in eigen]
            found.append([(-later * values).exp() * response(values, time) for values in damped])
        run[-1].evidence["optimizer"] = form.form
        return found

    def _eigen(self, snapshot: SnapshotFeatures) -> Eigen:
        like = compute_precision(snapshot.targets["features"])
        found = []
        for columns, kernel in self.kernels(snapshot):
            values, vectors = torch.linalg.eigh(kernel / (snapshot.n_drawn or snapshot.n_train))
            found.append((columns, values.clamp(min=0).to(like), vectors.to(like)))
        return found


def _through(features: Tensor, eigen: Eigen, weights: Sequence[Tensor]) -> Tensor:
    """Multiply with a function of each kernel, ``(b, k)``."""
    parts = [
        features[:, columns] @ vectors * own @ vectors.T
        for (columns, _, vectors), own in zip(eigen, weights, strict=True)
    ]
    return torch.cat(parts, 1)


def _common(form: OptimizerForm, method: str, snapshot: SnapshotFeatures) -> float:
    """The momentum of all parameters, which features mix."""
    found = set(form.momentum.values()) if isinstance(form.momentum, Mapping) else {form.momentum}
    if len(found) > 1 or snapshot.rates is not None:
        raise AttributionError(
            f"Expected one learning rate and one momentum for all parameters, whose gradients features mix, but the "
            f"groups of this run have their own. Take SOURCE(), which keeps parameters apart, in place of {method}."
        )
    return next(iter(found), 0.0)


def _mean(values: Mapping[str, float] | None) -> float:
    return sum(values.values()) / len(values) if values else 0.0
