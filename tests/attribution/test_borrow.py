"""Modules come back from `attribute` as they were, also where the trainer has converted them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from cases import BlobClassifier, blobs, quiet_trainer
from lightning_attr.methods import GradDot
from lightning_attr.projectors import IdentityProjector


class WithStatistics(BlobClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, torch.nn.BatchNorm1d(8))


def attributed(module: Any, precision: str) -> Any:
    loader = DataLoader(blobs(8), batch_size=4)
    settings = {"train_dataloaders": loader, "target_dataloaders": loader, "method": GradDot(IdentityProjector())}
    return quiet_trainer(precision=precision).attribute(model=module, **settings)


@pytest.mark.parametrize(
    ("precision", "kept"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float32),
        ("bf16-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.float64),
    ],
)
def test_gradients_parameters_and_buffers_come_back_in_their_own_precision(precision: str, kept: torch.dtype) -> None:
    module = WithStatistics().to(kept)
    x, y = next(iter(DataLoader(blobs(8), batch_size=8)))
    module.training_step((x.to(kept), y), 0).backward()
    parameters = list(module.parameters())
    gradients, memory = [p.grad for p in parameters], [p.data_ptr() for p in parameters]
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert attributed(module, precision).scores.values.isfinite().all()
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert memory == [p.data_ptr() for p in module.parameters()]
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == values[name].dtype
        assert torch.equal(tensor, values[name]), name
