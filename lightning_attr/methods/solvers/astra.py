"""ASTRA: the solution of EK-FAC, refined against the curvature of random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float, check_instance, check_int
from lightning_attr.curvature.conjugate_gradient import conjugate_gradient
from lightning_attr.curvature.kronecker_inverse import KroneckerInverse
from lightning_attr.curvature.parameter_vectors import Product, row_dots
from lightning_attr.errors import DivergenceError
from lightning_attr.methods.solvers.base import Inverse, Prepared, Solver, absolute_damping
from lightning_attr.methods.solvers.layerwise import EKFAC, fit_factors, positive_definite
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature

_LEAST = 0.01
"""Damping of the preconditioner: its factors may be singular where the curvature is not."""
_GROWTH = 1e3
"""Residuals so many times the right-hand side are those of a descent that diverges."""


@dataclass(frozen=True)
class Astra(Solver):
    r"""ASTRA (Wang et al., 2025): from the inverse of EK-FAC, some steps towards that of the curvature, on batches.

    Both inverses have the same :math:`\lambda`, a multiple of the curvature's mean eigenvalue. With the preconditioner
    :math:`P`, the curvature :math:`C_B` of a batch and :math:`x_0 = P v`, "cg" takes steps of conjugate gradients for
    :math:`(C_B + \lambda I) x = v` on one batch, and "sgd" takes

    .. math:: u \leftarrow \mu u + P ((C_B + \lambda I) x - v), \qquad x \leftarrow x - \alpha u

    on a fresh batch each step. All targets have the same batches, so that scores do not hang on which of them are
    solved together. A step is a product with the curvature of ``batch_size`` samples: about three training steps on
    them, for each target, in place of three epochs. Self-influence takes as much for each training sample, unless
    ``self_influence="ekfac"``.

    Args:
        refinement: "cg" or "sgd".
        steps: of the refinement.
        batch_size: samples of a batch, drawn by hashed seeds; more than there are means all.
        learning_rate: :math:`\alpha`, of "sgd".
        momentum: :math:`\mu`, of "sgd".
        preconditioner: :class:`~lightning_attr.methods.EKFAC` or :class:`~lightning_attr.methods.KFAC`.

    Raises:
        TypeError: if the preconditioner is neither.
        ValueError: if an argument is out of range.

    Example:
        >>> Astra(steps=10).config["batch_size"]
        256
    """

    name: ClassVar[str] = "astra"
    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "empirical_fisher")
    refinement: Literal["cg", "sgd"] = "cg"
    steps: int = 20
    batch_size: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9
    preconditioner: EKFAC = field(default_factory=EKFAC)

    def __post_init__(self) -> None:
        check_choice(self, "refinement", self.refinement, ("cg", "sgd"))
        check_int(self, "steps", self.steps, minimum=1)
        check_int(self, "batch_size", self.batch_size, minimum=1)
        check_float(self, "learning_rate", self.learning_rate, above=0)
        check_float(self, "momentum", self.momentum, minimum=0, below=1)
        check_instance(self, "preconditioner", self.preconditioner, EKFAC, "`EKFAC()` or `KFAC()`")

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Prepare the preconditioner; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: of the batches, and of the preconditioner.

        Returns:
            The solver for a damping.
        """
        fitted = fit_factors(self.preconditioner, [curvature.model], curvature.curvature, seed)

        def inverse(damping: float) -> Inverse:
            absolute = absolute_damping(curvature, damping)
            ridge = curvature.weight_decay + absolute_damping(curvature, max(damping, _LEAST))
            own = KroneckerInverse(fitted.factors, damping=0.0, method=self.preconditioner.method, weight_decay=ridge)
            close = positive_definite(own, curvature.mean_eigenvalue() + ridge)
            return _Refined(curvature, self, absolute, close, seed)

        return inverse


class _Refined(Inverse):
    def __init__(
        self, curvature: TrainingCurvature, settings: Astra, absolute: float, preconditioner: Product, seed: int
    ) -> None:
        super().__init__(curvature)
        self.settings = settings
        self.absolute = absolute
        self.close = preconditioner
        self.seed = seed
        self._first: Product | None = None
        self.found = {"damping": absolute, "batch_size": min(settings.batch_size, curvature.model.n_train)}

    def solve(self, rows: Tensor) -> Tensor:
        start = self.close(rows)
        return self._conjugate(start, rows) if self.settings.refinement == "cg" else self._descend(start, rows)

    def preconditioner(self) -> Product:
        """The one that it starts from: what changes with the batch is no fixed map."""
        return self.close

    def _batch(self, number: int) -> Product:
        """Damped products with the curvature of one batch."""
        product = self.curvature.batch_product(self.settings.batch_size, self.seed, "astra", number)
        return lambda v: product(v).add_(v, alpha=self.absolute)

    def _conjugate(self, start: Tensor, rows: Tensor) -> Tensor:
        self._first = self._first or self._batch(0)
        product, steps = self._first, self.settings.steps
        left = rows - product(start)
        return (
            start
            + conjugate_gradient(product, left, tolerance=0.0, max_iterations=steps, preconditioner=self.close).values
        )

    def _descend(self, start: Tensor, rows: Tensor) -> Tensor:
        settings = self.settings
        return momentum_descent(
            self._batch, start, rows, self.close, settings.steps, settings.learning_rate, settings.momentum
        )


def momentum_descent(
    batch: Callable[[int], Product],
    start: Tensor,
    rhs: Tensor,
    preconditioner: Product,
    steps: int,
    learning_rate: float,
    momentum: float,
) -> Tensor:
    """Descend towards the solution of a system that each step sees by another batch.

    Shapes: start (r, p), rhs (r, p). Returns ``(r, p)``.

    Example:
        >>> twice = lambda number: lambda rows: 2 * rows
        >>> momentum_descent(twice, torch.zeros(1, 1), torch.ones(1, 1), lambda rows: rows, 60, 0.5, 0.1)
        tensor([[0.5000]])
    """
    solution, velocity = start.clone(), torch.zeros_like(start)
    bound = _GROWTH * row_dots(rhs, rhs).sqrt()
    for step in range(steps):
        left = batch(step)(solution).sub_(rhs)
        if not (row_dots(left, left).sqrt() <= bound).all():
            raise DivergenceError(
                f"The descent of Astra diverges: after {step} steps more than {_GROWTH:g} times the right-hand side is "
                f"left. Lower `learning_rate` (now {learning_rate:g}), raise `batch_size` or the damping, or take "
                '`refinement="cg"`.'
            )
        velocity.mul_(momentum).add_(preconditioner(left))
        solution.sub_(velocity, alpha=learning_rate)
    return solution
