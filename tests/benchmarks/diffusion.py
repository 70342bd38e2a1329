"""LDS on a DDPM of 8x8 digits: one run with its snapshots against Grad-Dot and TRAK at its end, and D-TRAK.

Run `python tests/benchmarks/diffusion.py`. The first time it retrains the model on 48 subsets, four to five minutes of
one CPU core, and keeps the weights in `~/.cache/lightning_attr`; then it takes two and a half minutes.

The truth is how well a retrained model denoises held-out digits, and images that the attributed run generated, over the
whole schedule with noises that no score was computed with. All subsets are trained from one initialization, with one
sequence of noises, those of another seed than the attributed run's: a model of another seed
denoises everything a little better or worse, which hides what the subsets do where each is trained only once.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # ships no types
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.modalities.diffusion import DiffusionMixin
from lightning_attr.modalities.trajectories import GeneratedSamples, sample_trajectory
from lightning_attr.outputs import SquaredPrediction

N_TRAIN, N_TARGET = 80, 40
SUBSET_SIZE = N_TRAIN // 2
REPORT, TUNE = 32, 16  # subsets; settings are chosen on the second, numbers are reported on the first
STEPS, LEARNING_RATE, T = 200, 5e-3, 100
RUN_SEED, TRUTH_SEED = 0, 1
DRAWS, EVERY, DAMPINGS = 16, 25, (0.1, 1.0, 10.0)
GENERATED = 20
CACHE = Path.home() / ".cache" / "lightning_attr"
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
}


class DigitsDDPM(DiffusionMixin, L.LightningModule):
    """40k parameters; a batch is `[images]` in [-1, 1]."""

    attribution_draws = DRAWS
    attribution_timesteps = "even"

    def __init__(self) -> None:
        super().__init__()
        self.model = UNet2DModel(**UNET)
        self.scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.denoising_loss(batch)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out images, float32 in [-1, 1], (N_TRAIN, 1, 8, 8) and (N_TARGET, 1, 8, 8)."""
    pixels = torch.from_numpy(load_digits().data).float().view(-1, 1, 8, 8) / 8 - 1
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: N_TRAIN + N_TARGET]
    return pixels[chosen[:N_TRAIN]], pixels[chosen[N_TRAIN:]]


def subset_masks() -> Tensor:
    """Random half subsets, (REPORT + TUNE, N_TRAIN) bool."""
    generator = torch.Generator().manual_seed(2)
    ranks = torch.rand(REPORT + TUNE, N_TRAIN, generator=generator).argsort(1).argsort(1)
    return ranks < SUBSET_SIZE


