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

    Args:
        gradients: g, ``(n, p)``, of one layer; float32 or float64.
        rhs: v, ``(r, p)``.
        damping: :math:`\lambda > 0`, absolute; see :func:`datainf_damping`.

    Returns:
        ``(r, p)``, in the right-hand sides' dtype.

    Raises:
        ValueError: if the damping is not positive, a shape is wrong, or something is not finite.

    Example:
        >>> g = torch.tensor([[1.0, 0.0]])
        >>> mean_of_inverses(g, torch.ones(1, 2), damping=1.0)      # (I + g g^T)^-1 (1, 1)
        tensor([[0.5000, 1.0000]])
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

    Args:
        gradients: ``(n, p)``, of one layer.
        relative: the share.

    Returns:
        :math:`\lambda = \lambda_{rel} \operatorname{tr}(F) / p`, absolute; zero if all gradients are.

    Example:
        >>> round(datainf_damping(torch.tensor([[1.0, 3.0]])), 6)
        0.5
    """
    return relative * gradients.double().square().mean().item()
