"""Solvers that invert layer by layer: K-FAC, EK-FAC and DataInf."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice
from lightning_attr.curvature.fisher import GradientBatch, Labels, RepeatedPasses
from lightning_attr.curvature.kronecker_factors import KroneckerFactors, KroneckerMethod
from lightning_attr.curvature.kronecker_inverse import InverseForms, KroneckerInverse
from lightning_attr.curvature.kronecker_layout import KroneckerLayout
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.curvature.sherman_morrison import mean_of_inverses
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.solvers.base import Inverse, Prepared, Solver
from lightning_attr.methods.solvers.batch_curvature import check_outputs
from lightning_attr.methods.solvers.fisher_streams import FisherStreams
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature
from lightning_attr.projectors import IdentityProjector, Projection
from lightning_attr.randomness.streams import hashed_seed

log = logging.getLogger(__name__)

_DRAWS_AN_OUTPUT = 40
"""Draws of mixed labels, of all samples together, for each output of a layer: factors of fewer rank worse."""


@dataclass(frozen=True)
class EKFAC(Solver):
    """EK-FAC (Grosse et al., 2023): Kronecker factors of each layer, the eigenvalues measured along their eigenvectors.

    Linear layers, convolutions and the projections of attention have factors; other parameters have no influence, and
    the share of those covered is in the provenance of the result as ``parameters_covered``. Factors take two passes
    over the training set, and are kept beside the snapshot. The damping is relative to each layer's mean eigenvalue.

    Args:
        labels: "exact" for the expectation over the model's own labels, at the price of a pass a label; "mixed" for all
            labels at once with random signs, of the same expectation: one pass where there are 40 training samples to
            each output of the widest layer, and more where there are fewer; "sampled" for one label per sample and
            pass; "auto" for mixed ones of up to 16 classes, or up to 16 outputs of a regression, unless exact ones take
            no more passes, and sampled ones beyond. With ``curvature="empirical_fisher"`` they are the observed ones.
            The evidence says as ``labels`` which were taken.

    Raises:
        ValueError: if ``labels`` is none of these.

    Example:
        >>> EKFAC(labels="exact").config
        {'solver': 'ekfac', 'labels': 'exact'}
    """

    name: ClassVar[str] = "ekfac"
    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "empirical_fisher")
    usual_damping: ClassVar[float] = 0.1
    method: ClassVar[KroneckerMethod] = "ekfac"
    labels: Literal["auto", "exact", "mixed", "sampled"] = "auto"

    def __post_init__(self) -> None:
        check_choice(self, "labels", self.labels, ("auto", "exact", "mixed", "sampled"))

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Fit the factors, or read them; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: of the labels.

        Returns:
            The inverse for a damping.

        Raises:
            UnsupportedLayerError: if no layer has factors.
        """
        fitted = fit_factors(self, [curvature.model], curvature.curvature, seed)

        def inverse(damping: float) -> Inverse:
            decay = curvature.weight_decay
            own = KroneckerInverse(fitted.factors, damping=damping, method=self.method, weight_decay=decay)
            return _Kronecker(curvature, own, fitted, damping)

        return inverse


@dataclass(frozen=True)
class FittedFactors:
    """Factors, the streams of gradients at the last of their snapshots, and the labels that these are for."""

    factors: KroneckerFactors
    streams: FisherStreams
    labels: Labels


def fit_factors(solver: EKFAC, models: Sequence[SnapshotModel], curvature: str, seed: int) -> FittedFactors:
    """Fit the factors of the mean curvature over some snapshots of one run, or read them; the last one is loaded then.

    Returns the factors, kept beside the last snapshot.
    """
    model = models[-1]
    model.load()
    layout = KroneckerLayout.of(model.module, hooked=model.plan.hooked, direct=model.plan.direct)
    streams = FisherStreams(model, layout.names)
    draws = math.ceil(_DRAWS_AN_OUTPUT * max(block.rows for block in layout.blocks) / model.n_train)
    if curvature == "empirical_fisher":
        labels: Labels = "observed"
    else:
        check_outputs(model)
        labels = streams.usual_labels(draws) if solver.labels == "auto" else solver.labels

    def gradients(*number: int) -> Iterator[GradientBatch]:
        for one in models:
            one.load()
            yield from FisherStreams(one, layout.names).fisher(labels, (seed, one.key, *number), draws)

    def compute() -> dict[str, Tensor]:
        # Only labels that are sampled differ between the passes.
        factors = KroneckerFactors.fit(
            layout,
            RepeatedPasses(gradients) if labels != "sampled" else gradients,
            reduce=model.reduce,
            device=model.device,
            dtype=model.dtype,
        )
        return factors.tensors()

    drawn = seed if labels in {"mixed", "sampled"} else None
    several = [one.place.get("weights", one.key) for one in models] if len(models) > 1 else []
    digest = hashed_seed(
        labels, drawn, str(model.dtype), model.n_train, layout.parameters.digest, *layout.names, *several
    )
    shapes = KroneckerFactors.shapes(layout)
    blocks = [[name for name in shapes if name.startswith(f"{block.weight}/")] for block in layout.blocks]
    tensors = model.kept(f"kronecker-{digest:016x}", compute, shapes, optional=blocks)
    factors = KroneckerFactors.from_tensors({name: t.to(model.device) for name, t in tensors.items()}, layout)
    log.info("Kronecker factors cover %.1f%% of the parameters.", 100 * factors.layout.share)
    return FittedFactors(factors, streams, labels)


