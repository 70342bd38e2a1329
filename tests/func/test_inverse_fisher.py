from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attr.func import ifvp_at_x_datainf, ifvp_at_x_explicit, ifvp_datainf, ifvp_explicit

DOUBLE = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, dtype=DOUBLE, generator=GENERATOR)
Y = torch.randint(2, (12,), generator=GENERATOR)
POINT = {"w": torch.randn(2, 3, dtype=DOUBLE, generator=GENERATOR), "b": torch.zeros(2, dtype=DOUBLE)}
V = {
    "w": torch.randn(4, 2, 3, dtype=DOUBLE, generator=GENERATOR),
    "b": torch.randn(4, 2, dtype=DOUBLE, generator=GENERATOR),
}


def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, p["w"], p["b"]), y)


def gradients() -> dict[str, Tensor]:
    rows = []
    for x, y in zip(X, Y, strict=True):
        leaves = {name: p.clone().requires_grad_() for name, p in POINT.items()}
        rows.append(torch.autograd.grad(loss(leaves, x, y), list(leaves.values())))
    return {name: torch.stack(parts).flatten(1) for name, parts in zip(POINT, zip(*rows, strict=True), strict=True)}


def joined(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in vectors.values()], 1)


def test_explicit_is_the_inverse_of_the_mean() -> None:
    g = joined(gradients())
    expected = joined(V) @ torch.linalg.inv(g.T @ g / 12 + 0.1 * torch.eye(8, dtype=DOUBLE))
    torch.testing.assert_close(joined(ifvp_explicit(loss, damping=0.1)((POINT, X, Y), V)), expected)
    torch.testing.assert_close(joined(ifvp_at_x_explicit(loss, POINT, X, Y, damping=0.1)(V)), expected)


@pytest.mark.parametrize("damping", [None, 0.3])
def test_datainf_is_the_mean_of_inverses_entry_by_entry(damping: float | None) -> None:
    found = ifvp_datainf(loss, damping=damping)((POINT, X, Y), V)
    again = ifvp_at_x_datainf(loss, POINT, X, Y, damping=damping)(V)
    for name, g in gradients().items():
        p = g.shape[1]
        value = 0.1 * g.square().sum(1).mean() / p if damping is None else damping
        inverse = torch.stack([
            torch.linalg.inv(value * torch.eye(p, dtype=DOUBLE) + torch.outer(row, row)) for row in g
        ]).mean(0)
        torch.testing.assert_close(found[name].flatten(1), V[name].flatten(1) @ inverse, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(again[name], found[name])


def test_one_sample_makes_datainf_explicit() -> None:
    theta, x, y, v = POINT["w"], X[:1], Y[:1], V["w"]
    function = lambda w, x, y: F.cross_entropy(w @ x, y)  # noqa: E731  # short
    exact = ifvp_explicit(function, damping=0.2)((theta, x, y), v)
    torch.testing.assert_close(ifvp_datainf(function, damping=0.2)((theta, x, y), v), exact, rtol=1e-10, atol=1e-11)


def test_several_vectors_equal_one_by_one() -> None:
    for solve in (ifvp_at_x_explicit(loss, POINT, X, Y, damping=0.1), ifvp_at_x_datainf(loss, POINT, X, Y)):
        alone = [solve({name: tensor[i] for name, tensor in V.items()}) for i in range(4)]
        for name, tensor in solve(V).items():
            torch.testing.assert_close(torch.stack([one[name] for one in alone]), tensor, rtol=1e-10, atol=1e-12)


def test_samples_along_other_dimensions_and_shared_arguments() -> None:
    function = lambda scale, x, w: scale * w @ x  # noqa: E731  # short
    found = ifvp_explicit(function, 2, damping=0.1, in_dims=(None, 1, None))((2.0, X.T, POINT["w"][0]), V["b"][:3].T[0])
    expected = torch.linalg.inv(4 * X.T @ X / 12 + 0.1 * torch.eye(3, dtype=DOUBLE)) @ V["b"][:3].T[0]
    torch.testing.assert_close(found, expected)


def test_bad_arguments() -> None:
    x = (POINT, X, Y)
    for dims in [(None, 0), (0, 0, 0), (None, None, None)]:
        with pytest.raises(ValueError, match="`in_dims` to have one entry for each of the 3 arguments"):
            ifvp_explicit(loss, in_dims=dims)(x, V)
    with pytest.raises(ValueError, match=r"curvature of 8 parameters is singular with `damping=0.0`"):
        ifvp_explicit(loss)(x, V)
    for damping in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"`damping` (of ifvp_datainf )?to be a .* number.*, but got {damping}"):
            ifvp_datainf(loss, damping=damping)(x, V)
    with pytest.raises(ValueError, match=r"all gradients of \['b'\] are zero"):
        ifvp_datainf(lambda p, x: (p["w"] @ x).sum())((POINT, X), V)
    with pytest.raises(ValueError, match=r"finite gradients, but those of the samples \[3\]"):
        ifvp_datainf(loss)((POINT, X.index_fill(0, torch.tensor([3]), float("nan")), Y), V)
