r"""How :math:`(C + \lambda I)^{-1}` is applied: what a solver is, and those that factor the curvature once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.curvature.explicit import Factorisation, factor
from lightning_attr.curvature.lanczos import lanczos, spectral_inverse
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.curvature.products import dense
from lightning_attr.errors import NegativeCurvatureError
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature
from lightning_attr.projectors import MatrixProjection, Projection
from lightning_attr.randomness.streams import gaussian, hashed_seed

_TILE = 2**25
"""Numbers of the gradients that are solved for at once."""


class Inverse(ABC):
    r"""The inverse of a damped curvature, :math:`(C + \lambda I)^{-1}`.

    Args:
        curvature: the curvature; it gives the gradients of the training samples.

    Attributes:
        found: what solving has found out, as plain values.

    Example:
        >>> class Halves(Inverse):                           # an inverse of your own
        ...     def solve(self, rows):
        ...         return rows / 2
        >>> Halves(None).solve(torch.ones(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, curvature: TrainingCurvature) -> None:
        self.curvature = curvature
        self.found: dict[str, Any] = {}

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """Apply the inverse; all processes call it together, with the same rows.

        Args:
            rows: ``(r, p)``, ``r > 0``.

        Returns:
            ``(r, p)``, of the same dtype.
        """

    def joint(self, vectors: Tensor, powers: Sequence[int]) -> Projection | None:
        r"""Give a map of gradients to products with solved vectors and, after them, to quadratic forms of their own.

        Args:
            vectors: ``(r, p)``, ``r > 0``.
            powers: ``k`` of each form :math:`\nabla f_i^\top (C + \lambda I)^{-k} \nabla f_i`.

        Returns:
            The map, of ``r + len(powers)`` features; None if both together are no shorter than one after the other.
        """
        return None

    def preconditioner(self) -> Product:
        """Give something positive definite that is close to the inverse.

        Returns:
            A function from rows ``(r, p)`` to rows ``(r, p)``.
        """
        return self.solve

    def quadratic_forms(self, squared: bool = True) -> tuple[Tensor, Tensor]:
        r"""Compute what self-influence and RelatIF need of every training sample, from its own gradient.

        Unless there is a shorter way, that is a solve a training sample: all processes solve for the same samples, each
        contributes the gradients that it has.

        Args:
            squared: whether the second is wanted; it may be zeros otherwise.

        Returns:
            :math:`\nabla f_i^\top (C + \lambda I)^{-1} \nabla f_i` and :math:`|(C + \lambda I)^{-1} \nabla f_i|^2`,
            ``(n_train,)`` each; right at least for the samples of this process.
        """
        curvature, model = self.curvature, self.curvature.model
        forms = torch.zeros(2, model.n_train, dtype=model.dtype, device=model.device)
        height = max(1, min(256, _TILE // curvature.size))
        blocks = curvature.gradients()
        rows, gradients = range(0), torch.empty(0)
        for start in range(0, model.n_train, height):
            stop = min(start + height, model.n_train)
            tile = torch.zeros(stop - start, curvature.size, dtype=model.dtype, device=model.device)
            while True:
                part = range(max(rows.start, start), min(rows.stop, stop))
                if part:
                    own = slice(part.start - rows.start, part.stop - rows.start)
                    tile[part.start - start : part.stop - start] = gradients[own]
                if rows.stop >= stop or (following := next(blocks, None)) is None:
                    break
                rows, gradients = following[:2]
            forms[:, start:stop] = self.forms(model.reduce(tile), squared)
        return forms[0], forms[1]

    def forms(self, rows: Tensor, squared: bool) -> Tensor:
        r"""Compute :math:`v^\top (C + \lambda I)^{-1} v` and :math:`|(C + \lambda I)^{-1} v|^2` of some vectors.

        Args:
            rows: ``(r, p)``.
            squared: whether the second is wanted; it may be zeros otherwise.

        Returns:
            ``(2, r)``.
        """
        solved = self.solve(rows)
        return torch.stack([(rows * solved).sum(1), solved.square().sum(1)])


Prepared: TypeAlias = Callable[[float], Inverse]
"""Gives the inverse for a damping in units of the mean eigenvalue; what costs most is done, and serves all of them."""


class Solver(ABC):
    """Settings of a solver: a frozen dataclass.

    Attributes:
        name: how :class:`lightning_attr.methods.Influence` calls it.
        curvatures: those it can invert; the first is its default.
        usual_damping: the default damping. That of a whole matrix is large, because most directions have almost no
            curvature and pull the mean down: on a small MLP, conjugate gradients predicted retraining best with 10.

    Example:
        >>> Explicit().config
        {'solver': 'explicit', 'max_parameters': 20000}
    """

    name: ClassVar[str]
    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "hessian", "empirical_fisher")
    usual_damping: ClassVar[float] = 10.0

    @abstractmethod
    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Do what does not depend on the damping.

        Args:
            curvature: of the training objective at a snapshot.
            seed: of random draws.

        Returns:
            A function from the damping to the inverse.
        """

    @property
    def config(self) -> dict[str, Any]:
        """Name and settings, as plain values."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {name: value.config if isinstance(value, Solver) else value for name, value in settings.items()}
        return {"solver": self.name, **plain}


class _Factored(Inverse):
    def __init__(self, curvature: TrainingCurvature, factors: Factorisation, found: dict[str, Any]) -> None:
        super().__init__(curvature)
        self.factors = factors
        self.found = found

    def solve(self, rows: Tensor) -> Tensor:
        return self.factors.solve(rows)

    def forms(self, rows: Tensor, squared: bool) -> Tensor:
        if squared:
            return super().forms(rows, squared)
        first = self.factors.form(rows)
        return torch.stack([first, torch.zeros_like(first)])


def absolute_damping(curvature: TrainingCurvature, damping: float) -> float:
    r"""Turn a relative damping into :math:`\lambda = \lambda_{rel} \operatorname{tr}(C) / p`.

    Returns what is added to the diagonal.
    """
    if damping == 0:
        return 0.0
    mean = curvature.mean_eigenvalue()
    if mean < 0:
        raise NegativeCurvatureError(
            f"The mean eigenvalue of the Hessian is negative ({mean:.3g}), so that damping in units of it makes no "
            "sense: this is no minimum. Use `curvature='ggn'`."
        )
    return damping * mean


@dataclass(frozen=True)
class Explicit(Solver):
    """The matrix, written out and factored in float64.

    It takes ``p`` products for the GGN and the Hessian, and about ``24 p ** 2`` bytes; ``4 p ** 2`` stay beside the
    snapshot, so that a later run need not compute it again.

    Args:
        max_parameters: with more it is refused; 20,000 take 10 GB.

    Example:
        >>> Explicit(max_parameters=1000).config
        {'solver': 'explicit', 'max_parameters': 1000}
    """

    name: ClassVar[str] = "explicit"
    max_parameters: int = 20_000

    def __post_init__(self) -> None:
        check_int(self, "max_parameters", self.max_parameters, minimum=1)

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Write the matrix out; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: not used.

        Returns:
            Factors it for a damping.

        Raises:
            ValueError: if there are too many parameters, or, for a damping, if the matrix is singular.
        """
        p, model = curvature.size, curvature.model
        if p > self.max_parameters:
            raise ValueError(
                f"Expected at most {self.max_parameters:,} parameters for the explicit solver, but the module has "
                f"{p:,}, whose curvature takes about {24 * p**2 / 1e9:,.0f} GB. Use `solver='ekfac'` or 'cg', freeze "
                "parameters, or raise `max_parameters`."
            )

        def compute() -> dict[str, Tensor]:
            if curvature.curvature == "empirical_fisher":
                return {"matrix": self._gram(curvature)}
            return {"matrix": dense(curvature.product, p, model.dtype, model.device)}

        digest = hashed_seed(curvature.curvature, curvature.weight_decay, str(model.dtype), model.n_train)
        matrix = model.kept(f"curvature-{digest:016x}", compute, {"matrix": (p, p)})["matrix"].to(model.device)
        curvature.write(matrix)

        def inverse(damping: float) -> Inverse:
            absolute = absolute_damping(curvature, damping)
            factored = factor(matrix, absolute, definite=curvature.curvature != "hessian")
            found = {"damping": absolute, "negative_eigenvalues": factored.negative_eigenvalues}
            return _Factored(curvature, factored, found)

        return inverse

    def _gram(self, curvature: TrainingCurvature) -> Tensor:
        model = curvature.model
        gram = torch.zeros(curvature.size, curvature.size, dtype=torch.float64, device=model.device)
        for _, gradients, q in curvature.gradients():
            rows = (q[:, None] * gradients).double()
            gram.addmm_(rows.T, rows)
        gram = model.reduce(gram).div_(model.n_train)
        gram.diagonal().add_(curvature.weight_decay)
        return gram.to(model.dtype)


@dataclass(frozen=True)
class Arnoldi(Solver):
    """The eigenvectors of the largest eigenvalues, by Lanczos (Schioppa et al., 2022).

    All other directions are dropped, although it is in them that the inverse is largest.

    Args:
        iterations: products with the curvature, for one vector.
        rank: eigenvectors to keep.

    Raises:
        ValueError: if ``rank`` is not positive.

    Example:
        >>> Arnoldi(iterations=50, rank=10).config
        {'solver': 'arnoldi', 'iterations': 50, 'rank': 10}
    """

    name: ClassVar[str] = "arnoldi"
    iterations: int = 200
    rank: int = 100

    def __post_init__(self) -> None:
        check_int(self, "iterations", self.iterations, minimum=1)
        check_int(self, "rank", self.rank, minimum=1)

    def prepare(self, curvature: TrainingCurvature, seed: int) -> Prepared:
        """Find the eigenvectors; see :meth:`Solver.prepare`.

        Args:
            curvature: the curvature.
            seed: of the vector it starts from.

        Returns:
            The inverse on them, for a damping.
        """
        model = curvature.model
        start = gaussian((curvature.size,), seed, "arnoldi").to(device=model.device, dtype=model.dtype)
        values, vectors = lanczos(curvature.product, start, self.iterations)
        values, vectors = values[: self.rank], vectors[: self.rank]
        return lambda damping: _Spectral(curvature, values, vectors, absolute_damping(curvature, damping))


class _Spectral(Inverse):
    def __init__(self, curvature: TrainingCurvature, values: Tensor, vectors: Tensor, absolute: float) -> None:
        super().__init__(curvature)
        self.inverse = spectral_inverse(values, vectors, absolute)
        self.vectors = vectors
        negative = int((values < 0).sum())
        self.found = {"damping": absolute, "eigenvectors": len(values), "negative_eigenvalues": negative}

    def solve(self, rows: Tensor) -> Tensor:
        return self.inverse(rows)

    def quadratic_forms(self, squared: bool = True) -> tuple[Tensor, Tensor]:
        """From the coordinates of each gradient in the eigenvectors: one pass."""
        model = self.curvature.model
        forms = torch.zeros(2, model.n_train, dtype=model.dtype, device=model.device)
        weights = (self.inverse(self.vectors) * self.vectors).sum(1)
        projection = MatrixProjection(model.layout, self.vectors)
        for rows, columns in model.train(projection):
            squares = columns["features"].square()
            forms[:, rows.start : rows.stop] = torch.stack([squares @ weights, squares @ weights.square()])
        return forms[0], forms[1]
