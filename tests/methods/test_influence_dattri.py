"""Influence functions of dattri 0.3.0, where they are the same quantity as ours.

Its scores are gradients of losses times solved gradients of the targets: ours are minus these over n. Its
regularization is absolute, as our weight decay. It solves batch by batch and adds the solutions up, so that only one
batch is right; DataInf takes a batch's mean gradient for one sample's, so that only batches of one are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from influence_cases import Batch, N, snapshot
from influence_cases import scored as scored_at
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import blobs
from lightning_attr import AttributionMixin
from lightning_attr.methods import ConjugateGradient, Influence


class Single(AttributionMixin, nn.Linear):
    """One parameter, so that a layer and a parameter are the same."""


def problem() -> tuple[Single, Batch, Batch]:
    torch.manual_seed(0)
    module = Single(4, 3, bias=False).eval()
    return module, blobs(N).tensors, blobs(5, seed=1).tensors


def peer(name: str, batch_size: int, **settings: Any) -> Tensor:
    influence_function = pytest.importorskip("dattri.algorithm.influence_function")
    task = pytest.importorskip("dattri.task")
    module, train, targets = problem()

    def forward(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return functional_call(module, params, (x.reshape(-1, 4),)), y.reshape(-1)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(*forward(params, batch))

    def margin(params: Any, batch: Any) -> Tensor:
        return module.model_output.output(*forward(params, batch)).mean()

    own = task.AttributionTask(loss, module, module.state_dict(), target_func=margin)
    attributor = getattr(influence_function, f"IFAttributor{name}")(own, **settings)
    attributor.cache(DataLoader(TensorDataset(*train), batch_size))
    found = attributor.attribute(DataLoader(TensorDataset(*train), N), DataLoader(TensorDataset(*targets), 5))
    return -found.detach() / N


def scored(method: Influence) -> Tensor:
    return scored_at(method, snapshot(*problem()))[0]


def test_explicit() -> None:
    expected = peer("Explicit", N, regularization=0.3)
    found = scored(Influence("hessian", "explicit", damping=0.0, weight_decay=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    apart = peer("Explicit", N // 2, regularization=0.3)
    assert not torch.allclose(apart / 2, expected, rtol=0.01)  # the mean of two inverses is another quantity


def test_conjugate_gradients() -> None:
    expected = peer("CG", N, regularization=0.3, max_iter=9)  # more, and it divides by a residual of zero
    found = scored(Influence("hessian", ConjugateGradient(20, 1e-7), damping=0.0, weight_decay=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_datainf() -> None:
    expected = peer("DataInf", 1, regularization=0.3)
    found = scored(Influence(solver="datainf", damping=0.0, weight_decay=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
