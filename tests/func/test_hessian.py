from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.func import hvp, hvp_at_x

peer = pytest.importorskip("dattri.func.hessian")

DOUBLE = torch.float64
X = torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def of_tensor(scale: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    return (scale * torch.tanh(x @ theta.reshape(3, 2))).exp().mean()


def of_dict(scale: Tensor, p: dict[str, Tensor], x: Tensor) -> Tensor:
    return of_tensor(scale, torch.cat([p["top"], p["rest"].flatten()]), x)


def place() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(1.3, dtype=DOUBLE), torch.linspace(-1, 1, 6, dtype=DOUBLE), X


@pytest.mark.parametrize("count", [None, 1, 4])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_products_with_a_tensor(count: int | None, damping: float) -> None:
    x = place()
    H = torch.autograd.functional.hessian(lambda theta: of_tensor(x[0], theta, x[2]), x[1])
    v = torch.randn(6, dtype=DOUBLE) if count is None else torch.randn(count, 6, dtype=DOUBLE)
    expected = v @ H + damping * v
    for found in (hvp(of_tensor, 1, damping=damping)(x, v), hvp_at_x(of_tensor, x, 1, damping=damping)(v)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (4,)])
def test_dicts_equal_tensors(lead: tuple[int, ...]) -> None:
    scale, theta, data = place()
    v = torch.randn((*lead, 6), dtype=DOUBLE)
    shaped = {"top": v[..., :2], "rest": v[..., 2:].reshape(*lead, 2, 2)}
    found: Any = hvp(of_dict, 1)((scale, {"top": theta[:2], "rest": theta[2:].reshape(2, 2)}, data), shaped)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in shaped.items()}
    joined = torch.cat([found["top"], found["rest"].flatten(len(lead))], -1)
    torch.testing.assert_close(joined, hvp(of_tensor, 1)((scale, theta, data), v), rtol=1e-12, atol=1e-14)


def test_the_same_as_dattri() -> None:
    x, v = place(), torch.randn(6, dtype=DOUBLE)
    torch.testing.assert_close(hvp(of_tensor, 1)(x, v), peer.hvp(of_tensor, argnums=1)(x, v))
    expected = peer.hvp_at_x(of_tensor, x, argnums=1, regularization=0.5)(v)
    torch.testing.assert_close(hvp_at_x(of_tensor, x, 1, damping=0.5)(v), expected)


def test_other_arguments_may_be_anything() -> None:
    function = lambda theta, batch, power: (theta * batch["x"]).pow(power).sum()  # noqa: E731  # short
    found = hvp(function)((torch.ones(2), {"x": torch.tensor([1.0, 2.0]), "name": "a"}, 2), torch.ones(2))
    assert found.tolist() == [2.0, 8.0]


def test_bad_arguments() -> None:
    x, v = place(), torch.ones(6, dtype=DOUBLE)
    for bad in (3, -1, (0, 1), True):
        with pytest.raises(ValueError, match=r"`argnums` .*to be an integer .*, but got"):
            hvp(of_tensor, bad)(x, v)
    with pytest.raises(TypeError, match="`x` to be a tuple of the function's arguments, but got a tensor"):
        hvp(of_tensor)(torch.ones(2), v)
    with pytest.raises(ValueError, match=r"shape of the point, \(6,\).* but got \(5,\)"):
        hvp(of_tensor, 1)(x, v[:5])
    with pytest.raises(ValueError, match="floating-point tensor or a dict of them"):
        hvp_at_x(lambda i: i.sum(), (torch.ones(2, dtype=torch.int64),))
    with pytest.raises(ValueError, match=r"one value, such as a mean loss, but got shape \(6,\)"):
        hvp(lambda theta: theta**2)((v,), v)
    with pytest.raises(ValueError, match="product with the curvature to be finite"):
        hvp(lambda theta: theta.sqrt().sum())((torch.zeros(2),), torch.ones(2))
