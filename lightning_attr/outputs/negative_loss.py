"""The loss itself, for whatever is no function of a margin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_callable
from lightning_attr.arguments.messages import argument_message
from lightning_attr.outputs.base import ModelOutput


class NegativeLoss(ModelOutput):
    r"""The negative loss itself, :math:`f = -\ell`, :math:`q = 1`: right for every loss of one value per sample.

    Use it when the loss is no function of a margin (label smoothing, several terms, sequences, masks).

    Args:
        loss_fn: ``(outputs, targets) -> (b,)``, without reduction over samples.

    Raises:
        TypeError: if ``loss_fn`` is not callable.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> smooth = NegativeLoss(lambda s, y: cross_entropy(s, y, reduction="none", label_smoothing=0.1))
        >>> smooth.output(torch.zeros(1, 2), torch.tensor([0]))
        tensor([-0.6931])
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        expected = "a function (outputs, targets) -> one loss a sample"
        check_callable(self, "loss_fn", loss_fn, expected)
        if inspect.isclass(loss_fn):
            remedy = f"Pass an object of it, such as `{loss_fn.__name__}(reduction='none')`."
            raise TypeError(argument_message(self, "loss_fn", expected, loss_fn, remedy))
        self.loss_fn = loss_fn

    def output(self, outputs: Any, targets: Any) -> Tensor:
        """Negative loss, ``(b,)``; arguments as ``loss_fn`` takes them."""
        return -self.loss(outputs, targets)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Loss of each sample.

        Args:
            outputs: as ``loss_fn`` takes them.
            targets: as ``loss_fn`` takes them.

        Returns:
            The loss, float, ``(b,)``.

        Raises:
            ValueError: if ``loss_fn`` reduces over the samples.
        """
        loss = self.loss_fn(outputs, targets)
        if loss.ndim != 1:
            raise ValueError(
                f"Expected `loss_fn` of NegativeLoss to return one loss a sample, of shape (b,), but got shape "
                f"{tuple(loss.shape)}. Use reduction='none' and average over everything but the batch."
            )
        return loss

    def out_to_loss(self, outputs: Any, targets: Any) -> Tensor:
        """One for every sample, ``(b,)``; arguments as ``loss_fn`` takes them."""
        return torch.ones_like(self.loss(outputs, targets))