@dataclass(frozen=True)
class KFAC(EKFAC):
    """K-FAC: as :class:`EKFAC`, with products of the factors' eigenvalues (Martens and Grosse, 2015).

    Args:
        labels: as of :class:`EKFAC`.

    Example:
        >>> KFAC().config
        {'solver': 'kfac', 'labels': 'auto'}
    """

    name: ClassVar[str] = "kfac"
    method: ClassVar[KroneckerMethod] = "kfac"


class _Kronecker(Inverse):
    def __init__(
        self, curvature: TrainingCurvature, inverse: KroneckerInverse, fitted: FittedFactors, damping: float
    ) -> None:
        super().__init__(curvature)
        self.inverse = inverse
        self.streams = fitted.streams
        self.damping = damping
        self.found = {"parameters_covered": inverse.layout.share, "labels": fitted.labels}

    def solve(self, rows: Tensor) -> Tensor:
        return self.inverse.apply(rows)

    def joint(self, vectors: Tensor, powers: Sequence[int]) -> Projection | None:
        return InverseForms(self.inverse, vectors, powers)

    def quadratic_forms(self, squared: bool = True) -> tuple[Tensor, Tensor]:
        """From the factored gradients: a pass for each form, and no gradient is formed."""
        model = self.curvature.model
        forms = torch.zeros(2, model.n_train, dtype=model.dtype, device=model.device)
        for rows, batch in self.streams.batches():
            for power in (1, 2) if squared else (1,):
                stream = self.streams.outputs(batch, len(rows))
                found = self.inverse.quadratic_form(stream, len(rows), power=power)
                forms[power - 1, rows[0] : rows[-1] + 1] = found
        return forms[0], forms[1]

    def preconditioner(self) -> Product:
        """The same, but positive definite: parameters without factors are divided by the mean damped eigenvalue."""
        mean = (1 + self.damping) * self.curvature.mean_eigenvalue() + self.curvature.weight_decay
        return positive_definite(self.inverse, mean)


def positive_definite(inverse: KroneckerInverse, mean: float) -> Product:
    """Complete an inverse by dividing parameters without factors by some eigenvalue.

    Returns a function from rows ``(r, p)`` to rows ``(r, p)``.
    """
    covered = torch.zeros(inverse.layout.parameters.numel, dtype=torch.bool)
    for name in inverse.layout.names:
        covered[inverse.layout.slots[name]] = True
    return lambda rows: torch.where(covered.to(rows.device), inverse.apply(rows), rows / mean)


@dataclass(frozen=True)
class DataInf(Solver):
    """DataInf: the mean over training samples of the inverse for each, layer by layer (Kwon et al., 2024).

    Each solve goes through the gradients of all training samples, and so does self-influence for each of them: it is
    for few parameters, such as adapters. The damping is relative to each layer's mean squared gradient.

    Example:
        >>> DataInf().curvatures
        ('empirical_fisher',)
    """

    name: ClassVar[str] = "datainf"
    curvatures: ClassVar[tuple[str, ...]] = ("empirical_fisher",)
    usual_damping: ClassVar[float] = 0.1

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Add up the squared gradients of each layer; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: not used.

        Returns:
            The inverse for a damping.

        Raises:
            ValueError: for a damping of zero without weight decay.
        """
        model = curvature.model
        layers = list((IdentityProjector().bind(model.layout, model.key).layers or {}).values())
        squares = torch.zeros(len(layers), dtype=torch.float64, device=model.device)
        for _, gradients, q in curvature.gradients():
            scaled = (q[:, None] * gradients).double().square().sum(0)
            squares += torch.stack([scaled[layer].mean() for layer in layers])
        means = (model.reduce(squares) / model.n_train).tolist()

        def inverse(damping: float) -> Inverse:
            if not damping + curvature.weight_decay > 0:
                raise ValueError(
                    f"Expected argument `damping` to be positive for DataInf (0.1 is usual), but got {damping}: the "
                    "inverse for one sample does not exist without."
                )
            ridges = [damping * mean + curvature.weight_decay for mean in means]
            return _MeanOfInverses(curvature, layers, ridges)

        return inverse


class _MeanOfInverses(Inverse):
    def __init__(self, curvature: TrainingCurvature, layers: Sequence[slice], ridges: Sequence[float]) -> None:
        super().__init__(curvature)
        # A layer without gradients has no influence, whatever its inverse.
        self.layers = [(layer, ridge) for layer, ridge in zip(layers, ridges, strict=True) if ridge > 0]

    def solve(self, rows: Tensor) -> Tensor:
        model = self.curvature.model
        total = torch.zeros_like(rows)
        for _, gradients, q in self.curvature.gradients():
            scaled = q[:, None] * gradients
            for layer, ridge in self.layers:
                part = mean_of_inverses(scaled[:, layer], rows[:, layer], ridge)
                total[:, layer].add_(part, alpha=len(q) / model.n_train)
        return model.reduce(total)
