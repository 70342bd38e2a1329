"""Contrastive models: how well a pair of an image and a text is told from a simulated batch of others."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_attr.arguments.checks import check_flag
from lightning_attr.outputs.base import ModelOutput, at_least_float32
from lightning_attr.outputs.directions import SampleDraws, along, softmax_direction


class ContrastiveMargin(ModelOutput):
    r"""Margin of a pair against a simulated batch :math:`B`, once for each direction: :math:`f = f_1 + f_2`.

    With the scaled similarity :math:`S_{ij} = s\,u_i^\top v_j` of image :math:`i` and text :math:`j`,
    :math:`f_1 = S_{ii} - \log\sum_{j \in B} e^{S_{ij}} = \log\frac{p_1}{1 - p_1}` is the margin of the right text for
    the image, and :math:`f_2 = S_{ii} - \log\sum_{j \in B} e^{S_{ji}}` that of the right image for the text (Park et
    al., 2023, TRAK, section 5.1; here with the logit scale :math:`s`). The loss is :math:`\log(1 + e^{-f_1}) + \log(1 +
    e^{-f_2})`, or half of it, and one :math:`q = \frac12\big((1 - p_1) + (1 - p_2)\big)`, or half of it, stands for
    those of both directions: :math:`\nabla\ell = -q \nabla f` is an approximation, and exact where they agree. For the
    loss itself, with no approximation, take ``NegativeLoss(ContrastiveMargin().loss)``.

    Args:
        halved: whether training halves the sum of both losses, as CLIP, open_clip and transformers do.

    Raises:
        ValueError: on use, if the logits have another shape.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]])    # one pair, one other in the batch
        >>> ContrastiveMargin().margins(logits), ContrastiveMargin().output(logits, None)
        (tensor([[2., 1.]]), tensor([3.]))
        >>> ContrastiveMargin(halved=False).out_to_loss(logits, None)
        tensor([0.1941])
    """

    def __init__(self, halved: bool = True) -> None:
        self.halved = check_flag(self, "halved", halved)

    @property
    def exact(self) -> bool:
        """False: one ``q`` stands for two."""
        return False

    def margins(self, outputs: Tensor) -> Tensor:
        """Margins of both directions.

        Args:
            outputs: logits, float, ``(b, 2, 1 + N)``: similarities of the image with its own text and ``N`` others,
                times the logit scale; then of the text with its own image and ``N`` others.

        Returns:
            :math:`f_1, f_2`, float32 or wider, ``(b, 2)``.

        Raises:
            ValueError: if the shape is another.
        """
        if not isinstance(outputs, Tensor) or outputs.ndim != 3 or outputs.shape[1] != 2 or outputs.shape[2] < 2:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                "Expected the outputs for ContrastiveMargin to be logits of shape (b, 2, 1 + N), those of the pair in "
                f"front of those of N others, for both directions, but got {found}. "
                "lightning_attr.modalities.ContrastiveMixin makes them of embeddings."
            )
        logits = at_least_float32(outputs)
        return logits[..., 0] - logits[..., 1:].logsumexp(2)

    def output(self, outputs: Tensor, targets: Any) -> Tensor:
        """Sum of both margins.

        Args:
            outputs: as for :meth:`margins`.
            targets: not used.

        Returns:
            ``f``, float32 or wider, ``(b,)``.
        """
        return self.margins(outputs).sum(1)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Cross-entropies of both directions in nats, added or averaged, ``(b,)``; arguments as in :meth:`output`."""
        return self._scale * -F.logsigmoid(self.margins(outputs)).sum(1)

    def out_to_loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Mean probability of the others, or half of it, ``(b,)``; arguments as in :meth:`output`."""
        return self._scale * (-self.margins(outputs)).sigmoid().mean(1)

    def newton_weight(self, outputs: Tensor, targets: Any) -> Tensor:
        """Half the mean of ``p (1 - p)``, or a quarter, as if both margins moved together, ``(b,)``."""
        missing = (-self.margins(outputs)).sigmoid()
        return self._scale * 0.5 * (missing * (1 - missing)).mean(1)

    def second_direction(self, outputs: Tensor, targets: Any, draws: SampleDraws) -> Tensor:
        r"""Draw :math:`v_1 \cdot S_1 + v_2 \cdot S_2` of both directions' softmax, times the root of the loss's factor.

        Args:
            outputs: as for :meth:`margins`.
            targets: not used.
            draws: signs or labels of each sample.

        Returns:
            ``(b,)``.
        """
        self.margins(outputs)  # checked
        logits = at_least_float32(outputs)
        return along(logits, self._scale**0.5 * softmax_direction(logits, draws))

    @property
    def _scale(self) -> float:
        return 0.5 if self.halved else 1.0
