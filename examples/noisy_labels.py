"""Find flipped labels in scikit-learn's digits, trace predictions to images, and retrain without the suspicious.

Run `python examples/noisy_labels.py`; figures and the feature store go to `out/noisy_labels/`. Takes about a minute.
"""

import logging
import shutil
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.metrics import DataSelectionCurve

OUT = Path("out/noisy_labels")
EPOCHS, SEEDS, FRACTIONS = 40, (1, 2, 3), (0.05, 0.1, 0.2, 0.3)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class LitClassifier(AttributionMixin, L.LightningModule):
    """An (x, y) classifier: the mixin needs nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=EPOCHS - 1)]


class NoisyDigits(L.LightningDataModule):
    """1,437 training images, a tenth of their labels flipped to another class, and 360 clean test images."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        images = images.float().view(-1, 1, 8, 8) / 16
        x, test_x, y, test_y = train_test_split(images, labels, test_size=360, random_state=0)
        generator = torch.Generator().manual_seed(0)
        self.flipped = torch.zeros(len(y), dtype=torch.bool)
        self.flipped[torch.randperm(len(y), generator=generator)[: len(y) // 10]] = True
        wrong = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
        self.train_set = TensorDataset(x, torch.where(self.flipped, wrong, y))
        self.test_set = TensorDataset(test_x, test_y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=360)


def test_accuracy(data: NoisyDigits, keep: torch.Tensor, seed: int) -> float:
    """Retrain from scratch on some of the samples."""
    L.seed_everything(seed, verbose=False)
    model = LitClassifier()
    loader = DataLoader(Subset(data.train_set, keep.tolist()), batch_size=64, shuffle=True)
    L.Trainer(max_epochs=EPOCHS, logger=False, accelerator="cpu", **QUIET).fit(model, loader)
    x, y = data.test_set.tensors
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def main() -> None:
    torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    shutil.rmtree(OUT, ignore_errors=True)
    L.seed_everything(0, verbose=False)
    data, model = NoisyDigits(), LitClassifier()
    n = len(data.train_set)

    trainer = AttributionTrainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=CSVLogger(OUT, name="logs", version=0),
        callbacks=[AttributionCallback(OUT / "attribution", noise_mask=data.flipped), AttributionMonitor()],
        **QUIET,
    )
    trainer.fit(model, datamodule=data)
    result = trainer.attribute(data)

    metrics = result.metrics
    print("                               self-influence   training loss")
    for name, key in {
        "Noisy-label AUROC": "noisy_label_auroc",
        "Flipped found in top 10 %": "noisy_label_recall@10%",
    }.items():
        print(f"{name:30s} {metrics[key]:14.3f}  {metrics['loss_' + key]:14.3f}")
    x_test, y_test = data.test_set.tensors
    labels = data.train_set.tensors[1]
    proponents, scores = result.scores.topk(5)
    for j in range(3):
        found = ", ".join(f"#{i} “{labels[i]}” {s:+.2f}" for i, s in zip(proponents[j], scores[j], strict=True))
        print(f"Test digit {j} (a {y_test[j]}) is made by  {found}")

    curve = DataSelectionCurve()
    for seed in SEEDS:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for fraction in FRACTIONS:
            kept = result.select(1 - fraction, by="self_influence")
            curve.update(fraction, test_accuracy(data, kept, seed), arm="method")
            curve.update(fraction, test_accuracy(data, order[: len(kept)], seed), arm="random")
    summary = curve.summary()
    clean = torch.tensor([test_accuracy(data, (~data.flipped).nonzero().flatten(), seed) for seed in SEEDS])
    tenth = FRACTIONS.index(0.1)
    print(f"Test accuracy after retraining, mean of {len(SEEDS)} seeds (sd)")
    for name, arm in {"without the most suspicious 10 %": "method", "without a random 10 %": "random"}.items():
        print(f"  {name:34s} {summary.mean[arm][tenth]:.3f} ({summary.std[arm][tenth]:.3f})")
    print(f"  {'without all flipped labels':34s} {clean.mean():.3f} ({clean.std():.3f})")

    figures = {
        "detection_curve": result.plot_detection(),
        "proponents": result.plot_proponents(data.train_set.tensors[0], x_test, targets=range(3)),
        "selection_curve": curve.plot(metric="test accuracy"),
    }
    figures["selection_curve"][1].set_xlabel("training samples removed")
    for name, (figure, _) in figures.items():
        figure.savefig(OUT / f"{name}.png")
    print(f"Figures: {', '.join(str(OUT / f'{name}.png') for name in figures)}")


if __name__ == "__main__":
    main()
