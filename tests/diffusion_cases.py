"""A diffusion model without diffusers, small enough for exact references."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_attr.modalities.diffusion import DiffusionMixin

T, SIZE = 20, 3


class Scheduler:
    """A DDPM of `T` steps; as those of diffusers, it changes when its steps are set."""

    def __init__(self, prediction_type: str = "epsilon") -> None:
        self.config: Any = SimpleNamespace(num_train_timesteps=T, prediction_type=prediction_type)
        self.kept = torch.linspace(0.99, 0.02, T).double()
        self.timesteps: list[int] = []

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(like)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, share = self.scales(timesteps, clean)
        return signal * clean + share * noise

    def get_velocity(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, share = self.scales(timesteps, clean)
        return signal * noise - share * clean

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = list(range(T - 1, -1, -(T // steps)))

    def step(self, prediction: Tensor, t: int, x: Tensor, generator: list[torch.Generator]) -> Any:
        signal, share = self.scales(torch.full((len(x),), t), x)
        estimate = (x - share * prediction) / signal
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generator]).to(x)
        earlier = torch.full((len(x),), max(0, t - 1))
        return SimpleNamespace(prev_sample=self.add_noise(estimate, noise, earlier), pred_original_sample=estimate)


class Denoiser(DiffusionMixin, L.LightningModule):
    """Predicts from a sample, its timestep and, if there is one, a class."""

    attribution_draws = 3

    def __init__(self, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE + 2, SIZE)
        self.scheduler = Scheduler(prediction_type)

    def model(self, noisy: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Any:
        label = torch.zeros_like(noisy[:, :1]) if labels is None else labels[:, None].to(noisy)
        return SimpleNamespace(sample=self.layer(torch.cat([noisy, timesteps[:, None].to(noisy) / T, label], 1)))

    def training_step(self, batch: Any) -> Tensor:
        return self.denoising_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LabelledDenoiser(Denoiser):
    """A batch is `(x, labels)`."""

    def conditioning(self, batch: Any) -> dict[str, Tensor]:
        return {"labels": batch[1]}
