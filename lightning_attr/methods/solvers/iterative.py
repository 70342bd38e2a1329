"""Solvers that know the curvature by its products with the whole training set alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_instance, check_int
from lightning_attr.curvature.conjugate_gradient import conjugate_gradient
from lightning_attr.curvature.lanczos import largest_eigenvalue
from lightning_attr.curvature.lissa import lissa, lissa_iterations
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.methods.solvers.base import Inverse, Prepared, Solver, absolute_damping
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature

log = logging.getLogger(__name__)

_LEAST = 0.01
"""Damping of a preconditioner: its factors may be singular where the curvature is not."""


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients against the whole training objective, for all targets at once.

    A target takes up to ``max_iterations`` products with the curvature of all training samples, each of which costs
    about three training steps on it. Self-influence takes as much for each training sample.

    Args:
        max_iterations: where to stop at the latest; what is left then is logged.
        tolerance: a target is solved when the norm of its residual is at most this share of its own.
        preconditioner: :class:`~lightning_attr.methods.EKFAC` or :class:`~lightning_attr.methods.KFAC`, with which few
            iterations do; None for none.

    Example:
        >>> ConjugateGradient(max_iterations=10).config["max_iterations"]
        10
    """

    name: ClassVar[str] = "cg"
    max_iterations: int = 100
    tolerance: float = 1e-5
    preconditioner: Solver | None = None

    def __post_init__(self) -> None:
        check_int(self, "max_iterations", self.max_iterations, minimum=1)
        check_float(self, "tolerance", self.tolerance, minimum=0)
        if self.preconditioner is not None:
            check_instance(self, "preconditioner", self.preconditioner, Solver, "a Solver such as `EKFAC()`, or None")

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Prepare the preconditioner, if there is one; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: of the preconditioner.

        Returns:
            The solver for a damping.
        """
        preconditioner = None if self.preconditioner is None else self.preconditioner.prepare(curvature, seed)

        def inverse(damping: float) -> Inverse:
            absolute = absolute_damping(curvature, damping)
            close = None if preconditioner is None else preconditioner(max(damping, _LEAST)).preconditioner()
            return _Descending(curvature, self, absolute, close)

        return inverse


class _Descending(Inverse):
    def __init__(
        self, curvature: TrainingCurvature, settings: ConjugateGradient, absolute: float, preconditioner: Product | None
    ) -> None:
        super().__init__(curvature)
        self.settings = settings
        self.absolute = absolute
        self.close = preconditioner
        self.found = {"damping": absolute, "iterations": 0, "residual": 0.0}

    def solve(self, rows: Tensor) -> Tensor:
        solution = conjugate_gradient(
            lambda v: self.curvature.product(v).add_(v, alpha=self.absolute),
            rows,
            tolerance=self.settings.tolerance,
            max_iterations=self.settings.max_iterations,
            preconditioner=self.close,
        )
        _note_residual(self.found, solution.residuals.max().item(), self.settings.tolerance, "max_iterations")
        self.found["iterations"] = max(self.found["iterations"], int(solution.iterations.max()))
        return solution.values


def _note_residual(found: dict[str, Any], residual: float, tolerance: float, remedy: str) -> None:
    """Keep the largest, and say so once if it is too large."""
    if residual > 10 * tolerance and found["residual"] <= 10 * tolerance:
        log.warning(
            "A system is not solved: %.2g of its right-hand side is left. Raise `%s` or the damping; without, the "
            "scores are those of a stronger damping.",
            residual,
            remedy,
        )
    found["residual"] = max(found["residual"], residual)


@dataclass(frozen=True)
class LiSSA(Solver):
    r"""A Neumann series against the whole training objective, or against random batches of it (Koh and Liang, 2017).

    It needs :math:`5 s / \lambda` steps for an error of :math:`e^{-5}`, many more than conjugate gradients; what is
    left is logged.

    Args:
        scale: ``s``; by default 1.1 times the largest eigenvalue, twice it with batches.
        iterations: steps; by default :math:`5 s / \lambda`, at most 5000.
        batch_size: samples of a step, drawn by hashed seeds; None for all.
        repeats: estimates to average, with batches.

    Raises:
        ValueError: if ``batch_size`` is not positive.

    Example:
        >>> LiSSA(iterations=1000).config["scale"] is None
        True
    """

    name: ClassVar[str] = "lissa"
    scale: float | None = None
    iterations: int | None = None
    batch_size: int | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_float(self, "scale", self.scale, above=0, also="None")
        if self.iterations is not None:
            check_int(self, "iterations", self.iterations, minimum=1, also="None")
        if self.batch_size is not None:
            check_int(self, "batch_size", self.batch_size, minimum=1, also="None")
        check_int(self, "repeats", self.repeats, minimum=1)

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Find the largest eigenvalue, if no scale is given; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: of the batches.

        Returns:
            The solver for a damping.
        """
        model = curvature.model
        highest = 0.0
        if self.scale is None:
            highest = largest_eigenvalue(
                curvature.product, curvature.size, seed=seed, dtype=model.dtype, device=model.device
            )

        def inverse(damping: float) -> Inverse:
            absolute = absolute_damping(curvature, damping)
            margin = 1.1 if self.batch_size is None else 2.0
            scale = self.scale or margin * (abs(highest) + absolute)
            return _Summing(curvature, self, absolute, scale, seed)

        return inverse


class _Summing(Inverse):
    def __init__(self, curvature: TrainingCurvature, settings: LiSSA, absolute: float, scale: float, seed: int) -> None:
        super().__init__(curvature)
        self.settings = settings
        self.absolute = absolute
        self.scale = scale
        self.seed = seed
        steps = settings.iterations or lissa_iterations(scale, absolute)
        self.found = {"damping": absolute, "scale": scale, "iterations": steps, "residual": 0.0}

    def solve(self, rows: Tensor) -> Tensor:
        settings, steps = self.settings, 0

        def product(v: Tensor) -> Tensor:
            nonlocal steps
            if settings.batch_size is None:
                return self.curvature.product(v)
            steps += 1  # the same batches for every tile of targets
            return self.curvature.sampled_product(v, settings.batch_size, self.seed, "lissa", steps)

        solved = lissa(
            product,
            rows,
            scale=self.scale,
            damping=self.absolute,
            iterations=settings.iterations,
            repeats=settings.repeats if settings.batch_size is not None else 1,
        )
        left = self.curvature.product(solved).add_(solved, alpha=self.absolute).sub_(rows)
        norms = rows.double().norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
        _note_residual(self.found, (left.double().norm(dim=1) / norms).max().item(), 0.01, "iterations")
        return solved
