from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attr.curvature.products import dense, ggn_product, hessian_product

DOUBLE = torch.float64


def network(n: int = 7) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731  # one word for all
    params = {"w": draw(4, 3), "b": draw(4), "v": draw(3, 4)}
    return params, draw(n, 3), torch.randint(3, (n,), generator=generator)


def outputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.tanh(F.linear(x, params["w"], params["b"])), params["v"])


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs(params, x), y)


def written_out(function: Any, params: dict[str, Tensor]) -> Tensor:
    """The Hessian, by torch.autograd.functional on the flattened parameters."""
    sizes = [p.numel() for p in params.values()]

    def flat(row: Tensor) -> Tensor:
        parts = row.split(sizes)
        return function({name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)})

    return torch.autograd.functional.hessian(flat, torch.cat([p.flatten() for p in params.values()]))


def written_out_ggn(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """J^T (diag(p) - p p^T) J, sample by sample, over n."""
    total = torch.zeros(28, 28, dtype=DOUBLE)
    for one in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda *values, one=one: outputs(dict(zip(params, values, strict=True)), one[None])[0],
            tuple(params.values()),
        )
        J = torch.cat([part.reshape(3, -1) for part in jacobian], 1)
        p = outputs(params, one[None])[0].softmax(0)
        total += J.T @ (p.diag() - torch.outer(p, p)) @ J / len(x)
    return total


@pytest.mark.parametrize("count", [1, 2, 5])
def test_hessian_products(count: int) -> None:
    params, x, y = network()
    rows = torch.randn(count, 28, dtype=DOUBLE)
    product = hessian_product(lambda p: loss(p, x, y), params)
    expected = rows @ written_out(lambda p: loss(p, x, y), params)
    for _ in range(2):  # the graph is kept
        torch.testing.assert_close(product(rows), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ggn_products(count: int) -> None:
    params, x, y = network()
    rows = torch.randn(count, 28, dtype=DOUBLE)
    product = ggn_product(lambda p: outputs(p, x), lambda z: F.cross_entropy(z, y), params)
    for _ in range(2):
        torch.testing.assert_close(product(rows), rows @ written_out_ggn(params, x), rtol=1e-10, atol=1e-12)


def test_several_rows_equal_one_by_one_in_any_order_of_calls() -> None:
    params, x, y = network()
    rows = torch.randn(4, 28, dtype=DOUBLE)
    for make in (
        lambda: hessian_product(lambda p: loss(p, x, y), params),
        lambda: ggn_product(lambda p: outputs(p, x), lambda z: F.cross_entropy(z, y), params),
    ):
        first_one, first_many = make(), make()
        one_by_one = torch.cat([first_one(row[None]) for row in rows])
        torch.testing.assert_close(first_many(rows), one_by_one, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(first_many(rows[:1]), one_by_one[:1], rtol=1e-12, atol=1e-14)
        assert first_many(rows[:0]).shape == (0, 28)
        assert not first_many(rows).requires_grad


def test_dense_is_the_matrix_chunk_by_chunk() -> None:
    matrix = torch.randn(300, 300, dtype=DOUBLE)
    assert torch.equal(dense(lambda rows: rows @ matrix, 300, DOUBLE), matrix)


class OldKind(torch.autograd.Function):
    """Squares; without `setup_context` and `vmap`, so that torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_functions_that_torch_func_refuses_go_one_by_one() -> None:
    point, rows = torch.randn(3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    product = hessian_product(lambda x: (OldKind.apply(x) * x).sum(), point)
    torch.testing.assert_close(product(rows), rows * 6 * point)
    torch.testing.assert_close(product(rows), rows * 6 * point)
    product = ggn_product(OldKind.apply, lambda z: z.square().sum() / 2, point)
    torch.testing.assert_close(product(rows), rows * 4 * point**2)


def test_what_does_not_depend_on_a_parameter_is_zero() -> None:
    point = {"a": torch.ones(2), "unused": torch.ones(1)}
    for count in (1, 2):
        rows = torch.ones(count, 3)
        assert hessian_product(lambda p: (p["a"] ** 3).sum(), point)(rows).tolist() == [[6.0, 6.0, 0.0]] * count
        assert not hessian_product(lambda p: p["a"].sum(), point)(rows).any()
        assert not hessian_product(lambda p: torch.tensor(1.0), point)(rows).any()
        assert not ggn_product(lambda p: p["a"], lambda z: z.sum(), point)(rows).any()


def test_attention_has_second_derivatives() -> None:
    q = torch.randn(1, 1, 4, 8)
    product = hessian_product(lambda x: F.scaled_dot_product_attention(x, q, q).sum(), q.clone())
    row = torch.randn(1, 32)
    assert product(row).isfinite().all()
    assert product(row).any()


def test_precision_of_rows_is_kept_and_no_gradient_is_left() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    product = hessian_product(lambda w: (w**3).sum(), weight)
    with torch.no_grad():
        assert product(torch.ones(2, 2, dtype=DOUBLE)).dtype == DOUBLE
        assert product(torch.ones(1, 2)).dtype == torch.float32
    assert weight.grad is None


@pytest.mark.parametrize("count", [1, 3])
def test_several_values_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"to return one value, such as a mean loss, but got shape \(2,\)"):
        hessian_product(lambda w: w**2, torch.ones(2))(torch.ones(count, 2))
