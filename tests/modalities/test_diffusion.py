"""The mixin of diffusion models: draws, targets of every kind of prediction, options, conditioning, bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_cases import SIZE, Denoiser, LabelledDenoiser, T
from torch import Tensor
from torch.utils.data import TensorDataset

from cases import loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.modalities.trajectories import GeneratedSamples, sample_trajectory
from lightning_attr.outputs import DenoisingLoss, SquaredPrediction
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.draws import Draw

X = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
DATA = TensorDataset(X.float())


def features(model: Any, batches: list[list[int]], *columns: Tensor) -> dict[str, Tensor]:
    model = model.double().eval()
    made = plan(model, tuple(column[:4] for column in columns), 4)
    projection = IdentityProjector().bind(ParameterLayout.of(model), "final")
    featurizer = Featurizer(model, made, projection, snapshot="final")
    parts = [featurizer(tuple(column[rows] for column in columns), rows) for rows in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def loss(model: Any, x: Tensor, t: int, noise: Tensor, label: int = 0) -> Tensor:
    """One sample, one draw, from the definition."""
    kept = model.scheduler.kept[t]
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
    prediction = model.layer(torch.cat([noisy, torch.tensor([t / T, float(label)]).double()]))
    target = {"epsilon": noise, "sample": x, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * x}
    return ((prediction - target[model.scheduler.config.prediction_type]) ** 2).sum() / SIZE


def drawn(row: int, number: int, snapshot: str = "final") -> tuple[int, Tensor]:
    draw = Draw([row], snapshot, number)
    return int(draw.integers(T, stream="timestep")), draw.normal(SIZE)[0].double()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5]], [[4, 5], [0], [3, 2, 1]]])
def test_features_are_means_over_timesteps_and_noises(kind: str, batches: list[list[int]]) -> None:
    model = Denoiser(kind)
    found = features(model, batches, X)
    for position, row in enumerate(row for batch in batches for row in batch):
        value = -sum(loss(model, X[row], *drawn(row, number)) for number in range(3)) / 3
        gradient = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(found["features"][position], torch.cat([g.flatten() for g in gradient]))
        torch.testing.assert_close(found["output"][position], value.detach())
    assert torch.equal(found["out_to_loss"], torch.ones(6).double())


def test_conditioning_reaches_the_network() -> None:
    model = LabelledDenoiser()
    found = features(model, [[0, 1, 2, 3, 4, 5]], X, LABELS)
    for row in range(6):
        value = -sum(loss(model, X[row], *drawn(row, n), label=int(LABELS[row])) for n in range(3)) / 3
        torch.testing.assert_close(found["output"][row], value.detach())


def test_even_timesteps_are_the_middles_of_equal_shares() -> None:
    model = Denoiser()
    model.attribution_timesteps, model.attribution_draws = "even", 4
    found = [model.attribution_batch([X], Draw(range(6), "a", number))["timestep"] for number in range(4)]
    assert torch.stack(found).tolist() == [[t] * 6 for t in (2, 7, 12, 17)]
    model.attribution_draws = 3 * T  # more than there are timesteps: each is drawn as often
    times = [int(model.attribution_batch([X], Draw([0], "a", n))["timestep"]) for n in range(3 * T)]
    assert sorted(times) == sorted(list(range(T)) * 3)


def test_shared_noise_is_that_of_the_draw() -> None:
    model = Denoiser()
    own = model.attribution_batch([X], Draw(range(6), "a"))["noise"]
    assert len({tuple(row) for row in own.tolist()}) == 6
    model.attribution_noise = "shared"
    shared = [model.attribution_batch([X[rows]], Draw(rows, "a"))["noise"] for rows in ([0, 1, 2], [5, 4])]
    assert len({tuple(row) for row in torch.cat(shared).tolist()}) == 1
    other = model.attribution_batch([X], Draw(range(6), "a", 1))["noise"]
    assert not torch.equal(other[:3], shared[0])


def test_a_target_equal_to_a_training_sample_has_its_row() -> None:
    model = Denoiser()
    model.attribution_timesteps, model.attribution_noise = "even", "shared"
    rows = features(model, [[0], [1], [2]], torch.stack([X[0], X[1], X[0]]).repeat(2, 1))
    assert torch.equal(rows["features"][0], rows["features"][2])
    assert not torch.equal(rows["features"][0], rows["features"][1])


def test_a_row_at_a_timestep_is_measured_there_in_every_draw() -> None:
    model = Denoiser()
    for number in range(3):
        given = {"clean": X, "timestep": torch.arange(6)}
        completed = model.attribution_batch(given, Draw(range(6), "a", number))
        assert torch.equal(completed["timestep"], torch.arange(6))
        assert torch.equal(completed["noise"][2], Draw([2], "a", number).normal(SIZE)[0].double())
        assert "noise" not in given


def test_the_training_loss_is_the_mean_of_single_losses() -> None:
    model = LabelledDenoiser().double()
    torch.manual_seed(3)
    found = model.denoising_loss((X, LABELS))
    torch.manual_seed(3)
    t, noise = torch.randint(T, (6,)), torch.randn_like(X)
    expected = sum(loss(model, X[i], int(t[i]), noise[i], int(LABELS[i])) for i in range(6)) / 6
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("output", ["loss", "prediction"])
def test_a_run_is_traced_with_either_output(output: str) -> None:
    model = Denoiser()
    if output == "prediction":
        model.model_output = SquaredPrediction()
        model.attribution_timesteps, model.attribution_noise = "even", "shared"
    callback = AttributionCallback("run", method=TRAK(projector=IdentityProjector()), feature_dtype="float32")
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model, loader_of(DATA, batch_size=4))
    trajectory = sample_trajectory(model, (SIZE,), 2, steps=5)
    final = trainer.attribute(target_dataloaders=loader_of(trajectory.final()))
    by_step = trainer.attribute(target_dataloaders=loader_of(trajectory.at_steps()))
    assert final.scores.shape == (6, 2)
    assert by_step.scores.shape == (6, 10)
    assert (final.self_influence > 0).all()


def test_the_score_at_a_step_is_that_of_the_estimate_there() -> None:
    model = Denoiser()
    callback = AttributionCallback("run", method=GradDot(IdentityProjector()), feature_dtype="float32", log=False)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(model, loader_of(DATA, batch_size=4))
    trajectory = sample_trajectory(model, (SIZE,), 2, steps=4)
    scores = trainer.attribute(target_dataloaders=loader_of(trajectory.at_steps([1, 3]))).scores.values
    key = callback.store.snapshots[-1].key
    model = model.double()

    def gradient(x: Tensor, draws: list[tuple[int, Tensor]]) -> Tensor:
        value = -sum(loss(model, x, *draw) for draw in draws) / 3
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    for position, (step, j) in enumerate([(1, 0), (1, 1), (3, 0), (3, 1)]):
        t = int(trajectory.timesteps[step])
        noises = [drawn(len(DATA) + position, n, key)[1] for n in range(3)]
        target = gradient(trajectory.estimates[step, j].double(), [(t, noise) for noise in noises])
        for i in range(6):
            expected = gradient(X[i], [drawn(i, n, key) for n in range(3)]) @ target
            assert scores[i, position].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("noise", ["own", "shared"])
def test_targets_do_not_draw_the_numbers_of_the_training_samples_of_their_row(noise: str) -> None:
    # With the same noise, training sample 0 would be the first proponent of target 0, whatever they are.
    model = Denoiser()
    model.attribution_noise = noise
    callback = AttributionCallback("run", method=GradDot(IdentityProjector()), feature_dtype="float32", log=False)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(model, loader_of(DATA, batch_size=4))
    scores = trainer.attribute(target_dataloaders=loader_of(GeneratedSamples(DATA.tensors[0]))).scores.values
    key = callback.store.snapshots[-1].key
    model = model.double()

    def gradient(sample: int, row: int) -> Tensor:
        draws = [(drawn(row, n, key)[0], drawn(row if noise == "own" else 0, n, key)[1]) for n in range(3)]
        value = -sum(loss(model, X[sample], *draw) for draw in draws) / 3
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    expected = torch.stack([gradient(i, i) for i in range(6)]) @ torch.stack([gradient(j, 6 + j) for j in range(6)]).T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-5)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-1, T])
def test_a_timestep_outside_the_schedule(t: int) -> None:
    with pytest.raises(ValueError, match=rf"timesteps in \[0, {T}\), .* but got {t}\. Measure a sample at a step"):
        Denoiser().attribution_batch({"clean": X, "timestep": torch.tensor([0, t, 0, 0, 0, 0])}, Draw(range(6)))


def test_a_batch_without_clean_samples() -> None:
    with pytest.raises(TypeError, match=r"a batch \(x, \.\.\.\) of clean samples, .* but got keys \['image'\]"):
        Denoiser().attribution_batch({"image": X}, Draw(range(6)))
    with pytest.raises(TypeError, match=r"but got str\. Override `clean_samples\(self, batch\)` in Denoiser"):
        Denoiser().attribution_batch(["a seven"], Draw([0]))


@pytest.mark.parametrize(("labels", "found"), [(LABELS[:5], r"shape \(5,\)"), (["a seven"] * 6, "a list")])
def test_captions_that_are_not_one_a_sample(labels: Any, found: str) -> None:
    message = rf"`labels` of the conditioning of LabelledDenoiser .* each of the 6 samples, but got {found}\. Give each"
    with pytest.raises(ValueError, match=message):
        LabelledDenoiser().attribution_batch((X, labels), Draw(range(6)))
    with pytest.raises(ValueError, match=message):
        LabelledDenoiser().denoising_loss({"clean": X, "conditioning": {"labels": labels}})


def test_an_encoder_that_is_trained_but_not_attributed() -> None:
    class Encoded(LabelledDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Embedding(3, 1)

        def conditioning(self, batch: Any) -> dict[str, Tensor]:
            return {"labels": self.encoder(batch[1])[:, 0]}

    model = Encoded()
    message = r"`labels` of Encoded to be without gradients, .* compute it in `denoise`"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model.attribution_batch((X, LABELS), Draw(range(6)))
    model.encoder.requires_grad_(False)
    assert not model.attribution_batch((X, LABELS), Draw(range(6)))["conditioning"]["labels"].requires_grad
    with pytest.raises(ValueError, match="`clean` of Encoded to be without gradients"):
        model.attribution_batch((X.clone().requires_grad_(), LABELS), Draw(range(6)))


def test_an_output_without_one_value_a_sample() -> None:
    class Mean(DenoisingLoss):
        def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().output(outputs, targets).mean()

    model = Denoiser()
    model.model_output = Mean()
    with pytest.raises(ValueError, match=r"to return one value a sample, of shape \(4,\), but got \(\)"):
        plan(model.eval(), (X[:4].float(),), 4)


@pytest.mark.parametrize("option", ["attribution_timesteps", "attribution_noise"])
def test_an_unknown_option(option: str) -> None:
    model = Denoiser()
    setattr(model, option, "some")
    with pytest.raises(ValueError, match=rf"Expected `{option}` of Denoiser to be '\w+' or '\w+', but got 'some'"):
        model.attribution_batch([X], Draw(range(6)))


def test_a_prediction_of_the_wrong_shape() -> None:
    model = Denoiser()
    model.layer = torch.nn.Linear(SIZE + 2, 2 * SIZE)  # a mean and a variance
    batch = model.attribution_batch([X.float()], Draw(range(6)))
    with pytest.raises(ValueError, match=r"`denoise` of Denoiser .* samples, \(6, 3\), but got \(6, 6\)\. Of a model"):
        model.attribution_step(batch)


def test_an_unknown_prediction_type() -> None:
    model = Denoiser("flow")
    batch = model.attribution_batch([X.float()], Draw(range(6)))
    with pytest.raises(ValueError, match=r"`prediction_type` of the scheduler to be .* but got 'flow'"):
        model.attribution_step(batch)


@pytest.mark.parametrize(("name", "kind"), [("model", "network"), ("scheduler", "noise scheduler")])
def test_a_module_without_its_parts(name: str, kind: str) -> None:
    model = Denoiser()
    setattr(model, name, None)
    with pytest.raises(TypeError, match=rf"Expected Denoiser to hold its {kind} as `self\.{name}`"):
        model.attribution_step(model.attribution_batch([X.float()], Draw(range(6))))


def test_a_scheduler_without_a_length() -> None:
    model = Denoiser()
    model.scheduler.config = SimpleNamespace(prediction_type="epsilon")
    with pytest.raises(TypeError, match=r"configuration of the scheduler \(Scheduler\) to name `num_train_timesteps`"):
        model.attribution_batch([X], Draw(range(6)))


def test_the_configuration_may_be_a_mapping() -> None:
    model = Denoiser()
    model.scheduler.config = {"num_train_timesteps": 2, "prediction_type": "sample"}
    batch = model.attribution_batch([X.float()], Draw(range(6)))
    assert batch["timestep"].max() <= 1
    assert torch.equal(model.attribution_step(batch)[1], X.float())
