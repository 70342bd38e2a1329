"""Predictions of a diffusion model: how well it denoises a sample, and how large what it predicts is."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.outputs.base import ModelOutput, at_least_float32
from lightning_attr.outputs.directions import SampleDraws, along


class DenoisingLoss(ModelOutput):
    r"""How well a sample is denoised, :math:`f = -\ell = -\|v - v_\theta(x_t, t)\|^2 / D`; then :math:`q = 1`.

    The target :math:`v` is the noise, the velocity or the clean sample, whichever the model predicts, and :math:`D` its
    number of entries. The gradient of the mean over timesteps and noises is what TRAK takes of a diffusion model
    (Georgiev et al., 2023).

    Example:
        >>> import torch
        >>> DenoisingLoss().output(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
        tensor([-1., -1.])
    """

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative loss, ``(b,)``; arguments as in :meth:`loss`."""
        return -self.loss(outputs, targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of each sample.

        Args:
            outputs: prediction, float, ``(b, ...)``.
            targets: what it should be, float, of the same shape.

        Returns:
            The loss, float32 or wider, ``(b,)``.

        Raises:
            ValueError: if the shapes differ.
        """
        if outputs.shape != targets.shape or outputs.ndim < 2:
            raise ValueError(
                f"Expected a prediction of the shape of its target, {tuple(targets.shape)}, for DenoisingLoss, but got "
                f"{tuple(outputs.shape)}. Let `denoise` return one prediction a sample and channel; of a model that "
                "predicts variances as well, only its first half."
            )
        return (at_least_float32(outputs) - at_least_float32(targets)).square().flatten(1).mean(1)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One for every sample, ``(b,)``; arguments as in :meth:`loss`."""
        return torch.ones_like(self.loss(outputs, targets))

    def second_direction(self, outputs: Tensor, targets: Tensor, draws: SampleDraws) -> Tensor:
        r"""Draw :math:`\sqrt{2/D}\; \xi \cdot v_\theta` with random signs: :math:`E[g g^\top] = \frac2D J^\top J`.

        Args:
            outputs: as in :meth:`loss`.
            targets: as in :meth:`loss`.
            draws: signs of each sample.

        Returns:
            ``(b,)``.
        """
        prediction = at_least_float32(outputs).flatten(1)
        size = prediction.shape[1]
        return along(prediction, (2 / size) ** 0.5 * draws.signs(size))


class SquaredPrediction(ModelOutput):
    r"""How large the prediction is, :math:`f = \|v_\theta(x_t, t)\|^2 / D`, whatever it should be: D-TRAK's output.

    Training lets a prediction grow from nothing towards its target: :math:`f` rises with every sample like it, and the
    score of TRAK has the sign of :class:`DenoisingLoss`, for samples alike are proponents under either. With it in the
    place of the loss, TRAK is D-TRAK (Zheng et al., 2024); its scores rank, their size means nothing. The ``loss`` is
    only what belongs to :math:`q = 1`, :math:`-f`, and not what the model is trained with.

    Example:
        >>> import torch
        >>> SquaredPrediction().output(2 * torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
        tensor([4., 4.])
    """

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean square of each prediction.

        Args:
            outputs: prediction, float, ``(b, ...)``.
            targets: not used.

        Returns:
            ``f``, float32 or wider, ``(b,)``.

        Raises:
            ValueError: if the outputs have no dimension beside the batch.
        """
        if outputs.ndim < 2:
            raise ValueError(
                f"Expected predictions of shape (b, ...) for SquaredPrediction, but got {tuple(outputs.shape)}. Let "
                "`denoise` return one prediction a sample and channel, without reduction."
            )
        return at_least_float32(outputs).square().flatten(1).mean(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative output, ``(b,)``; arguments as in :meth:`output`."""
        return -self.output(outputs, targets)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One for every sample, ``(b,)``; arguments as in :meth:`output`."""
        return torch.ones_like(self.output(outputs, targets))
