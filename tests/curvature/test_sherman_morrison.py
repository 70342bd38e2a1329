from __future__ import annotations

import pytest
import torch

from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.sherman_morrison import datainf_damping, mean_of_inverses

DOUBLE = torch.float64
G = torch.randn(9, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
V = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def test_it_is_the_mean_of_the_inverses() -> None:
    inverses = [torch.linalg.inv(0.4 * torch.eye(5, dtype=DOUBLE) + torch.outer(g, g)) for g in G]
    torch.testing.assert_close(mean_of_inverses(G, V, 0.4), V @ torch.stack(inverses).mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gradients", [G[:1], G[:1].repeat(6, 1)])
def test_one_gradient_is_exact(gradients: torch.Tensor) -> None:
    exact = factor(gradients.T @ gradients / len(gradients), 0.4).solve(V)
    torch.testing.assert_close(mean_of_inverses(gradients, V, 0.4), exact, rtol=1e-12, atol=1e-13)


def test_much_damping_gives_grad_dot() -> None:
    torch.testing.assert_close(1e9 * mean_of_inverses(G, V, 1e9), V, rtol=1e-7, atol=1e-7)


def test_blocks_average_by_their_sizes() -> None:
    parts = (4 * mean_of_inverses(G[:4], V, 0.4) + 5 * mean_of_inverses(G[4:], V, 0.4)) / 9
    torch.testing.assert_close(parts, mean_of_inverses(G, V, 0.4), rtol=1e-12, atol=1e-13)


def test_several_rows_equal_one_by_one() -> None:
    alone = torch.cat([mean_of_inverses(G, row[None], 0.4) for row in V])
    torch.testing.assert_close(mean_of_inverses(G, V, 0.4), alone, rtol=1e-12, atol=1e-13)


def test_damping_is_a_share_of_the_mean_eigenvalue_of_the_fisher_matrix() -> None:
    assert datainf_damping(G, 0.2) == pytest.approx(0.2 * (G.T @ G / 9).trace().item() / 5)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ValueError, match=f"`damping` to be a positive number, but got {damping}"):
        mean_of_inverses(G, V, damping)


def test_bad_tensors() -> None:
    for wrong in (G[:, :4], G[0], G[:0]):
        with pytest.raises(ValueError, match=r"`gradients` to have shape \(n, 5\) with n > 0, but got"):
            mean_of_inverses(wrong, V, 1.0)
    with pytest.raises(ValueError, match="`gradients` to be finite"):
        mean_of_inverses(G / 0, V, 1.0)
    with pytest.raises(ValueError, match="`rhs` to be a floating-point matrix"):
        mean_of_inverses(G, V[0], 1.0)
