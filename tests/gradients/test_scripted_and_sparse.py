"""Blocks that TorchScript compiled, and batches of sparse tensors. Reference: autograd, sample by sample."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import loader_of, quiet_trainer
from lightning_attr.batches.nested import dense_parts, select_rows
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import GradDot
from lightning_attr.objectives.modes import set_mode
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Scripted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout())
            self.head = nn.Linear(6, 3)
        self.body = torch.jit.script(body)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


class Words(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(torch.sparse.mm(batch[0], self.weight), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _check(module: Any, batch: Any) -> None:
    found = plan(module, select_rows(batch, 6, range(4)), 4, mode="eval")
    featurize = Featurizer(module, found, IdentityProjector().bind(ParameterLayout.of(module), ""))
    features = featurize(batch, range(6))["features"]
    for i in range(6):
        rows = torch.autograd.grad(-module.training_step(select_rows(batch, 6, [i])), list(module.parameters()))
        torch.testing.assert_close(features[i], torch.cat([row.flatten() for row in rows]))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_scripted_blocks_go_through_the_fallback() -> None:
    _check(Scripted(), (X, Y))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_scripted_layers_have_modes() -> None:
    module = Scripted()
    set_mode(module, "train")
    assert [layer.training for layer in module.body.children()] == [True, False, True, True]
    set_mode(module, "train", dropout=False)
    assert [layer.training for layer in module.body.children()] == [True, False, True, False]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_batches_are_sliced(layout: torch.layout) -> None:
    batch = (F.relu(X).to_sparse(layout=layout), Y)
    part = select_rows(batch, 6, [4, 1])
    assert part[0].layout == layout
    assert torch.equal(part[0].to_dense(), F.relu(X)[[4, 1]])
    assert all(tensor.layout == torch.strided for tensor in dense_parts(batch[0]))
    _check(Words(), batch)


def test_a_run_on_sparse_samples(tmp_path: Any) -> None:
    def stacked(items: Any) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    data = [(F.relu(x).to_sparse(), y) for x, y in zip(X, Y, strict=True)]
    module = Words()
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path, log=False)])
    trainer.fit(module, loader_of(data, 3, collate_fn=stacked))
    result = trainer.attribute(targets="train", method=GradDot(exact=True))
    for i in range(6):
        loss = F.cross_entropy(F.relu(X[i : i + 1]) @ module.weight, Y[i : i + 1])
        (row,) = torch.autograd.grad(loss, [module.weight])
        torch.testing.assert_close(result.self_influence[i], row.square().sum())


def test_lazy_layers_are_named() -> None:
    class Lazy(Words):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LazyLinear(3)

    with pytest.raises(
        ValueError, match=r"Expected the parameters of Lazy to have shapes, but `body\.weight` belongs to a lazy"
    ):
        ParameterLayout.of(Lazy())
