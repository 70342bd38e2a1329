"""Segmentation: one value for all labelled pixels of an image."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.errors import InvalidLabelError
from lightning_attr.outputs.base import ModelOutput, at_least_float32, bad_labels, describe
from lightning_attr.outputs.directions import SampleDraws, along, softmax_direction


class PixelMargin(ModelOutput):
    r"""Mean margin of the labelled pixels, :math:`f = \frac{1}{|\Omega|} \sum_{x \in \Omega} \log\frac{p_x}{1 - p_x}`.

    :math:`p_x` is the probability of the right class at pixel :math:`x`. The loss is the mean cross-entropy of the
    pixels, and one :math:`q`, the mean of :math:`1 - p_x`, stands for those of all pixels: :math:`\nabla\ell = -q
    \nabla f` is an approximation. With each pixel weighted by its own :math:`q`, exactly, it is the loss itself that is
    attributed: ``NegativeLoss(PixelMargin().loss)``.

    Args:
        ignore_index: label of pixels without a loss.

    Raises:
        InvalidLabelError: on use, if a label is no class, or an image has no labelled pixel.
        ValueError: on use, if logits and labels do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 1.0, 5.0]]]])    # two classes, an image of 1 x 3 pixels
        >>> PixelMargin().output(logits, torch.tensor([[[0, 0, -100]]]))       # the mean of 2 and -1
        tensor([0.5000])
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = check_int(self, "ignore_index", ignore_index)

    @property
    def exact(self) -> bool:
        """False: one ``q`` stands for those of all pixels."""
        return False

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean margin of each image.

        Args:
            outputs: logits, float, ``(b, c, ...)``; with one channel, ``(b, 1, ...)``, those of the class 1 against 0.
            targets: labels, integer or bool, ``(b, ...)``, in ``[0, c)`` (``{0, 1}`` for one channel) or
                ``ignore_index``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.
        """
        return _mean(*self._margins(outputs, targets))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the pixels in nats, ``(b,)``; arguments as in :meth:`output`."""
        margins, labelled = self._margins(outputs, targets)
        return _mean(-F.logsigmoid(margins), labelled)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean probability of the wrong classes, ``(b,)``; arguments as in :meth:`output`."""
        margins, labelled = self._margins(outputs, targets)
        return _mean((-margins).sigmoid(), labelled)

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean of ``p (1 - p)``, as if all margins moved together, ``(b,)``; arguments as in :meth:`output`."""
        margins, labelled = self._margins(outputs, targets)
        missing = (-margins).sigmoid()
        return _mean(missing * (1 - missing), labelled)

    def second_direction(self, outputs: Tensor, targets: Tensor, draws: SampleDraws) -> Tensor:
        r"""Draw :math:`|\Omega|^{-1/2} \sum_x v_x \cdot s_x`, whose :math:`E[g g^\top]` is the mean over the pixels.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.
            draws: signs or labels of each sample.

        Returns:
            ``(b,)``.
        """
        _, labelled = self._margins(outputs, targets)
        logits = at_least_float32(outputs).flatten(2).transpose(1, 2)  # (b, pixels, c)
        if logits.shape[2] == 1:  # of two classes, one of which has the logit 0
            p = logits.detach().sigmoid()
            directions = (p * (1 - p)).sqrt() * draws.signs(*logits.shape[1:]).to(p)
        else:
            directions = softmax_direction(logits, draws)
        return along(logits, directions * (labelled / labelled.sum(1, keepdim=True).sqrt())[..., None])

    def _margins(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Margin of each pixel, ``(b, pixels)``, and which of them are labelled."""
        _check_shapes(outputs, targets)
        logits, labels = at_least_float32(outputs).flatten(2), targets.flatten(1).long()
        labelled = labels != self.ignore_index
        classes = max(2, logits.shape[1])
        _check_labels(labels, labelled, classes)
        index = labels.masked_fill(~labelled, 0).clamp(0, classes - 1)
        if logits.shape[1] == 1:
            return (2 * index - 1) * logits.squeeze(1), labelled
        index = index.unsqueeze(1)
        right = logits.gather(1, index).squeeze(1)
        return right - logits.scatter(1, index, float("-inf")).logsumexp(1), labelled


def _mean(values: Tensor, labelled: Tensor) -> Tensor:
    return values.masked_fill(~labelled, 0).sum(1) / labelled.sum(1)


def _check_shapes(outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim < 3 or not outputs.dtype.is_floating_point:
        raise ValueError(
            f"Expected the outputs for PixelMargin to be float logits of shape (b, c, height, width), but got "
            f"{describe(outputs)}. Override `attribution_step` to return them; for one label an image use "
            "MulticlassMargin."
        )
    expected = (outputs.shape[0], *outputs.shape[2:])
    if not isinstance(targets, Tensor) or targets.dtype.is_floating_point or targets.shape != expected:
        raise ValueError(
            f"Expected the targets for PixelMargin to be integer labels of shape {tuple(expected)}, one for each pixel "
            f"of the logits, but got {describe(targets)}. For soft masks use NegativeLoss."
        )


def _check_labels(labels: Tensor, labelled: Tensor, classes: int) -> None:
    empty, outside = bad_labels(labels, labelled, classes)
    if empty:
        raise InvalidLabelError(
            "Expected each image to have a labelled pixel, but those at the positions "
            f"{empty} of the batch have none: all their labels are the ignored one. "
            "Remove them from the data set.",
            empty,
            len(labels),
        )
    if outside:
        image, pixel = outside[0]
        raise InvalidLabelError(
            f"Expected labels in [0, {classes}), the classes of the logits, or ignored labels, but the image at "
            f"position {image} of the batch has the label {int(labels[image, pixel])}. Set `ignore_index` if it means "
            "no class.",
            [image],
            len(labels),
        )
