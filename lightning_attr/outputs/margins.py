"""Margins of classifiers: the log-odds of the right class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from lightning_attr.arguments.checks import check_float
from lightning_attr.batches.late_checks import noted
from lightning_attr.errors import InvalidLabelError
from lightning_attr.outputs.base import ModelOutput, at_least_float32, bad_labels, one_column
from lightning_attr.outputs.directions import SampleDraws, along, softmax_direction


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
        self.temperature = check_float(self, "temperature", temperature, above=0)

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Margin of the labelled class.

        Args:
            outputs: logits, float, ``(b, c)`` with at least two classes.
            targets: labels, integer, ``(b,)``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.

        Raises:
            InvalidLabelError: if a label is no class.
            ValueError: if the shapes or dtypes do not fit.
        """
        _check_class_logits(outputs, targets)
        logits = at_least_float32(outputs)
        if self.temperature != 1:
            logits = logits / self.temperature
        labels = targets.long().unsqueeze(1)
        _check_labels(labels, logits.shape[1])
        labels = labels.clamp(0, logits.shape[1] - 1)  # on a device, another one is noted and refused later
        right = logits.gather(1, labels).squeeze(1)
        return right - logits.scatter(1, labels, float("-inf")).logsumexp(1)

    def distribution(self, outputs: Tensor, targets: Tensor) -> Distribution:
        """The softmax; arguments as in :meth:`output`."""
        _check_class_logits(outputs, targets)
        return Categorical(logits=outputs.double() / self.temperature)

    @property
    def curvature(self) -> str:
        """The margin's own direction, and the spread of the other classes."""
        return "rest"

    def second_direction(self, outputs: Tensor, targets: Tensor, draws: SampleDraws) -> Tensor:
        r"""Draw :math:`\sqrt q\, v \cdot s` with :math:`v = \sum_{c \neq y} \sqrt{r_c}\, \xi_c (e_c - r)`.

        The Hessian of the cross-entropy is :math:`w u u^\top + q (\operatorname{diag} r - r r^\top)`, where :math:`u =
        e_y - r` is the direction of the margin, :math:`r` the softmax over the other classes, :math:`q = 1 - p_y` and
        :math:`w = q (1 - q)`; :math:`q\, E[v v^\top]` is its second term. With :math:`a_c = \sqrt{r_c}\, x \cdot (e_c -
        r)`, the product :math:`x^\top v v^\top x` has the variance :math:`2 [(\sum a_c^2)^2 - \sum a_c^4]`.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.
            draws: signs of each sample.

        Returns:
            ``(b,)``; of two classes, no direction is left.
        """
        margin = self.output(outputs, targets)
        logits = at_least_float32(outputs) / self.temperature
        others = logits.scatter(1, targets.long().unsqueeze(1), float("-inf"))
        return along(logits, torch.sigmoid(-margin).sqrt()[:, None] * softmax_direction(others, draws))


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

        Raises:
            InvalidLabelError: if a label is neither 0 nor 1.
        """
        logits, labels = one_column("BinaryMargin", outputs), one_column("BinaryMargin", targets)
        _check_binary(labels)
        return (2 * labels.to(logits.dtype) - 1) * logits

    @property
    def curvature(self) -> str:
        """One logit: its Newton weight is all."""
        return "newton"

    def distribution(self, outputs: Tensor, targets: Tensor) -> Distribution:
        """The sigmoid; arguments as in :meth:`output`."""
        return Bernoulli(logits=one_column("BinaryMargin", outputs).double().reshape(targets.shape))


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


def _check_labels(labels: Tensor, classes: int) -> None:
    """Name the first sample whose label, ``(b, 1)``, is no class."""
    _, outside = bad_labels(labels, torch.ones_like(labels, dtype=torch.bool), classes)
    if outside:
        sample = outside[0][0]
        raise InvalidLabelError(
            f"Expected labels in [0, {classes}), the classes of the logits, but the sample at position {sample} of the "
            f"batch has the label {int(labels[sample, 0])}. If it means that the sample has no label, leave it out of "
            "the data set (torch.utils.data.Subset).",
            [sample],
            len(labels),
        )


def _check_binary(labels: Tensor) -> None:
    """Name the first sample whose label, ``(b,)``, is neither 0 nor 1."""
    outside = (labels != 0) & (labels != 1)
    wrong = outside.any()
    if noted(wrong):
        return
    try:
        found = bool(wrong)
    except RuntimeError:  # under vmap, which allows no look at values: the same samples were checked outside of it
        return
    if found:
        sample = int(outside.nonzero()[0, 0])
        raise InvalidLabelError(
            f"Expected the labels for BinaryMargin to be 0 or 1, but the sample at position {sample} of the batch has "
            f"the label {labels[sample].item():.6g}. Map labels of -1 and 1 to 0 and 1; for soft labels use "
            "NegativeLoss.",
            [sample],
            len(labels),
        )
