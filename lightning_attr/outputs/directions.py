r"""Second directions: what one Newton weight a sample leaves out of the Gauss-Newton matrix.

The Gauss-Newton matrix of a sample's loss is :math:`J^\top H J`, with the Jacobian :math:`J` of the module's outputs
:math:`s` and :math:`H = \nabla_s^2 \ell`. TRAK's kernel has one row per sample for it, :math:`w\, \nabla f \nabla
f^\top`. A random direction :math:`v` with :math:`E[v v^\top] = H`, or what is missing of it, restores the rest: the row
:math:`J^\top v` is the gradient of :math:`v \cdot s`.

With independent signs :math:`\xi`, a softmax has :math:`v = \sqrt p \odot \xi - p\,(\sqrt p \cdot \xi)`, and
:math:`E[v v^\top] = \operatorname{diag}(p) - p p^\top`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_attr.batches.float64 import has_float64
from lightning_attr.batches.running_sum import running_sum
from lightning_attr.randomness.streams import hashed_uniforms, row_words

if TYPE_CHECKING:
    from collections.abc import Sequence

_FEW_CLASSES = 256
"""Signs for all of them at once; of more, a label is drawn."""


@dataclass(frozen=True, eq=False)
class SampleDraws:
    """Random numbers of each sample of a batch, its own wherever it is.

    Args:
        words: ``(b,)``, int64, one a sample.

    Example:
        >>> draws = SampleDraws.of([5, 3], 0, "final")
        >>> bool((SampleDraws.of([3], 0, "final").signs(4) == draws.signs(4)[1:]).all())
        True
    """

    words: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], *key: object, device: torch.device | str = "cpu") -> SampleDraws:
        """Draw for rows of a data set.

        Args:
            rows: row numbers, ``b`` of them.
            key: what the numbers depend on, besides the row.
            device: where they are wanted.

        Returns:
            The draws.
        """
        return cls(row_words(rows, *key).to(device, non_blocking=True))

    def uniforms(self, *shape: int) -> Tensor:
        """Draw uniform numbers.

        Args:
            shape: of one sample's.

        Returns:
            ``(b, *shape)``, float64 (float32 where the device has no wider), in the open interval (0, 1).
        """
        wide = has_float64(self.words.device)
        drawn = hashed_uniforms(self.words if wide else self.words.cpu(), torch.Size(shape).numel()).reshape(-1, *shape)
        return drawn if wide else drawn.float().clamp(max=1 - 2.0**-24).to(self.words.device)

    def signs(self, *shape: int) -> Tensor:
        """Draw signs.

        Args:
            shape: of one sample's.

        Returns:
            ``(b, *shape)``, float32, -1 or +1.
        """
        return 1 - 2 * (self.uniforms(*shape) < 0.5).float()


def along(outputs: Tensor, direction: Tensor) -> Tensor:
    """Give the scalar whose gradient in the outputs is a direction.

    Args:
        outputs: ``(b, ...)``.
        direction: of the same shape; no gradient flows through it.

    Returns:
        ``(b,)``.

    Example:
        >>> along(torch.ones(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([7.])
    """
    return (outputs * direction.detach().to(outputs)).flatten(1).sum(1)


def softmax_direction(logits: Tensor, draws: SampleDraws) -> Tensor:
    r"""Draw :math:`v` with :math:`E[v v^\top] = \operatorname{diag}(p) - p p^\top`, independent at every position.

    By random signs for up to 256 classes, else as :math:`e_y - p` of a label drawn from the softmax.

    Args:
        logits: ``(b, *positions, c)``, -inf for classes that are left out.
        draws: of the samples.

    Returns:
        Directions, of the shape of the logits, detached.

    Example:
        >>> v = softmax_direction(torch.randn(1, 10), SampleDraws.of([0], 0))
        >>> v.shape, bool(v.sum().abs() < 1e-5)                              # a softmax does not see a shift of all
        (torch.Size([1, 10]), True)
    """
    p = logits.detach().softmax(-1)
    if logits.shape[-1] <= _FEW_CLASSES:
        signed = p.sqrt() * draws.signs(*logits.shape[1:]).to(p)
        return signed - p * signed.sum(-1, keepdim=True)
    labels = _label(p, draws.uniforms(*logits.shape[1:-1]))
    return -p.scatter_add(-1, labels[..., None], -torch.ones_like(p[..., :1]))


def _label(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw labels by the inverse of the distribution function, ``(b, *positions)``."""
    below = running_sum(probabilities) < uniforms.to(probabilities)[..., None] * probabilities.sum(-1, keepdim=True)
    return below.sum(-1).clamp(max=probabilities.shape[-1] - 1)
