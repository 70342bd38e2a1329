"""Eigenvalues of a symmetric map that is only known by its products: Lanczos, which is Arnoldi for such maps."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.curvature.parameter_vectors import Product, applied, checked_rows
from lightning_attr.errors import NegativeCurvatureError
from lightning_attr.randomness.streams import gaussian


def lanczos(product: Product, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Compute Ritz pairs, by Lanczos with full re-orthogonalisation in two passes.

    The pairs at the ends of the spectrum come first to precision. Where the start's Krylov space ends early (as with
    eigenvalues of several dimensions), it goes on with a random vector that is orthogonal to it; ``p`` iterations are
    exact but for rounding.

    Shapes: product (1, p), start (p,). Returns eigenvalues ``(k,)``, float64, the largest absolute value first, and
    their orthonormal vectors ``(k, p)``, in the start's dtype; ``k`` is the smaller of ``iterations`` and ``p``.
    """
    if iterations < 1:
        raise ValueError(f"Expected argument `iterations` to be a positive integer, but got {iterations}.")
    if start.ndim != 1 or not start.any():
        raise ValueError(
            "Expected argument `start` to be a vector (p,) other than zero, but got "
            f"{'zeros' if start.ndim == 1 else f'shape {tuple(start.shape)}'}."
        )
    vector = checked_rows(start[None])[0]
    count = min(iterations, len(start))
    basis = start.new_empty(count, len(start))
    diagonal, beside = torch.zeros(count, dtype=torch.float64), torch.zeros(count - 1, dtype=torch.float64)
    basis[0] = vector / vector.norm()
    highest, precision = 0.0, 10 * torch.finfo(start.dtype).eps
    for i in range(count):
        image = applied(product, basis[i : i + 1])[0]
        diagonal[i] = image.double() @ basis[i].double()
        if i + 1 == count:
            break
        highest = max(highest, image.norm().item())
        rest = _orthogonal(image, basis[: i + 1])
        size = rest.norm().item()
        if size > precision * highest:
            beside[i] = size
        else:
            rest = _orthogonal(gaussian((len(start),), "lanczos", i).to(start), basis[: i + 1])
        basis[i + 1] = rest / rest.norm()
    values, rotation = torch.linalg.eigh(diagonal.diag() + beside.diag(1) + beside.diag(-1))
    order = values.abs().argsort(descending=True)
    return values[order].to(start.device), rotation[:, order].T.to(basis) @ basis


def largest_eigenvalue(
    product: Product,
    size: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Estimate the eigenvalue of largest absolute value, by power iteration.

    Shapes: product (1, p). Returns the Rayleigh quotient of the last vector, with its sign; not above the eigenvalue in
    absolute value.
    """
    if iterations < 1:
        raise ValueError(f"Expected argument `iterations` to be a positive integer, but got {iterations}.")
    vector = gaussian((1, size), seed, "power iteration").to(device=device, dtype=dtype)
    value = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm()
        image = applied(product, vector)
        value = (image.double() * vector.double()).sum().item()
        if not image.any():
            break
        vector = image
    return value


def spectral_inverse(values: Tensor, vectors: Tensor, damping: float = 0.0) -> Product:
    r"""Invert on the span of some eigenvectors (Schioppa et al., 2022).

    .. math:: v \mapsto \sum_a u_a \frac{\langle u_a, v \rangle}{\mu_a + \lambda}

    Negative eigenvalues keep their sign; what is orthogonal to all vectors is dropped, and so are directions in which
    the damped curvature is zero to rounding.

    Shapes: values (k,), vectors (k, p). Returns a function from rows ``(r, p)`` to rows ``(r, p)``.
    """
    if not damping >= 0:
        raise ValueError(f"Expected argument `damping` to be a number >= 0, but got {damping}.")
    damped = values.double() + damping
    rounding = 10 * torch.finfo(vectors.dtype).eps * damped.abs().max()
    if not (damped > rounding).any():
        raise NegativeCurvatureError(
            f"None of the {len(values)} eigenvalues that were found is positive with `damping={damping}` (the highest: "
            f"{values.max().item():.3g}). Take the GGN, which is never negative, instead of the Hessian, raise the "
            "damping, or check that the parameters are trained."
        )
    kept = damped.abs() > rounding
    span = vectors[kept.to(vectors.device)]
    weights = damped[kept].reciprocal().to(span)
    return lambda rows: ((checked_rows(rows).to(span) @ span.T) * weights @ span).to(rows.dtype)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Take away what lies in the span of the basis; twice, because once leaves rounding behind."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector
