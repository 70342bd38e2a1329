"""Predictions of real numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from lightning_attr.arguments.checks import check_float
from lightning_attr.outputs.base import ModelOutput, one_column


class Regression(ModelOutput):
    r"""The prediction itself, trained with :math:`\ell = (f - y)^2 / (2 \sigma^2)`; then :math:`q = (y - f)/\sigma^2`.

    ``torch.nn.functional.mse_loss`` has no factor one half: for a module trained with it, ``variance=0.5``. The
    variance scales all scores alike.

    Args:
        variance: :math:`\sigma^2`, in squared units of the target.

    Raises:
        ValueError: if the variance is not positive.

    Example:
        >>> import torch
        >>> Regression().out_to_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 2.0]))
        tensor([ 1., -1.])
    """

    def __init__(self, variance: float = 1.0) -> None:
        self.variance = check_float(self, "variance", variance, above=0)

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Prediction, in units of the target.

        Args:
            outputs: predictions, float, ``(b,)`` or ``(b, 1)``.
            targets: float, ``(b,)`` or ``(b, 1)``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.
        """
        return one_column("Regression", outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error over the variance, ``(b,)``; arguments as in :meth:`output`."""
        return self._residual(outputs, targets).square() / (2 * self.variance)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Signed residual ``(y - f) / variance``, ``(b,)``; arguments as in :meth:`output`."""
        return self._residual(outputs, targets) / self.variance

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``1 / variance`` for every sample, ``(b,)``; arguments as in :meth:`output`."""
        return torch.full_like(self.output(outputs, targets), 1 / self.variance)

    @property
    def curvature(self) -> str:
        """One output: its Newton weight is all."""
        return "newton"

    def distribution(self, outputs: Tensor, targets: Tensor) -> Distribution:
        """A normal distribution of the variance around the prediction; arguments as in :meth:`output`."""
        return Normal(self.output(outputs, targets).double().reshape(targets.shape), self.variance**0.5)

    def _residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        prediction = self.output(outputs, targets)
        return one_column("Regression", targets).to(prediction.dtype) - prediction
