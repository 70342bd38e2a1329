"""Diffusion models: timesteps and noise of a sample's own, and the step that denoises it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_attr.objectives.mixin import AttributionMixin
from lightning_attr.outputs import DenoisingLoss, ModelOutput
from lightning_attr.randomness.draws import Draw


class DiffusionMixin(AttributionMixin):
    r"""Gives a ``LightningModule`` that trains a diffusion model its model output: the denoising loss, its sign turned.

    The module holds a network as ``model``, called as ``model(noisy, timesteps, **conditioning)``, and a ``scheduler``
    with ``add_noise(clean, noise, timesteps)`` and a ``config`` that names ``num_train_timesteps`` and
    ``prediction_type`` ("epsilon", "v_prediction" or "sample"), as those of diffusers do. What is attributed is the
    mean over ``attribution_draws`` draws of a timestep and a noise, :math:`f = -\frac1K \sum_k \|v -
    v_\theta(x_{t_k}, t_k)\|^2 / D`; random numbers are each sample's own, whatever its batch. For D-TRAK (Zheng et al.,
    2024) set ``model_output`` to :class:`lightning_attr.outputs.SquaredPrediction`, timesteps to "even" and noise to
    "shared".

    A batch ``(x, ...)`` is clean samples and nothing else; override :meth:`clean_samples` and :meth:`conditioning` for
    latents, class labels or captions, and :meth:`denoise` for a network that is called in another way. What the first
    two give is constant: a text encoder that is trained runs in :meth:`denoise`, on token numbers. A dict with
    ``clean`` needs neither: ``clean`` ``(b, ...)``, if wanted ``conditioning``, a dict of tensors ``(b, ...)``, and
    ``timestep`` ``(b,)``, at which the sample is then measured in every draw. Generated samples come so, see
    :class:`lightning_attr.modalities.DenoisingTrajectory`.

    Attributes:
        attribution_draws: draws of a timestep and a noise, each a forward and backward pass.
        attribution_timesteps: "random", each sample's own in each draw, or "even", the middle of the draw's share of
            the schedule, the same for all samples.
        attribution_noise: "own", each sample's, or "shared" by all samples, of each draw.

    Example:
        >>> import lightning as L, torch
        >>> from types import SimpleNamespace
        >>> class Scheduler:                                       # diffusers has better ones
        ...     config = SimpleNamespace(num_train_timesteps=10, prediction_type="epsilon")
        ...     def add_noise(self, clean, noise, timesteps):
        ...         share = (timesteps + 1).view(-1, 1) / 10
        ...         return (1 - share).sqrt() * clean + share.sqrt() * noise
        >>> class Denoiser(DiffusionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.scheduler = torch.nn.Linear(3, 2), Scheduler()
        ...     def model(self, noisy, timesteps):
        ...         return self.layer(torch.cat([noisy, timesteps[:, None] / 10], 1))
        ...     def training_step(self, batch):
        ...         return self.denoising_loss(batch)
        >>> Denoiser().training_step([torch.randn(4, 2)]).shape
        torch.Size([])
    """

    model_output: ModelOutput = DenoisingLoss()
    attribution_draws: int = 8
    attribution_timesteps: str = "random"
    attribution_noise: str = "own"

    # What a user may override -------------------------------------------------------------------------------------

    def clean_samples(self, batch: Any) -> Tensor:
        """Take the clean samples of a batch, latents if the model works on latents; give them without gradients.

        Args:
            batch: what the data loader yields, on the module's device.

        Returns:
            ``x_0``, float, ``(b, ...)``; by default the batch itself, or its first part.

        Raises:
            TypeError: if there is no tensor in this place.
        """
        clean = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(clean, Tensor):
            found = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(clean).__name__
            raise TypeError(
                f"Expected a batch (x, ...) of clean samples, or a dict with `clean`, but got {found}. Override "
                f"`clean_samples(self, batch)` in {type(self).__name__}."
            )
        return clean

    def conditioning(self, batch: Any) -> dict[str, Tensor]:
        """Take what the network is told beside sample and timestep: class labels, states of a text encoder.

        Args:
            batch: what the data loader yields, on the module's device.

        Returns:
            Name -> tensor ``(b, ...)``, keyword arguments of :meth:`denoise`, without gradients: states of a frozen
            text encoder, or token numbers for one that is trained, which :meth:`denoise` runs; by default none.
        """
        return {}

    def denoise(self, noisy: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """Run the network.

        Args:
            noisy: ``x_t``, float, ``(b, ...)``.
            timesteps: int64, ``(b,)``.
            conditioning: from :meth:`conditioning`.

        Returns:
            Its prediction, ``(b, ...)``.

        Raises:
            TypeError: if the module has no ``model``.
        """
        prediction = self._held("model")(noisy, timesteps, **conditioning)
        if not isinstance(prediction, Tensor):  # diffusers wrap it
            prediction = prediction.sample if hasattr(prediction, "sample") else prediction[0]
        assert isinstance(prediction, Tensor)
        return prediction

    # What is made of it -------------------------------------------------------------------------------------------

    def denoising_loss(self, batch: Any) -> Tensor:
        """Compute a training loss, one timestep and one noise per sample from torch's own generator.

        Args:
            batch: what the data loader yields.

        Returns:
            The mean of the samples' losses, ``()``, as ``training_step`` may return it.
        """
        given = self._given(batch)
        clean = given["clean"]
        timesteps = torch.randint(self._schedule_length(), (len(clean),), device=clean.device)
        drawn = {"timestep": timesteps, **given, "noise": torch.randn_like(clean)}
        return DenoisingLoss().loss(*self.attribution_step(drawn)).mean()

    def attribution_batch(self, batch: Any, draw: Draw) -> dict[str, Any]:
        """Draw a timestep and a noise for each sample.

        Args:
            batch: what the data loader yields, or a dict with ``clean``, on the module's device.
            draw: gives random numbers that are each sample's own.

        Returns:
            ``clean``, ``conditioning``, ``timestep`` ``(b,)`` and ``noise``, of the shape of ``clean``.

        Raises:
            TypeError: if the batch holds no clean samples, or the module no scheduler.
            ValueError: if a timestep is outside the schedule, the conditioning has not one entry per sample, either is
                not constant, or an option of the class is unknown.
        """
        with torch.enable_grad():  # to see what is trained
            given = self._given(batch)
        self._check_constants(given)
        clean = given["clean"]
        if "timestep" not in given:
            given["timestep"] = self._timesteps(draw)
        self._check_timesteps(given["timestep"])
        self._check_option("attribution_noise", ("own", "shared"))
        if self.attribution_noise == "own":
            return {**given, "noise": draw.normal(*clean.shape[1:]).to(clean)}
        shared = replace(draw, rows=[0]).normal(*clean.shape[1:]).to(clean)
        return {**given, "noise": shared.expand_as(clean)}

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Add the noise, and let the network predict.

        Args:
            batch: from :meth:`attribution_batch`.

        Returns:
            The prediction, and what it should be: noise, velocity or clean sample; both ``(b, ...)``.

        Raises:
            ValueError: if the prediction has another shape, or the scheduler's ``prediction_type`` is unknown.
        """
        clean, noise, timesteps = batch["clean"], batch["noise"], batch["timestep"]
        scheduler = self._held("scheduler")
        prediction = self.denoise(scheduler.add_noise(clean, noise, timesteps), timesteps, **batch["conditioning"])
        if prediction.shape != clean.shape:
            raise ValueError(
                f"Expected `denoise` of {type(self).__name__} to return a prediction of the shape of the clean "
                f"samples, {tuple(clean.shape)}, but got {tuple(prediction.shape)}. Of a model that predicts variances "
                "as well, return the first half of its channels."
            )
        kind = _config(scheduler, "prediction_type", "epsilon")
        if kind == "v_prediction":
            return prediction, scheduler.get_velocity(clean, noise, timesteps)
        if kind not in {"epsilon", "sample"}:
            raise ValueError(
                "Expected `prediction_type` of the scheduler to be 'epsilon', 'v_prediction' or 'sample', but got "
                f"{kind!r}. Override `attribution_step` for other targets."
            )
        return prediction, noise if kind == "epsilon" else clean

    def _given(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Mapping) and "clean" in batch:
            given = {"conditioning": {}, **batch}
        else:
            given = {"clean": self.clean_samples(batch), "conditioning": self.conditioning(batch)}
        count = len(given["clean"])
        for name, values in given["conditioning"].items():
            if not isinstance(values, Tensor) or values.shape[:1] != (count,):
                found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
                raise ValueError(
                    f"Expected `{name}` of the conditioning of {type(self).__name__} to be a tensor with one entry for "
                    f"each of the {count} samples, but got {found}. Give each sample one caption or label, as numbers."
                )
        return given

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        for name, values in {"clean": given["clean"], **given["conditioning"]}.items():
            if values.requires_grad:
                raise ValueError(
                    f"Expected `{name}` of {type(self).__name__} to be without gradients, but it depends on parameters "
                    "that are trained: what the sample owes to them would be missed. Freeze what computes it "
                    "(`requires_grad_(False)`), or compute it in `denoise`, of token numbers for instance."
                )

    def _timesteps(self, draw: Draw) -> Tensor:
        self._check_option("attribution_timesteps", ("random", "even"))
        length = self._schedule_length()
        if self.attribution_timesteps == "random":
            return draw.integers(length, stream="timestep")
        middle = (2 * draw.number + 1) * length // (2 * self.attribution_draws)
        return torch.full((len(draw.rows),), middle, device=draw.device)

    def _check_timesteps(self, timesteps: Tensor) -> None:
        length = self._schedule_length()
        outside = timesteps[(timesteps < 0) | (timesteps >= length)]
        if len(outside):
            raise ValueError(
                f"Expected timesteps in [0, {length}), the scheduler's `num_train_timesteps`, but got "
                f"{int(outside[0])}. Measure a sample at a step of the schedule that the model was trained with."
            )

    def _check_option(self, name: str, options: tuple[str, str]) -> None:
        if getattr(self, name) not in options:
            raise ValueError(
                f"Expected `{name}` of {type(self).__name__} to be {options[0]!r} or {options[1]!r}, but got "
                f"{getattr(self, name)!r}."
            )

    def _schedule_length(self) -> int:
        return int(_config(self._held("scheduler"), "num_train_timesteps"))

    def _held(self, name: str) -> Any:
        held = getattr(self, name, None)
        if held is None:
            raise TypeError(
                f"Expected {type(self).__name__} to hold its {'network' if name == 'model' else 'noise scheduler'} as "
                f"`self.{name}`, but it has none. Set it in `__init__`, or define a property of this name."
            )
        return held


def _config(scheduler: Any, name: str, default: Any = None) -> Any:
    config = getattr(scheduler, "config", scheduler)
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    if value is None:
        raise TypeError(
            f"Expected the configuration of the scheduler ({type(scheduler).__name__}) to name `{name}`, but it does "
            f"not. Give it a `config` with this attribute."
        )
    return value
