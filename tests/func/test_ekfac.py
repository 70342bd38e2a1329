"""EK-FAC for any module: what it covers, and where it takes its samples from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.func.ekfac import ekfac
from lightning_attr.outputs import MulticlassMargin, Regression


def batches(size: int, n: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(size), torch.randint(3, (n,), generator=generator).split(size), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_is_the_inverse_hessian_of_a_linear_model() -> None:
    layer, data = nn.Linear(4, 1, bias=False).double(), [(x, y.double()) for x, y in batches(4)]
    inverse = ekfac(layer, Regression(), data, labels="exact", damping=0.01)
    x = torch.cat([x for x, _ in data])
    hessian = x.T @ x / len(x)
    vectors = torch.randn(2, 4, dtype=torch.float64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(4)
    assert torch.allclose(inverse.apply(vectors), torch.linalg.solve(damped, vectors.T).T, rtol=1e-10)


@pytest.mark.parametrize("labels", ["sampled", "observed", "exact"])
@pytest.mark.parametrize("method", ["ekfac", "kfac"])
def test_does_not_depend_on_the_batch_size(labels: Any, method: Any) -> None:
    module = network()
    vectors = torch.randn(2, 53, dtype=torch.float64)
    found = [
        ekfac(module, MulticlassMargin(), batches(size), labels=labels, method=method).apply(vectors)
        for size in (1, 3, 12)
    ]
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-10)
    assert torch.allclose(found[0], found[2], rtol=1e-9, atol=1e-10)


def test_runs_in_eval_mode_and_puts_the_mode_back() -> None:
    module = network()
    module[2].eval()
    ekfac(module, MulticlassMargin(), batches(4))
    assert [layer.training for layer in module] == [True, True, False, True, True]
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_takes_a_function_as_loss() -> None:
    module = network()
    vectors = torch.randn(2, 53, dtype=torch.float64)
    found = ekfac(module, lambda s, y: F.cross_entropy(s, y, reduction="none"), batches(4), labels="observed")
    expected = ekfac(module, MulticlassMargin(), batches(4), labels="observed")
    assert torch.allclose(found.apply(vectors), expected.apply(vectors))
    with pytest.raises(NotImplementedError, match=r'`labels="observed"` in lightning_attr\.func'):
        ekfac(module, lambda s, y: F.cross_entropy(s, y, reduction="none"), batches(4))


def test_seed_changes_the_labels() -> None:
    module, vectors = network(), torch.randn(1, 53, dtype=torch.float64)
    first, again, other = (
        ekfac(module, MulticlassMargin(), batches(4), labels="sampled", seed=s).apply(vectors) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_weight_that_other_code_uses_is_left_out() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.linear(self.first(x).tanh(), self.first.weight))

    inverse = ekfac(Reuse().double(), MulticlassMargin(), batches(4))
    assert inverse.layout.uncovered == ("first.weight", "first.bias")


def test_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"but got the iterator generator\. Pass `list\(batches\)`"):
        ekfac(network(), MulticlassMargin(), (batch for batch in batches(4)))


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="`batches` to hold at least one batch, but got none"):
        ekfac(network(), MulticlassMargin(), [])


def test_module_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="has no layer with Kronecker factors"):
        ekfac(nn.LayerNorm(4).double(), MulticlassMargin(), batches(4))
