r"""Model outputs: the scalar :math:`f(z; \theta)` of a sample that is attributed, and how the loss depends on it.

A training sample pushes the model along :math:`\nabla \ell = -q \nabla f` with :math:`q = -d\ell/df`: a direction
:math:`\nabla f`, and how hard the sample pushes, :math:`q`, which vanishes once the sample is fitted
(Park et al., 2023, TRAK, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BinaryMargin", "ModelOutput", "MulticlassMargin", "NegativeLoss", "Regression"]


class ModelOutput(ABC):
    r"""What is attributed: three batched functions of the module's outputs and targets, each sample on its own.

    The three are tied by one identity, :math:`\nabla\ell = -q \nabla f`, which
    :func:`lightning_attr.testing.check_model_output` tests for an output of your own.

    Example:
        >>> import torch
        >>> class SquaredError(ModelOutput):          # the loss itself, attributed as its negative
        ...     def loss(self, outputs, targets):
        ...         return (outputs - targets).square().mean(dim=1)
        ...     def output(self, outputs, targets):
        ...         return -self.loss(outputs, targets)
        ...     def out_to_loss(self, outputs, targets):
        ...         return torch.ones(len(outputs))
        >>> SquaredError().output(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([-1., -1.])
    """

    @abstractmethod
    def output(self, outputs: Any, targets: Any) -> Tensor:
        """Compute what is attributed; a higher value is more of the behaviour.

        Args:
            outputs: what the module returns for a batch of ``b`` samples, by default a ``(b, ...)`` float tensor.
            targets: what it is compared with.

        Returns:
            ``f``, float, of shape ``(b,)``.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the training loss of each sample, as it enters the training objective.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            The loss, float, of shape ``(b,)``.
        """

    @abstractmethod
    def out_to_loss(self, outputs: Any, targets: Any) -> Tensor:
        r"""Compute :math:`q = -d\ell/df`: how much the loss of a sample falls when its output rises.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            ``q``, float, of shape ``(b,)``; positive when a higher output lowers the loss.
        """

    def newton_weight(self, outputs: Any, targets: Any) -> Tensor:
        r"""Compute :math:`d^2\ell/df^2`, the weight of a sample in a Newton kernel.

        Where the loss is not curved in the output (``NegativeLoss``), every sample weighs one.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            Non-negative float tensor of shape ``(b,)``.
        """
        return torch.ones_like(self.out_to_loss(outputs, targets))

    def values(self, outputs: Any, targets: Any, output: Tensor) -> dict[str, Tensor]:
        """Compute all that the store keeps beside the output; an output of its own may do it at once.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.
            output: what :meth:`output` returned for them, ``(b,)``.

        Returns:
            ``loss``, ``out_to_loss`` and ``newton_weight``, each ``(b,)``.
        """
        return {
            "loss": self.loss(outputs, targets),
            "out_to_loss": self.out_to_loss(outputs, targets),
            "newton_weight": self.newton_weight(outputs, targets),
        }


class _Margin(ModelOutput):
    """Margins: the loss is ``log(1 + exp(-f))``, from which all else follows."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, ``(b,)``; arguments as in :meth:`output`."""
        return -F.logsigmoid(self.output(outputs, targets))

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probability of the other classes, in ``[0, 1]``, ``(b,)``; arguments as in :meth:`output`."""
        return torch.sigmoid(-self.output(outputs, targets))

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``p (1 - p)``, ``(b,)``; arguments as in :meth:`output`."""
        return _bernoulli_variance(self.out_to_loss(outputs, targets))

    def values(self, outputs: Any, targets: Any, output: Tensor) -> dict[str, Tensor]:
        """All of them from the margin, unless a subclass has another loss; arguments as in the base class."""
        if any(getattr(type(self), name) is not getattr(_Margin, name) for name in _DERIVED):
            return super().values(outputs, targets, output)
        q = torch.sigmoid(-output)
        return {"loss": -F.logsigmoid(output), "out_to_loss": q, "newton_weight": _bernoulli_variance(q)}


_DERIVED = ("loss", "out_to_loss", "newton_weight")


class MulticlassMargin(_Margin):
    r"""Margin of the right class, :math:`f = s_y - \log\sum_{j \neq y} e^{s_j} = \log\frac{p_y}{1-p_y}`.

    With it, the cross-entropy is :math:`\ell = \log(1 + e^{-f})` and :math:`q = 1 - p_y`
    (Park et al., 2023, TRAK, section 3.3).

    Args:
        temperature: the logits are divided by it; keep 1 unless the training loss has one.

    Raises:
        ValueError: if the temperature is not positive, or logits and labels do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> MulticlassMargin().output(logits, labels)
        tensor([ 2., -1.])
        >>> MulticlassMargin().out_to_loss(logits, labels)
        tensor([0.1192, 0.7311])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"Expected argument `temperature` to be a positive number, but got {temperature}.")
        self.temperature = temperature

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Margin of the labelled class.

        Args:
            outputs: logits, float, ``(b, c)`` with at least two classes.
            targets: labels, integer, ``(b,)``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.

        Raises:
            ValueError: if the shapes or dtypes do not fit.
        """
        _check_class_logits(outputs, targets)
        logits = _at_least_float32(outputs)
        if self.temperature != 1:
            logits = logits / self.temperature
        labels = targets.long().unsqueeze(1)
        right = logits.gather(1, labels).squeeze(1)
        return right - logits.scatter(1, labels, float("-inf")).logsumexp(1)


class BinaryMargin(_Margin):
    r"""Signed logit of a binary classifier with one output: :math:`f = (2y - 1) s`, :math:`\ell = \log(1 + e^{-f})`.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([2.0, 2.0]), torch.tensor([1, 0])
        >>> BinaryMargin().output(logits, labels)
        tensor([ 2., -2.])
        >>> BinaryMargin().out_to_loss(logits, labels)
        tensor([0.1192, 0.8808])
    """

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logit with the sign of the label.

        Args:
            outputs: logits, float, ``(b,)`` or ``(b, 1)``.
            targets: labels in {0, 1}, integer, bool or float, ``(b,)`` or ``(b, 1)``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.
        """
        logits = _one_column("BinaryMargin", outputs)
        return (2 * _one_column("BinaryMargin", targets).to(logits.dtype) - 1) * logits


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
        if not variance > 0:
            raise ValueError(f"Expected argument `variance` to be a positive number, but got {variance}.")
        self.variance = variance

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Prediction, in units of the target.

        Args:
            outputs: predictions, float, ``(b,)`` or ``(b, 1)``.
            targets: float, ``(b,)`` or ``(b, 1)``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.
        """
        return _one_column("Regression", outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error over the variance, ``(b,)``; arguments as in :meth:`output`."""
        return self._residual(outputs, targets).square() / (2 * self.variance)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Signed residual ``(y - f) / variance``, ``(b,)``; arguments as in :meth:`output`."""
        return self._residual(outputs, targets) / self.variance

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``1 / variance`` for every sample, ``(b,)``; arguments as in :meth:`output`."""
        return torch.full_like(self.output(outputs, targets), 1 / self.variance)

    def _residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        prediction = self.output(outputs, targets)
        return _one_column("Regression", targets).to(prediction.dtype) - prediction


class NegativeLoss(ModelOutput):
    r"""The negative loss itself, :math:`f = -\ell`, :math:`q = 1`: right for every loss of one value a sample.

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
        if not callable(loss_fn):
            raise TypeError(f"Expected argument `loss_fn` to be a callable, but got {type(loss_fn).__name__}.")
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


def _at_least_float32(values: Tensor) -> Tensor:
    # Half-precision margins saturate: q would be 0 for most fitted samples.
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _bernoulli_variance(probability: Tensor) -> Tensor:
    return probability * (1 - probability)


def _check_class_logits(outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"Expected the outputs for MulticlassMargin to be logits of shape (b, c) with c >= 2, but got {found}. "
            "Override `attribution_step` to return them, or set `model_output` (BinaryMargin for one logit, "
            "NegativeLoss for any other loss)."
        )
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape[:1] or targets.dtype.is_floating_point:
        found = (
            f"{targets.dtype} of shape {tuple(targets.shape)}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise ValueError(
            f"Expected the targets for MulticlassMargin to be integer labels of shape ({outputs.shape[0]},), but got "
            f"{found}. For soft labels use NegativeLoss."
        )


def _one_column(name: str, values: Tensor) -> Tensor:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(
            f"Expected outputs and targets for {name} of shape (b,) or (b, 1), but got {tuple(values.shape)}. "
            "For several outputs a sample use NegativeLoss, or a ModelOutput of your own."
        )
    return _at_least_float32(values) if values.dtype.is_floating_point else values
