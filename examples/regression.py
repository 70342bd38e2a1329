"""Attribute a regression with a robust loss: a model output of one's own, and batches that are dicts.

scikit-learn's diabetes data, a small network trained with the Huber loss. The scores are put to the test: retrain
without the proponents of a prediction, and see by how much it falls. Run `python examples/regression.py`; takes about
half a minute.
"""

import logging
import tempfile
import warnings

import lightning as L
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_attr import AttributionMixin, AttributionTrainer, ModelOutput
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.testing import check_model_output

REMOVED, SEEDS = 30, (0, 1, 2)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class HuberRegression(ModelOutput):
    """The prediction is attributed; the Huber loss says how hard a sample pulls at it."""

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return huber_loss(outputs, targets, reduction="none")

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets - outputs).clamp(-1, 1)

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((targets - outputs).abs() < 1).to(outputs.dtype)


class Patients(Dataset):
    """Each sample is a dict; standardised disease progression after one year from ten measurements."""

    def __init__(self) -> None:
        x, y = load_diabetes(return_X_y=True)
        self.x = torch.tensor(x / x.std(0), dtype=torch.float32)
        self.y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"measurements": self.x[i], "progression": self.y[i]}


class Diabetes(L.LightningDataModule):
    """342 patients to train on, and 100 whose predictions are explained."""

    def __init__(self) -> None:
        super().__init__()
        data = Patients()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        self.train_set, self.test_set = Subset(data, order[:342]), Subset(data, order[342:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=32, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=len(self.test_set))


class LitRegression(AttributionMixin, L.LightningModule):
    model_output = HuberRegression()

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    def attribution_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.net(batch["measurements"]).squeeze(1), batch["progression"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return huber_loss(*self.attribution_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def predictions_without(removed: Tensor, train: Subset, targets: DataLoader) -> Tensor:
    """Mean prediction of the targets over retrainings without some samples."""
    kept = [i for i in range(len(train)) if i not in set(removed.tolist())]
    outputs = []
    for seed in SEEDS:
        L.seed_everything(seed, verbose=False)
        model = LitRegression()
        loader = DataLoader(Subset(train, kept), batch_size=32, shuffle=True)
        L.Trainer(max_epochs=20, accelerator="cpu", **QUIET).fit(model, loader)
        with torch.no_grad():
            outputs.append(model.attribution_step(next(iter(targets)))[0])
    return torch.stack(outputs).mean(0)


def main() -> None:
    torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    check_model_output(HuberRegression(), outputs=torch.tensor([0.0, 3.0]), targets=torch.tensor([0.5, 0.0]))
    data = Diabetes()
    train, targets = data.train_set, data.test_dataloader()

    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AttributionTrainer(max_epochs=20, accelerator="cpu", callbacks=[AttributionCallback(folder)], **QUIET)
        trainer.fit(LitRegression(), datamodule=data)
        result = trainer.attribute(data)

    proponents, scores = result.scores.topk(REMOVED)
    complete = predictions_without(torch.tensor([]), train, targets)
    random = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:REMOVED]
    at_random = complete - predictions_without(random, train, targets)
    print(f"Prediction of a target, and how far it falls without {REMOVED} of {len(train)} training samples")
    print("target  prediction  predicted fall   fall without proponents   fall without random samples")
    for j in range(4):
        fall = complete[j] - predictions_without(proponents[j], train, targets)[j]
        print(f"{j:6d}  {complete[j]:10.2f}  {scores[j].sum():14.2f}  {fall:24.2f}  {at_random[j]:28.2f}")


if __name__ == "__main__":
    main()
