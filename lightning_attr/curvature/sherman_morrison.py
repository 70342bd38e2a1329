"""DataInf (Kwon et al., 2024): the mean of inverses in the place of the inverse of the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.curvature.parameter_vectors import checked_rows


def mean_of_inverses(gradients: Tensor, rhs: Tensor, damping: float) -> Tensor:
    r"""Apply :math:`\frac{1}{n} \sum_i (\lambda I + g_i g_i^\top)^{-1}`, each inverse by Sherman and Morrison.

    .. math::
        x = \frac{1}{\lambda} \Big(v - \frac{1}{n} \sum_i g_i \frac{\langle g_i, v \rangle}{\lambda + |g_i|^2}\Big)

    It is a mean over samples: for gradients that come in blocks, average the results, weighted by the blocks' sizes.

    Shapes: gradients (n, p), rhs (r, p). Returns ``(r, p)``, in the right-hand sides' dtype.
    """
    if not damping > 0:
        raise ValueError(f"Expected argument `damping` to be a positive number, but got {damping}.")
    checked_rows(rhs)
    if gradients.ndim != 2 or not len(gradients) or gradients.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"Expected argument `gradients` to have shape (n, {rhs.shape[1]}) with n > 0, but got "
            f"{tuple(gradients.shape)}."
        )
    if not gradients.isfinite().all():
        raise ValueError("Expected argument `gradients` to be finite, but it holds NaN or infinite values.")
    g, v = gradients.to(rhs.dtype), rhs
    weights = (len(g) * (damping + g.square().sum(1))).reciprocal()
    return torch.addmm(v, (v @ g.T) * weights, g, alpha=-1).div_(damping)


def datainf_damping(gradients: Tensor, relative: float = 0.1) -> float:
    r"""Choose the damping of a layer: a share of the mean squared gradient of a parameter.

    Shapes: gradients (n, p). Returns :math:`\lambda = \lambda_{rel} \operatorname{tr}(F) / p`, absolute; zero if all
    gradients are.
    """
    return relative * gradients.double().square().mean().item()
