"""Generated samples as targets: with the trajectory on which they were denoised, or each as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_attr.arguments.checks import check_instance, check_int, check_seed, check_tensor
from lightning_attr.arguments.listed import check_ints
from lightning_attr.arguments.messages import argument_message
from lightning_attr.randomness.streams import gaussian, hashed_seed


class GeneratedSamples(Dataset[dict[str, Any]]):
    """Targets, as :class:`lightning_attr.modalities.DiffusionMixin` takes them: a dict with ``clean`` and more each.

    Held-out samples are welcome, too.

    Args:
        clean: float, ``(m, ...)``: images, or latents if the model works on latents.
        conditioning: name -> tensor ``(m, ...)`` that the network was told.
        timesteps: ``(m,)``, int64: where each row is measured; None for the whole schedule.

    Raises:
        ValueError: if these are not of one length.

    Example:
        >>> data = GeneratedSamples(torch.zeros(2, 1, 4, 4), timesteps=torch.tensor([5, 0]))
        >>> len(data), int(data[0]["timestep"])
        (2, 5)
    """

    def __init__(
        self, clean: Tensor, conditioning: Mapping[str, Tensor] | None = None, timesteps: Tensor | None = None
    ) -> None:
        check_tensor(self, "clean", clean, "(n, *shape)")
        self.clean = clean
        self.conditioning = dict(conditioning or {})
        self.timesteps = timesteps
        given = {**self.conditioning, **({} if timesteps is None else {"timesteps": timesteps})}
        _check_lengths(given, len(clean))

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"clean": self.clean[index]}
        row["conditioning"] = {name: values[index] for name, values in self.conditioning.items()}
        if self.timesteps is not None:
            row["timestep"] = self.timesteps[index]
        return row


def _check_lengths(given: Mapping[str, Tensor], count: int) -> None:
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(
                f"Expected `{name}` to hold one entry for each of the {count} samples, but got {len(values)}."
            )


@dataclass(frozen=True)
class DenoisingTrajectory:
    r"""Generated samples, and what the model took each of them for at every step of its denoising.

    At step :math:`t` the model guesses a clean sample, :math:`\hat x_0^t`. How well it denoises this guess at timestep
    :math:`t`, under fresh noises, is the behaviour that is attributed there (Georgiev et al., 2023): which training
    samples shaped the step, and not the final image.

    Args:
        samples: the final ones, float, ``(m, ...)``.
        estimates: :math:`\hat x_0^t`, float, ``(steps, m, ...)``, in the order of denoising; None if unknown.
        timesteps: of the steps, int64, ``(steps,)``, falling; None if unknown.
        conditioning: name -> tensor ``(m, ...)`` that the network was told.

    Raises:
        ValueError: if these do not fit each other.

    Example:
        >>> trajectory = DenoisingTrajectory(torch.zeros(2, 4), torch.zeros(5, 2, 4), torch.tensor([80, 60, 40, 20, 0]))
        >>> len(trajectory.final()), len(trajectory.at_steps()), len(trajectory.at_steps([0, 4]))
        (2, 10, 4)
    """

    samples: Tensor
    estimates: Tensor | None = None
    timesteps: Tensor | None = None
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.estimates is None) != (self.timesteps is None):
            raise ValueError("Expected arguments `estimates` and `timesteps` both or neither, but got one of them.")
        if self.estimates is not None and self.timesteps is not None:
            expected = (len(self.timesteps), *self.samples.shape)
            if tuple(self.estimates.shape) != expected:
                raise ValueError(
                    f"Expected argument `estimates` of shape {expected}, one estimate a step and sample, but got "
                    f"{tuple(self.estimates.shape)}."
                )

    def final(self) -> GeneratedSamples:
        """Take the final samples as targets, each measured over the whole schedule.

        Returns:
            A data set of ``m`` rows.
        """
        return GeneratedSamples(self.samples, self.conditioning)

    def at_steps(self, steps: Sequence[int] | None = None) -> GeneratedSamples:
        """Take the estimates as targets, each measured at its own timestep.

        Args:
            steps: positions in the trajectory, 0 the first; all by default.

        Returns:
            A data set of ``len(steps) * m`` rows: row ``i * m + j`` is sample ``j`` at ``steps[i]``, so that scores
            unflatten into ``(n_train, len(steps), m)``.

        Raises:
            ValueError: if the samples are here without their trajectory, or a step is not on it.
        """
        if self.estimates is None or self.timesteps is None:
            raise ValueError(
                f"Expected {len(self.samples)} generated samples with their trajectory, to attribute single denoising "
                "steps, but got final samples only. Generate them with `sample_trajectory`, or attribute `final()`."
            )
        count = len(self.timesteps)
        chosen = list(range(count)) if steps is None else list(steps)
        if outside := [step for step in chosen if not 0 <= step < count]:
            raise ValueError(f"Expected argument `steps` in [0, {count}), but got {outside[0]}.")
        conditioning = {name: torch.cat([values] * len(chosen)) for name, values in self.conditioning.items()}
        timesteps = self.timesteps[chosen].repeat_interleave(len(self.samples))
        return GeneratedSamples(self.estimates[chosen].flatten(0, 1), conditioning, timesteps)


@torch.no_grad()
def sample_trajectory(
    module: Any,
    shape: Sequence[int],
    count: int,
    steps: int = 50,
    seed: int = 0,
    conditioning: Mapping[str, Tensor] | None = None,
    scheduler: Any = None,
) -> DenoisingTrajectory:
    """Generate samples, and keep what the model took them for on the way.

    Sample ``j`` depends on seed and ``j`` only, and on the weights: two models make of the same noise what tells them
    apart.

    Args:
        module: a :class:`lightning_attr.modalities.DiffusionMixin`; put into eval mode for the time being.
        shape: of one sample.
        count: how many samples.
        steps: of the denoising, at most as many as in training.
        seed: of the noise.
        conditioning: name -> tensor ``(count, ...)``, keyword arguments of the module's ``denoise``.
        scheduler: that denoises, with ``set_timesteps``, ``timesteps`` and ``step``, whose result holds
            ``pred_original_sample``, as DDPM's and DDIM's of diffusers; by default a copy of the module's.

    Returns:
        Samples and trajectory, on the CPU.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if the conditioning has not one entry per sample, or the scheduler does not say what it takes a
            sample for.

    Example:
        >>> from types import SimpleNamespace
        >>> class Halves:                                     # in the place of a scheduler of diffusers
        ...     def set_timesteps(self, steps):
        ...         self.timesteps = range(steps)[::-1]
        ...     def step(self, noise, t, x, generator):
        ...         return SimpleNamespace(prev_sample=x / 2, pred_original_sample=x - noise)
        >>> class Model(torch.nn.Linear):
        ...     scheduler = Halves()
        ...     def denoise(self, x, timesteps):
        ...         return self(x)
        >>> trajectory = sample_trajectory(Model(2, 2), (2,), count=3, steps=4)
        >>> trajectory.samples.shape, trajectory.estimates.shape
        (torch.Size([3, 2]), torch.Size([4, 3, 2]))
    """
    count = check_int("sample_trajectory", "count", count, minimum=1)
    steps = check_int("sample_trajectory", "steps", steps, minimum=1)
    seed = check_seed("sample_trajectory", seed)
    owner = "sample_trajectory"
    check_instance(owner, "module", module, torch.nn.Module, "a module with a `denoise` function")
    if scheduler is None and not hasattr(module, "scheduler"):
        raise ValueError(argument_message(owner, "scheduler", "given, as the module has no `scheduler`", scheduler))
    check_ints(owner, "shape", shape, 1, expected="the shape of one sample")
    if conditioning is not None:
        check_instance(owner, "conditioning", conditioning, Mapping, "a mapping from names to tensors")
    _check_lengths(conditioning or {}, count)
    scheduler = copy.deepcopy(module.scheduler if scheduler is None else scheduler)
    scheduler.set_timesteps(steps)
    first = next(module.parameters())
    given = {name: values.to(first.device) for name, values in (conditioning or {}).items()}
    generators = [torch.Generator().manual_seed(hashed_seed("trajectory", seed, j)) for j in range(count)]
    x = torch.stack([gaussian(tuple(shape), "trajectory", seed, j) for j in range(count)]).to(first)
    estimates, training = [], module.training
    module.eval()
    try:
        for t in scheduler.timesteps:
            timesteps = torch.full((count,), int(t), device=first.device)
            result = scheduler.step(module.denoise(x, timesteps, **given), t, x, generator=generators)
            estimate = getattr(result, "pred_original_sample", None)
            if estimate is None:
                raise ValueError(
                    f"Expected `step` of {type(scheduler).__name__} to return `pred_original_sample`, but it does not. "
                    "Denoise with a scheduler that does, such as DDPMScheduler or DDIMScheduler of diffusers."
                )
            x = result.prev_sample
            estimates.append(estimate.cpu())
    finally:
        module.train(training)
    timesteps = torch.as_tensor(scheduler.timesteps).cpu().long()
    return DenoisingTrajectory(
        x.cpu(), torch.stack(estimates), timesteps, {name: values.cpu() for name, values in given.items()}
    )