def trained(images: Tensor, seed: int) -> DigitsDDPM:
    """A model after STEPS steps of SUBSET_SIZE images each."""
    torch.manual_seed(seed)
    module = DigitsDDPM()
    (optimizer,), (schedule,) = module.configure_optimizers()
    batches = torch.cat([torch.randperm(len(images)) for _ in range(STEPS * SUBSET_SIZE // len(images))])
    for batch in batches.split(SUBSET_SIZE):
        optimizer.zero_grad()
        module.denoising_loss([images[batch]]).backward()
        optimizer.step()
        schedule["scheduler"].step()
    return module.eval()


def retrained() -> dict[str, Tensor]:
    """Weights of the models trained on each subset, stacked; from the cache or, the first time, by training."""
    recipe = repr((UNET, N_TRAIN, SUBSET_SIZE, REPORT, TUNE, STEPS, LEARNING_RATE, T, TRUTH_SEED))
    path = CACHE / f"diffusion-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        train, _ = digits()
        masks = subset_masks()
        print(f"Training {len(masks)} models for {path}", file=sys.stderr, flush=True)
        weights = [trained(train[mask], TRUTH_SEED).state_dict() for mask in masks]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.stack([w[name] for w in weights]) for name in weights[0]}, path)
    return load_file(path)


@torch.no_grad()
def denoised(weights: dict[str, Tensor], targets: Tensor) -> Tensor:
    """What is attributed, of each retrained model and target, (models, targets): the same 40 noises for all."""
    module, generator = DigitsDDPM().eval(), torch.Generator().manual_seed(3)
    draws = [(t, torch.randn(1, 1, 8, 8, generator=generator)) for t in range(2, T, 5) for _ in range(2)]
    outputs = torch.zeros(REPORT + TUNE, len(targets))
    for model, row in enumerate(outputs):
        module.load_state_dict({name: values[model] for name, values in weights.items()})
        for t, noise in draws:
            timestep = torch.full((len(targets),), t)
            batch = {"clean": targets, "noise": noise.expand_as(targets), "timestep": timestep, "conditioning": {}}
            row += module.model_output.output(*module.attribution_step(batch)) / len(draws)
    return outputs


def lightning_run(folder: str, draws_like_dtrak: bool) -> tuple[AttributionTrainer, DigitsDDPM]:
    """The attributed run; it is the same one whatever is attributed of it."""
    L.seed_everything(RUN_SEED, verbose=False)
    module = DigitsDDPM()
    if draws_like_dtrak:
        module.model_output, module.attribution_noise = SquaredPrediction(), "shared"
    callback = AttributionCallback(folder, snapshots=EVERY, log=False, batch_size=N_TRAIN)
    trainer = quiet_trainer(max_epochs=STEPS * SUBSET_SIZE // N_TRAIN, callbacks=[callback])
    loader = DataLoader(TensorDataset(digits()[0]), batch_size=SUBSET_SIZE, shuffle=True)
    trainer.fit(module, loader)
    return trainer, module


def quiet_trainer(**settings: object) -> AttributionTrainer:
    """A trainer that prints and keeps nothing."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return AttributionTrainer(accelerator="cpu", **quiet, **settings)


def all_scores(held_out: Tensor) -> tuple[Tensor, list[tuple[str, float | None, Tensor]]]:
    """The targets, held out and generated, and of each method name, damping and scores (N_TRAIN, targets)."""
    with tempfile.TemporaryDirectory() as folder:
        first = lightning_run(f"{folder}/trak", draws_like_dtrak=False)
        generated = sample_trajectory(first[1], (1, 8, 8), GENERATED).samples.clamp(-1, 1)
        targets = torch.cat([held_out, generated])
        loader = DataLoader(GeneratedSamples(targets), batch_size=len(targets))
        rows: list[tuple[str, float | None, Tensor]] = []
        for name, (trainer, module) in {
            "TRAK": first,
            "D-TRAK": lightning_run(f"{folder}/d-trak", draws_like_dtrak=True),
        }.items():
            at_end = {
                "model": module,
                "train_dataloaders": DataLoader(TensorDataset(digits()[0]), batch_size=N_TRAIN),
                "target_dataloaders": loader,
            }
            if name == "TRAK":
                result = quiet_trainer().attribute(**at_end, method=GradDot())
                rows.append(("Grad-Dot, final snapshot", None, result.scores.values))
            for damping in DAMPINGS:
                method = TRAK(damping=damping)
                result = quiet_trainer().attribute(**at_end, method=method)
                rows.append((f"{name}, final snapshot", damping, result.scores.values))
                result = trainer.attribute(target_dataloaders=loader, method=method)
                count = len(result.scores.provenance["snapshots"])
                rows.append((f"{name}, one run, {count} snapshots", damping, result.scores.values.clone()))
    return targets, rows


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    weights, masks = retrained(), subset_masks()
    targets, rows = all_scores(digits()[1])
    outputs = denoised(weights, targets)
    best: dict[str, tuple[float, float | None, Tensor]] = {}
    for name, damping, scores in rows:
        tuned = float(linear_datamodeling_score(scores, masks[REPORT:], outputs[REPORT:], bootstrap=0).mean)
        print(f"  {name}, damping {damping}: {tuned:.3f} on the subsets that choose", file=sys.stderr)
        best[name] = max(best.get(name, (-1.0, None, scores)), (tuned, damping, scores), key=lambda row: row[0])
    print(f"LDS over {REPORT} half subsets [95 % interval]")
    print("| | damping | held-out digits | generated images |\n|---|---|---|---|")
    for name, (_, damping, scores) in best.items():
        cells = []
        for part in (slice(N_TARGET), slice(N_TARGET, None)):
            found = linear_datamodeling_score(scores[:, part], masks[:REPORT], outputs[:REPORT, part])
            cells.append(f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")
        print(f"| {name} | {damping} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
