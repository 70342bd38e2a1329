"""Trace captioned images, and what a latent diffusion model makes of a caption, to the captioned training images.

The parts are those of Stable Diffusion, tiny: `AutoencoderKL` and `UNet2DConditionModel` of diffusers, `CLIPTextModel`
of transformers. The autoencoder is trained first; then U-Net and text encoder learn zeros, ones and sevens of
scikit-learn's digits with their captions. In the end they are retrained on 32 half subsets, to see how well the scores
predict what that does to held-out images. Run `python examples/latent_diffusion.py`; it takes two to three minutes, and
the figures go to `out/latent_diffusion/`.
"""

import logging
import shutil
import warnings
from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.metrics import linear_datamodeling_score, plot_denoising_steps
from lightning_attr.modalities import DiffusionMixin, sample_trajectory
from lightning_attr.outputs import DenoisingLoss, SquaredPrediction
from lightning_attr.randomness import Draw

OUT = Path("out/latent_diffusion")
N, HELD_OUT, BATCH, STEPS, SUBSETS, METHOD = 90, 45, 45, 120, 32, TRAK(damping=1.0)
NAMES = {0: "zero", 1: "one", 7: "seven"}
WORDS = ["<start>", "<end>", "a", *NAMES.values()]
QUIET = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
QUIET["accelerator"] = "cpu"


def tokens(captions: list[str]) -> Tensor:
    return torch.tensor([[WORDS.index(w) for w in ("<start>", *caption.split(), "<end>")] for caption in captions])


def trained_autoencoder(images: Tensor) -> AutoencoderKL:  # 1 x 8 x 8 pixels become 2 x 4 x 4 numbers
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(1, 1, block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, **blocks)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(250):
        batch = images[torch.randint(len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        loss = (vae.decode(posterior.sample()).sample - batch).square().mean() + 1e-3 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mean.std().item())
    return vae.eval().requires_grad_(False)


class LitLatentDiffusion(DiffusionMixin, L.LightningModule):
    """A batch is images and tokens. The text encoder is trained, too: that is why it runs in `denoise`."""

    model_output = SquaredPrediction()  # with the next line, this is D-TRAK
    attribution_timesteps, attribution_noise, attribution_draws = "even", "shared", 10

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(max_position_embeddings=4, **size, **special))
        size = {"sample_size": 4, "layers_per_block": 1, "block_out_channels": (16,), "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}  # captions come in between
        attention = {"cross_attention_dim": 16, "attention_head_dim": 4}
        self.model = UNet2DConditionModel(in_channels=2, out_channels=2, **size, **blocks, **attention)
        self.scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        self.vae = vae

    def clean_samples(self, batch: list[Tensor]) -> Tensor:
        return self.vae.encode(batch[0]).latent_dist.mean * self.vae.config.scaling_factor

    def conditioning(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"tokens": batch[1]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.model(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.denoising_loss(batch)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fitted(vae: AutoencoderKL, pairs: TensorDataset, seed: int, trainer: L.Trainer) -> LitLatentDiffusion:
    L.seed_everything(seed, verbose=False)
    model = LitLatentDiffusion(vae)
    trainer.fit(model, DataLoader(pairs, batch_size=BATCH, shuffle=True))
    return model.eval()


@torch.no_grad()
def denoised(model: LitLatentDiffusion, *pairs: Tensor) -> Tensor:
    """Minus the loss of each pair, mean over noises that no score was computed with."""
    draws = [model.attribution_batch(pairs, Draw(range(len(pairs[0])), "truth", number)) for number in range(10)]
    return torch.stack([DenoisingLoss().output(*model.attribution_step(draw)) for draw in draws]).mean(0)


def plot_steps(trainer: AttributionTrainer, model: LitLatentDiffusion, images: Tensor, captions: list[str]) -> None:
    """Generate an image of each caption, and trace what the model took it for while it denoised."""
    wanted = [f"a {name}" for name in NAMES.values()]
    trajectory = sample_trajectory(model, (2, 4, 4), len(wanted), conditioning={"tokens": tokens(wanted)})
    steps = range(0, len(trajectory.timesteps), 7)
    by_step = trainer.attribute(target_dataloaders=DataLoader(trajectory.at_steps(steps), batch_size=64), method=METHOD)
    top = by_step.scores.topk(3)[0].view(len(steps), len(wanted), 3)
    for j, caption in enumerate(wanted):
        decoded = model.vae.decode(trajectory.estimates[steps, j] / model.vae.config.scaling_factor).sample
        figure, _ = plot_denoising_steps(
            [(image, f"t = {trajectory.timesteps[s]}") for image, s in zip(decoded.clamp(-1, 1), steps, strict=True)],
            [[(images[i], f"#{i}: {captions[i]}") for i in found[j]] for found in top],
        )
        figure.savefig(OUT / f"steps_of_{caption.replace(' ', '_')}.png")


def main() -> None:
    torch.set_num_threads(1)  # on images as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    shutil.rmtree(OUT, ignore_errors=True)
    pixels, digits = (torch.tensor(column) for column in load_digits(return_X_y=True))
    rows = torch.isin(digits, torch.tensor(list(NAMES))).nonzero().flatten()[: N + HELD_OUT]
    captions = [f"a {NAMES[digit]}" for digit in digits[rows].tolist()]
    images, texts = pixels[rows].float().view(-1, 1, 8, 8) / 8 - 1, tokens(captions)
    train, held_out = TensorDataset(images[:N], texts[:N]), TensorDataset(images[N:], texts[N:])

    L.seed_everything(0, verbose=False)
    vae = trained_autoencoder(train.tensors[0])
    callbacks = [AttributionCallback(OUT / "attribution", snapshots=12)]
    trainer = AttributionTrainer(max_epochs=STEPS * BATCH // N, callbacks=callbacks, **QUIET)
    model = fitted(vae, train, 0, trainer)
    wrong = tokens([f"a {NAMES[{0: 1, 1: 7, 7: 0}[digit]]}" for digit in digits[rows[N:]].tolist()])
    told, misled = (-denoised(model, images[N:], given).mean() for given in (texts[N:], wrong))
    print(f"Loss of held-out images {told:.2f}, and {misled:.2f} where the caption names another digit")
    plot_steps(trainer, model, images, captions)

    result = trainer.attribute(target_dataloaders=DataLoader(held_out, batch_size=HELD_OUT), method=METHOD)
    masks = torch.rand(SUBSETS, N, generator=torch.Generator().manual_seed(0)).argsort(1) < N // 2
    truth = []
    for mask in masks:  # one seed for all: they differ in their data only
        retrained = fitted(vae, TensorDataset(*train[mask]), 1, L.Trainer(max_epochs=-1, max_steps=STEPS, **QUIET))
        truth.append(denoised(retrained, *held_out.tensors))
    same = (texts[:N, None] == texts[None, N:]).all(2).double()
    print(f"LDS over {SUBSETS} half subsets, {HELD_OUT} held-out images [95 % interval]:")
    for name, scores in {"D-TRAK": result.scores.values, "same caption or not": same}.items():
        found = linear_datamodeling_score(scores, masks, torch.stack(truth))
        print(f"  {name:20s} {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")
    print(f"Figures: {OUT}/steps_of_*.png")


if __name__ == "__main__":
    main()
