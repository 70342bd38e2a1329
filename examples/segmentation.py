"""Find corrupted masks in the training data of a U-Net, and retrain without the suspicious.

scikit-learn's digits with noise, to be told from the background pixel by pixel; a tenth of the masks lie one
pixel off. Run `python examples/segmentation.py`; takes about half a minute.
"""

import logging
import math
import tempfile
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.outputs import PixelMargin

EPOCHS, SEEDS = 40, (1, 2, 3)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class UNet(nn.Module):
    """One level down and up again, with a connection across."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        across = self.down(x)
        return self.head(torch.cat([across, self.up(self.bottom(across))], 1))


class LitSegmenter(AttributionMixin, L.LightningModule):
    """Attributes the mean margin of an image's pixels."""

    model_output = PixelMargin()

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, mask = batch
        return binary_cross_entropy_with_logits(self(x), mask.unsqueeze(1).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def masked_digits() -> tuple[TensorDataset, TensorDataset, Tensor]:
    """200 training images and 500 test images, and which training masks lie off."""
    digits = torch.tensor(load_digits().data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    masks = (digits.squeeze(1) > 0.5).long()
    generator = torch.Generator().manual_seed(0)
    noisy = digits + 0.3 * torch.randn(digits.shape, generator=generator)
    x, test_x, y, test_y = train_test_split(noisy, masks, train_size=200, test_size=500, random_state=0)
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=generator)[: len(y) // 10]] = True
    y[wrong] = y[wrong].roll((1, 1), (1, 2))
    return TensorDataset(x, y), TensorDataset(test_x, test_y), wrong


def overlap_of(train: Dataset, test: TensorDataset, seed: int) -> float:
    """Train from scratch; mean intersection over union of the test images."""
    L.seed_everything(seed, verbose=False)
    module = LitSegmenter()
    L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET).fit(module, DataLoader(train, 32, shuffle=True))
    x, mask = test.tensors
    with torch.no_grad():
        found, mask = module.eval()(x).squeeze(1) > 0, mask.bool()
    return ((found & mask).sum((1, 2)) / (found | mask).sum((1, 2))).mean().item()


def main() -> None:
    torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    train, test, wrong = masked_digits()
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [AttributionCallback(folder, noise_mask=wrong)]
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, **QUIET)
        trainer.fit(LitSegmenter(), DataLoader(train, batch_size=32, shuffle=True))
        result = trainer.attribute(target_dataloaders=DataLoader(Subset(test, range(50)), batch_size=50))

    print("Which masks are wrong?      self-influence   training loss")
    for name, key in {"AUROC": "noisy_label_auroc", "Found in the top 10 %": "noisy_label_recall@10%"}.items():
        print(f"  {name:26s} {result.metrics[key]:12.3f}   {result.metrics['loss_' + key]:13.3f}")

    kept, overlaps = result.select(0.9, by="self_influence").tolist(), []
    for seed in SEEDS:
        random = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(kept)].tolist()
        overlaps.append([overlap_of(Subset(train, rows), test, seed) for rows in (kept, random)])
    values = torch.tensor(overlaps)
    gain = values[:, 0] - values[:, 1]
    half = 4.303 * gain.std().item() / math.sqrt(len(SEEDS))  # Student's t with two degrees of freedom
    without, at_random = values.mean(0).tolist()
    print(
        f"Intersection over union after retraining, {len(SEEDS)} seeds: {without:.3f} without the most suspicious 10 %,"
    )
    print(f"{at_random:.3f} without a random 10 %; gain {gain.mean():+.3f}, 95 % interval ± {half:.3f}")


if __name__ == "__main__":
    main()
