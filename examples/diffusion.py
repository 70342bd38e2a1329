"""Trace images that a DDPM generates to its training images, as a whole and step by step of their denoising.

A `UNet2DModel` of diffusers learns zeros and ones from 160 of scikit-learn's digits. In the end it is retrained
without the strongest proponents of the generated zeros, without those of the ones, and without as many random images,
and generates of the same noise again. Run `python examples/diffusion.py`; it takes one to two minutes, and the figures
go to `out/diffusion/`.
"""

import logging
import shutil
import warnings
from pathlib import Path

import lightning as L
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.metrics import plot_denoising_steps
from lightning_attr.modalities import DiffusionMixin, sample_trajectory
from lightning_attr.outputs import SquaredPrediction

OUT = Path("out/diffusion")
N, BATCH, STEPS, REMOVED, SEEDS = 160, 32, 200, 48, (1, 2, 3)
TIMESTEPS, GENERATED, SHOWN, METHOD = 100, 32, 3, TRAK(damping=10.0)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


class LitDDPM(DiffusionMixin, L.LightningModule):
    """The mixin wants a `model` and a `scheduler`, and batches `[images]`."""

    model_output = SquaredPrediction()  # with the next line, this is D-TRAK
    attribution_timesteps, attribution_noise, attribution_draws = "even", "shared", 10

    def __init__(self) -> None:
        super().__init__()
        self.model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        )
        self.scheduler = DDPMScheduler(TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.denoising_loss(batch)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loader_of(images: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images), batch_size=BATCH, shuffle=True)


def generated_without(left_out: Tensor, images: Tensor, seed: int) -> Tensor:
    """Retrain with copies of others in the place of some images, and generate of the same noises as before.

    So every step takes the same places and noises whatever is left out, and only the images make a difference.
    """
    kept = torch.ones(N, dtype=torch.bool)
    kept[left_out] = False
    generator = torch.Generator().manual_seed(seed)
    copies = kept.nonzero()[torch.randint(N - len(left_out), left_out.shape, generator=generator), 0]
    L.seed_everything(seed, verbose=False)
    model = LitDDPM()
    trainer = L.Trainer(max_epochs=STEPS * BATCH // N, accelerator="cpu", **QUIET)
    trainer.fit(model, loader_of(images.index_copy(0, left_out, images[copies])))
    return sample_trajectory(model, (1, 8, 8), GENERATED).samples


def main() -> None:
    torch.set_num_threads(1)  # on images as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    shutil.rmtree(OUT, ignore_errors=True)
    pixels, labels = load_digits(n_class=2, return_X_y=True)
    images, labels = torch.tensor(pixels[:N]).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels[:N])

    L.seed_everything(0, verbose=False)
    model = LitDDPM()
    callback = AttributionCallback(OUT / "attribution", snapshots=10)
    trainer = AttributionTrainer(max_epochs=STEPS * BATCH // N, accelerator="cpu", callbacks=[callback], **QUIET)
    trainer.fit(model, loader_of(images))

    trajectory = sample_trajectory(model, (1, 8, 8), GENERATED)
    result = trainer.attribute(target_dataloaders=DataLoader(trajectory.final(), batch_size=GENERATED), method=METHOD)
    proponents, scores = result.scores.topk(5)
    for j in range(SHOWN):
        found = ", ".join(f"#{i} “{labels[i]}” {s:+.2g}" for i, s in zip(proponents[j], scores[j], strict=True))
        print(f"Image {j} is made by {found}")

    shown = sample_trajectory(model, (1, 8, 8), SHOWN)
    steps = range(0, len(shown.timesteps), 7)
    rows = shown.at_steps(steps)
    by_step = trainer.attribute(target_dataloaders=DataLoader(rows, batch_size=len(rows)), method=METHOD)
    top = by_step.scores.topk(3)[0].view(len(steps), SHOWN, 3)
    pictures, estimates = images / 2 + 0.5, shown.estimates.clamp(-1, 1) / 2 + 0.5
    for j in range(SHOWN):
        figure, _ = plot_denoising_steps(
            [(estimates[s, j], f"t = {shown.timesteps[s]}") for s in steps],
            [[(pictures[i], f"#{i}: “{labels[i]}”") for i in found[j]] for found in top],
        )
        figure.savefig(OUT / f"steps_of_image_{j}.png")
    figure, _ = result.plot_proponents(pictures, estimates[-1], range(SHOWN), k=4)
    figure.savefig(OUT / "proponents.png")

    ones = labels[proponents].double().mean(1) > 0.5
    changes = torch.empty(len(SEEDS), 2)
    for s, seed in enumerate(SEEDS):
        random = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:REMOVED]
        complete, without_random = (generated_without(rows, images, seed) for rows in (random[:0], random))
        of_images = torch.empty(GENERATED, 2)
        for group in (ones, ~ones):
            removed = result.scores.values[:, group].mean(1).topk(REMOVED).indices
            for k, other in enumerate((generated_without(removed, images, seed), without_random)):
                squares = (other - complete)[group].square().mean((1, 2, 3))
                of_images[group, k] = squares.sqrt() / 2  # pixels are 2 apart at most
        changes[s] = of_images.mean(0)
    by_proponents, by_random = changes.mean(0).tolist()
    excess = changes[:, 0] - changes[:, 1]
    half = 4.303 * excess.std().item() / len(SEEDS) ** 0.5  # Student's t, two degrees of freedom, 95 %
    print(
        f"{ones.sum()} of {GENERATED} images are made by ones. Change of the images, of the same noise, by retraining"
    )
    print(f"without {REMOVED} of {N} training images (root mean square, as a share of the range of the pixels):")
    print(f"  without the proponents of their digit {by_proponents:.3f}, without random images {by_random:.3f}")
    low, high = excess.mean() - half, excess.mean() + half
    print(f"  difference {excess.mean():+.3f}, 95 % interval of {len(SEEDS)} seeds [{low:+.3f}, {high:+.3f}]")
    print(f"Figures: {OUT}/proponents.png, {OUT}/steps_of_image_*.png")


if __name__ == "__main__":
    main()
