"""Networks of diffusers: every layer has a rule, which gives what one sample after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, plan
from lightning_attr.gradients import loop_gradients
from lightning_attr.modalities.diffusion import DiffusionMixin
from lightning_attr.outputs import DenoisingLoss, ModelOutput, SquaredPrediction
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.draws import Draw

diffusers = pytest.importorskip("diffusers", minversion="0.30", reason="needs diffusers")
transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.slow  # importing diffusers takes seconds

B, SIZE = 5, 8
SMALL: dict[str, Any] = {
    "sample_size": SIZE,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
DOWN, UP = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")


class Denoiser(DiffusionMixin, nn.Module):
    """A batch is `(x, condition)`."""

    attribution_draws = 2

    def __init__(self, network: nn.Module, prediction_type: str = "epsilon", condition: str = "") -> None:
        super().__init__()
        self.model, self.condition = network, condition
        self.scheduler = diffusers.DDPMScheduler(50, prediction_type=prediction_type)

    def conditioning(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {self.condition: batch[1]} if self.condition else {}


class Captioned(Denoiser):
    """Latents of a frozen autoencoder, and a text encoder that is trained; a batch is `(x, tokens)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, "v_prediction", "tokens")
        size = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"vocab_size": 7, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = transformers.CLIPTextConfig(max_position_embeddings=4, **size, **special)
        self.text_encoder = transformers.CLIPTextModel(config)
        self.autoencoder = _autoencoder(latent_channels=1).model.requires_grad_(False)

    def clean_samples(self, batch: list[Tensor]) -> Tensor:
        return self.autoencoder.encode(batch[0]).latent_dist.mean

    def denoise(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.model(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


class Decoder(AttributionMixin, nn.Module):
    """An autoencoder that is itself trained."""

    model_output = DenoisingLoss()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def attribution_step(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.model(batch[0]).sample, batch[0]


def _attention() -> nn.Module:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    network = diffusers.UNet2DModel(
        in_channels=1, out_channels=1, attention_head_dim=4, down_block_types=down, up_block_types=up, **SMALL
    )
    return Denoiser(network)


def _velocity() -> nn.Module:
    network = diffusers.UNet2DModel(
        in_channels=1, out_channels=1, add_attention=False, down_block_types=DOWN, up_block_types=UP, **SMALL
    )
    return Denoiser(network, "v_prediction")


def _classes() -> nn.Module:
    network = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        add_attention=False,
        num_class_embeds=4,
        down_block_types=DOWN,
        up_block_types=UP,
        **SMALL,
    )
    return Denoiser(network, "sample", "class_labels")


def _text(captioned: bool = False) -> nn.Module:
    network = diffusers.UNet2DConditionModel(
        in_channels=1,
        out_channels=1,
        attention_head_dim=2,
        cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **SMALL,
    )
    return Captioned(network) if captioned else Denoiser(network, condition="encoder_hidden_states")


def _autoencoder(latent_channels: int = 2) -> Any:
    network = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **SMALL,
    )
    return Decoder(network)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "UNet2DModel with attention": (_attention, lambda: torch.zeros(B)),
    "UNet2DModel, velocity": (_velocity, lambda: torch.zeros(B)),
    "UNet2DModel with classes": (_classes, lambda: torch.arange(B) % 4),
    "UNet2DConditionModel": (_text, lambda: torch.randn(B, 3, 6).double()),
    "latents, tokens, and a text encoder": (lambda: _text(captioned=True), lambda: torch.randint(2, 7, (B, 4))),
    "AutoencoderKL": (_autoencoder, lambda: torch.zeros(B)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, list[Tensor]]:
    make, condition = CASES[request.param]
    module = make().double().eval()
    with torch.no_grad():  # no weight at a special value
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module, [torch.randn(B, 1, SIZE, SIZE).double(), condition()]


def _plan(module: Any, batch: list[Tensor]) -> AttributionPlan:
    return plan(module, [x[:4] for x in batch], 4)


def _features(module: Any, batch: list[Tensor], rows: list[int]) -> Tensor:
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    featurizer = Featurizer(module, _plan(module, batch), projection, snapshot="final")
    return featurizer([x[rows] for x in batch], rows)["features"]


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _reference(module: Any, batch: list[Tensor]) -> Tensor:
    """Mean over the draws of a backward pass a sample."""
    trainable = _trainable(module)
    count = getattr(module, "attribution_draws", 1)
    total = torch.zeros(())
    for number in range(count):
        completed = module.attribution_batch(batch, Draw(range(B), "final", number))
        rows = loop_gradients(lambda p, b: module.functional_output(p, {}, b), trainable, completed, B)
        total = total + torch.cat([rows[name].flatten(1) for name in trainable], 1) / count
    return total


@pytest.mark.parametrize("output", [DenoisingLoss(), SquaredPrediction()])
def test_gradients_are_those_of_one_sample_after_the_other(case: Any, output: ModelOutput) -> None:
    module, batch = case
    module.model_output = output
    expected = _reference(module, batch)
    for rows in ([0, 1, 2, 3, 4], [4, 2]):
        found = _features(module, batch, rows)
        assert (found - expected[rows]).abs().max() < 1e-10 * expected.abs().max()


def test_no_parameter_needs_a_fallback(case: Any) -> None:
    module, batch = case
    found = _plan(module, batch)
    assert found.fallback == ()
    assert set(found.hooked) == set(_trainable(module))


def test_the_gradient_of_the_loss_is_that_of_the_output(case: Any) -> None:
    module, batch = case
    drawn = module.attribution_batch(batch, Draw(range(B), "final"))
    loss, output = (part({}, {}, drawn) for part in (module.functional_loss, module.functional_output))
    q = module.model_output.out_to_loss(*module.attribution_step(drawn))
    parameters = list(_trainable(module).values())
    for i in range(B):
        of_loss, of_output = (torch.autograd.grad(f[i], parameters, retain_graph=True) for f in (loss, output))
        for one, other in zip(of_loss, of_output, strict=True):
            torch.testing.assert_close(one, -q[i] * other, rtol=1e-10, atol=1e-12)


def test_a_text_encoder_that_is_trained_has_gradients() -> None:
    module: Any = _text(captioned=True).double().eval()
    batch = [torch.randn(B, 1, SIZE, SIZE).double(), torch.randint(2, 7, (B, 4))]
    drawn = module.attribution_batch(batch, Draw(range(B), "final"))
    rows = loop_gradients(lambda p, b: module.functional_output(p, {}, b), _trainable(module), drawn, B)
    words = rows["text_encoder.embeddings.token_embedding.weight"].abs().sum(2) > 0
    for found, tokens in zip(words, batch[1], strict=True):
        assert set(found.nonzero().flatten().tolist()) == set(tokens.tolist())


def test_sampling_with_schedulers_of_diffusers() -> None:
    from lightning_attr.modalities.trajectories import sample_trajectory

    module = _velocity()
    for scheduler in (None, diffusers.DDIMScheduler(50, prediction_type="v_prediction")):
        many, few = (sample_trajectory(module, (1, SIZE, SIZE), n, 5, scheduler=scheduler) for n in (3, 1))
        torch.testing.assert_close(many.samples[:1], few.samples, atol=1e-4, rtol=1e-3)
        assert many.timesteps.tolist() == [40, 30, 20, 10, 0]
        assert many.samples.isfinite().all()
    assert len(module.scheduler.timesteps) == 50
