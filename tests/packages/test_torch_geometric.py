"""PyTorch Geometric: a graph classifier as its examples of Lightning write it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from checks import QUIET, check_scores, train_both

pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, MLP, GCNConv, global_add_pool, global_mean_pool

ROWS = [0, 9, 23]


def graphs(n: int = 24) -> list[Data]:
    """Random graphs of unequal size; the class is told by the features."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(n):
        nodes = 4 + i % 5
        x = torch.randn(nodes, 6, generator=generator) + (i % 3)
        edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
        data.append(Data(x=x, edge_index=edges, y=torch.tensor([i % 3])))
    return data


class GraphClassifier(L.LightningModule):
    """examples/pytorch_lightning/gin.py of the package, with its metrics left out."""

    def __init__(self, in_channels: int = 6, out_channels: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, 8, 2, dropout=dropout, jk="cat")
        self.classifier = MLP([8, 8, out_channels], norm="batch_norm", dropout=dropout)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.gnn(x, edge_index)
        x = global_add_pool(x, batch)
        return self.classifier(x)

    def training_step(self, data: Batch, batch_idx: int) -> Tensor:
        y_hat = self(data.x, data.edge_index, data.batch)
        loss = nn.functional.cross_entropy(y_hat, data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class GraphRegressor(L.LightningModule):
    """A GCN whose batch is asked for by name, as the package's tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = GCNConv(6, 8), GCNConv(8, 8), nn.Linear(8, 1)

    def training_step(self, batch: Batch) -> Tensor:
        x = self.conv1(batch.x, batch.edge_index).relu()
        x = self.conv2(x, batch.edge_index).relu()
        x = self.head(global_mean_pool(x, batch.batch)).squeeze(-1)
        return (x - batch.y.float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("module", [GraphClassifier, GraphRegressor])
def test_loader(module: type[L.LightningModule]) -> None:
    data = graphs()

    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(module(), DataLoader(data, batch_size=8, shuffle=True))
        return trainer

    trainer = train_both(train)
    targets = DataLoader([data[row] for row in ROWS], batch_size=8)
    check_scores(trainer, ROWS, DataLoader(data, batch_size=1), target_dataloaders=targets)


def test_lightning_dataset() -> None:
    data = graphs()

    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(GraphClassifier(), datamodule=LightningDataset(data, test_dataset=data[:3], batch_size=8))
        return trainer

    trainer = train_both(train)
    check_scores(trainer, [0, 1, 2], DataLoader(data, batch_size=1))
