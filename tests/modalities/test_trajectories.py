"""Generated samples as data sets, and how they are made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_cases import SIZE, Denoiser, LabelledDenoiser, Scheduler, T
from torch.utils.data import DataLoader

from lightning_attr.modalities.trajectories import DenoisingTrajectory, GeneratedSamples, sample_trajectory


def trajectory() -> DenoisingTrajectory:
    labels = {"labels": torch.tensor([7, 8])}
    return DenoisingTrajectory(torch.zeros(2, 3), torch.arange(24.0).view(4, 2, 3), torch.tensor([9, 6, 3, 0]), labels)


def test_final_samples_are_measured_everywhere() -> None:
    (batch,) = DataLoader(trajectory().final(), batch_size=2)
    assert torch.equal(batch["clean"], torch.zeros(2, 3))
    assert batch["conditioning"]["labels"].tolist() == [7, 8]
    assert "timestep" not in batch


@pytest.mark.parametrize("steps", [None, [3, 1]])
def test_estimates_are_measured_at_their_timestep(steps: list[int] | None) -> None:
    given = trajectory()
    rows = given.at_steps(steps)
    chosen = steps or [0, 1, 2, 3]
    assert len(rows) == 2 * len(chosen)
    (batch,) = DataLoader(rows, batch_size=len(rows))
    for i, step in enumerate(chosen):
        for j in range(2):
            assert torch.equal(batch["clean"][2 * i + j], given.estimates[step, j])
            assert batch["timestep"][2 * i + j] == given.timesteps[step]
            assert batch["conditioning"]["labels"][2 * i + j] == 7 + j


def test_single_steps_of_samples_without_a_trajectory() -> None:
    samples = DenoisingTrajectory(torch.zeros(2, 3))
    assert len(samples.final()) == 2
    with pytest.raises(ValueError, match=r"2 generated samples with their trajectory, .* got final samples only"):
        samples.at_steps()


@pytest.mark.parametrize("step", [4, -1])
def test_a_step_that_is_not_on_the_trajectory(step: int) -> None:
    with pytest.raises(ValueError, match=rf"Expected argument `steps` in \[0, 4\), but got {step}"):
        trajectory().at_steps([0, step])


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="`estimates` and `timesteps` both or neither, but got one of them"):
        DenoisingTrajectory(torch.zeros(2, 3), torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match=r"`estimates` of shape \(4, 2, 3\), .* but got \(5, 2, 3\)"):
        DenoisingTrajectory(torch.zeros(2, 3), torch.zeros(5, 2, 3), torch.arange(4))
    with pytest.raises(ValueError, match="Expected `labels` to hold one entry for each of the 2 samples, but got 3"):
        GeneratedSamples(torch.zeros(2, 3), {"labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="Expected `timesteps` to hold one entry for each of the 2 samples, but got 1"):
        GeneratedSamples(torch.zeros(2, 3), timesteps=torch.zeros(1))


def test_a_sample_depends_on_seed_and_number_only() -> None:
    model = Denoiser()
    many, few, other = (sample_trajectory(model, (SIZE,), n, 5, seed) for n, seed in ((4, 1), (2, 1), (2, 2)))
    torch.testing.assert_close(many.samples[:2], few.samples)
    torch.testing.assert_close(many.estimates[:, :2], few.estimates)
    assert not torch.allclose(few.samples, other.samples)
    assert not torch.allclose(many.samples[0], many.samples[1])


def test_sampling_follows_the_scheduler_and_leaves_everything_as_it_was() -> None:
    model = Denoiser().train()
    state = torch.get_rng_state()
    found = sample_trajectory(model, (SIZE,), 3, steps=5)
    assert model.training
    assert model.scheduler.timesteps == []
    assert torch.equal(torch.get_rng_state(), state)
    assert found.timesteps.tolist() == [19, 15, 11, 7, 3]
    assert found.estimates.shape == (5, 3, SIZE)
    assert not found.samples.requires_grad
    # What the model took the first noise for, by its own prediction.
    scheduler, x = Scheduler(), sample_trajectory(model, (SIZE,), 3, steps=5).estimates[0]
    from lightning_attr.randomness.streams import gaussian

    noise = torch.stack([gaussian((SIZE,), "trajectory", 0, j) for j in range(3)])
    signal, share = scheduler.scales(torch.full((3,), T - 1), noise)
    prediction = model.denoise(noise, torch.full((3,), T - 1)).detach()
    torch.testing.assert_close(x, (noise - share * prediction) / signal)


def test_conditioning_and_another_scheduler() -> None:
    model = LabelledDenoiser()
    labels = {"labels": torch.tensor([0, 5])}
    found = sample_trajectory(model, (SIZE,), 2, 5, conditioning=labels, scheduler=Scheduler())
    plain = sample_trajectory(model, (SIZE,), 2, 5)
    assert torch.equal(found.conditioning["labels"], labels["labels"])
    torch.testing.assert_close(found.samples[0], plain.samples[0])
    assert not torch.allclose(found.samples[1], plain.samples[1])


def test_captions_of_another_number_than_the_samples() -> None:
    with pytest.raises(ValueError, match="Expected `labels` to hold one entry for each of the 2 samples, but got 1"):
        sample_trajectory(LabelledDenoiser(), (SIZE,), 2, 5, conditioning={"labels": torch.zeros(1)})


def test_a_scheduler_without_estimates() -> None:
    class Plain(Scheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(prev_sample=super().step(*args, **kwargs).prev_sample)

    model = Denoiser().train()
    with pytest.raises(ValueError, match="Expected `step` of Plain to return `pred_original_sample`"):
        sample_trajectory(model, (SIZE,), 2, 5, scheduler=Plain())
    assert model.training
