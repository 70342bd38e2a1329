"""Models that run on the CPU and on the simulated device, and the methods that score them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import method_cases
import torch
from method_cases import N_TARGET, N_TRAIN, Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionResult, attribute, projectors
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot, Influence, TracIn
from lightning_attr.outputs import LanguageModel, PixelMargin

CLASSES = 3


class Trained(L.LightningModule):
    """Trains its network by the cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Classifier(AttributionMixin, Trained):
    """Attributed by its margin."""


class Segments(AttributionMixin, Trained):
    """Attributed by the margins of its pixels."""

    model_output = PixelMargin()


class Writes(AttributionMixin, Trained):
    """Attributed by the loss of its tokens."""

    model_output = LanguageModel()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(input_ids=x).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())


class Last(nn.Module):
    """A recurrent layer whose last output is classified."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(len(x), 3, 2))[0][:, -1])


class Cells(nn.Module):
    """A recurrent cell, called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for step in x.view(len(x), 3, 2).unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Encoder(nn.Module):
    """A transformer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.position).mean(1))


class UNet(nn.Module):
    """Two levels, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        return self.head(torch.cat([skip, self.up(self.bottom(skip).relu())], 1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, groups=2),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, CLASSES))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2))


class Bert(nn.Module):
    """BERT of transformers with a head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=11, max_position_embeddings=6, num_labels=CLASSES, **sizes)
        self.model = BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


def _random(n: int, seed: int, inputs: str, targets: str) -> Dataset[Any]:
    g = torch.Generator().manual_seed(seed)
    x = {
        "numbers": lambda: torch.randn(n, 6, generator=g),
        "images": lambda: torch.randn(n, 1, 8, 8, generator=g),
        "tokens": lambda: torch.randint(0, 11, (n, 5), generator=g),
    }[inputs]()
    y = {
        "class": lambda: torch.randint(0, CLASSES, (n,), generator=g),
        "mask": lambda: torch.randint(0, CLASSES, (n, 8, 8), generator=g),
        "next": lambda: x,
    }[targets]()
    return TensorDataset(x, y)


@dataclass(frozen=True)
class Model:
    """A module with its data."""

    make: Callable[[], L.LightningModule]
    inputs: str = "numbers"
    targets: str = "class"

    def data(self, n: int, seed: int) -> Dataset[Any]:
        return _random(n, seed, self.inputs, self.targets)


MODELS = {
    "mlp": Model(lambda: Classifier(_mlp())),
    "mlp, loss": Model(lambda: Trained(_mlp())),
    "cnn": Model(lambda: Classifier(_cnn()), "images"),
    "transformer": Model(lambda: Classifier(Encoder()), "tokens"),
    "gru": Model(lambda: Classifier(Last(nn.GRU(2, 5, batch_first=True)))),
    "lstm": Model(lambda: Classifier(Last(nn.LSTM(2, 5, batch_first=True)))),
    "gru cell": Model(lambda: Classifier(Cells())),
    "gpt-2": Model(lambda: Writes(_gpt2()), "tokens", "next"),
    "bert": Model(lambda: Classifier(Bert()), "tokens"),
    "u-net": Model(lambda: Segments(UNet()), "images", "mask"),
}

_PROJECTORS = ["FactGraSS", "FactoredSJLT", "SJLT", "GraSS", "Rademacher", "Gaussian", "Kronecker"]


def _projected(name: str) -> Callable[[], GradDot]:
    return lambda: GradDot(getattr(projectors, f"{name}Projector")(16))


METHODS = {
    **{case.name: case for case in method_cases.CASES if "last layer" not in case.name},
    **{f"GradDot, {name}": Case(f"GradDot, {name}", _projected(name)) for name in _PROJECTORS},
}
FEW = ["TRAK, projected", "TRAK, exact", "GradDot, exact", "influence, EK-FAC", "influence, CG", "KNN-Shapley"]
"""One of each way to score, for the models beyond the first."""


def fitted(model: str, folder: Path, trainer: Callable[..., L.Trainer] = quiet_trainer, **settings: Any) -> Any:
    """Train with the callback; the module, whose store is in the folder."""
    torch.manual_seed(0)
    module = MODELS[model].make()
    settings = {"method": TRAK(proj_dim=16), "featurize": True, **settings}
    own = {name: settings.pop(name) for name in ("method", "featurize")}
    callback = AttributionCallback(folder, optimizer_state=True, **own)
    trainer(max_epochs=2, callbacks=[callback], **settings).fit(module, loader_of(MODELS[model].data(N_TRAIN, 0), 8))
    return module


def scored(model: str, module: Any, method: Any, trainer: L.Trainer, **settings: Any) -> AttributionResult:
    """Attribute, on the trainer's device."""
    loaders = {"train_dataloaders": (N_TRAIN, 0), "target_dataloaders": (N_TARGET, 1)}
    data = {name: loader_of(MODELS[model].data(*asked), batch_size=8) for name, asked in loaders.items()}
    return attribute(trainer, model=module, method=method, **data, **settings)


def copied(store: Path, to: Path) -> Path:
    """A store of one's own, with the weights of its snapshots and no features."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(store, to)
    return to


__all__ = ["FEW", "METHODS", "MODELS", "Influence", "TracIn", "copied", "fitted", "scored"]
