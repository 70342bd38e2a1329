"""A sample that a module's code fails for is named as dataset[i], whatever is attributed and wherever it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.errors import AttributionError, InvalidLabelError, NonFiniteGradientError, SampleRunError
from lightning_attr.evaluation import retrain_loo
from lightning_attr.methods import RPS, TRAK, Influence, KNNShapley
from lightning_attr.outputs import BinaryMargin, MulticlassMargin, NegativeLoss, Regression

N, BAD = 12, 7


def of(output: Any, classes: int = 3) -> Any:
    class Own(BlobClassifier):
        model_output = output

        def attribution_step(self, batch: Any) -> Any:
            outputs = self(batch[0])
            return outputs.squeeze(1) if classes == 1 else outputs, batch[1]

    return Own(classes=classes)


class OneLoss(L.LightningModule):
    """Attributed by its training loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])


def data(label: float | None = None, n: int = N, kind: Any = torch.long, row: int = BAD) -> TensorDataset:
    x, y = blobs(n).tensors
    y = y.clamp(max=1).to(kind)
    if label is not None:
        y[row] = label
    return TensorDataset(x, y)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


CASES: dict[str, tuple[Any, TensorDataset, TensorDataset, type[Exception], str]] = {
    "loss": (
        OneLoss,
        data(5),
        data(),
        SampleRunError,
        "OneLoss fails for .* others .*: IndexError: Target 5 is out of",
    ),
    "margin": (lambda: of(MulticlassMargin()), data(-1), data(), InvalidLabelError, "has the label -1"),
    "own loss": (lambda: of(NegativeLoss(cross_entropies)), data(9), data(), SampleRunError, "Target 9 is out of"),
    **{
        f"binary {label}": (
            lambda: of(BinaryMargin(), 1),
            data(label, kind=torch.float),
            data(kind=torch.float),
            InvalidLabelError,
            f"labels for BinaryMargin to be 0 or 1, .* has the label {label}",
        )
        for label in (-1, 2, 0.5, float("nan"))
    },
    "regression": (
        lambda: of(Regression(), 1),
        data(float("inf"), kind=torch.float),
        data(kind=torch.float),
        NonFiniteGradientError,
        "[lL]oss .* is NaN or Inf",
    ),
}


@pytest.mark.parametrize("role", ["training", "target"])
@pytest.mark.parametrize("name", CASES)
def test_a_label_that_cannot_be_is_named(name: str, role: str) -> None:
    make, bad, good, error, message = CASES[name]
    loaders = {"training": loader_of(good), "target": loader_of(good), role: loader_of(bad)}
    with pytest.raises(error, match=message) as caught:
        quiet_trainer().attribute(
            model=make(),
            train_dataloaders=loaders["training"],
            target_dataloaders=loaders["target"],
            method=TRAK(8),
        )
    assert f"dataset[{BAD}]" in str(caught.value)
    if error is SampleRunError:
        assert type(caught.value.__cause__) is IndexError


@pytest.mark.parametrize("make", [OneLoss, BlobClassifier])
@pytest.mark.parametrize(
    "method",
    [Influence(solver="ekfac"), KNNShapley(k=3), RPS(), TRAK(exact=True)],
    ids=lambda method: type(method).__name__,
)
def test_by_every_kind_of_method(method: Any, make: Any) -> None:
    with pytest.raises(AttributionError, match=rf"dataset\[{BAD}\]"):
        quiet_trainer().attribute(model=make(), train_dataloaders=loader_of(data(5)), targets="train", method=method)


def test_beyond_the_samples_that_the_module_is_checked_on() -> None:
    with pytest.raises(SampleRunError, match=r"OneLoss fails for dataset\[333\] and not"):
        quiet_trainer().attribute(
            model=OneLoss(),
            train_dataloaders=loader_of(data(n=16)),
            target_dataloaders=loader_of(data(5, n=400, row=333)),
            method=TRAK(8),
        )


def test_what_fails_for_all_samples_comes_as_it_is() -> None:
    class Broken(OneLoss):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0][:, :3], batch[1]], batch_idx)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        quiet_trainer().attribute(model=Broken(), train_dataloaders=loader_of(data()), targets="train")
    assert not isinstance(caught.value, AttributionError)


def test_a_retraining_names_the_target(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader_of(data())

        def predict_dataloader(self) -> Any:
            return loader_of(data(5))

    with pytest.raises(AttributionError, match=rf"dataset\[{BAD}\]"):
        retrain_loo(
            BlobClassifier, lambda: quiet_trainer(max_epochs=1), Data, dirpath=tmp_path, indices=[0], verbose=False
        )
