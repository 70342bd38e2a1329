"""The random stream: pinned bits, keys, distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_attr.randomness.streams import (
    gaussian,
    hashed_seed,
    philox,
    rademacher,
    row_gaussians,
    row_uniforms,
)

PINNED_SEED = 2352347809427705324
PINNED_SIGNS = "+-+-+--++--+++---++-++---++-+-+--+-++++++-++-++---+++++---+-++--"
PINNED_NORMAL = [-0.5025255084037781, -1.4363588094711304, 0.12330346554517746, 0.048084963113069534]


def test_the_stream_never_changes() -> None:
    # A store written today must be readable for good: its features fit no other bits than these.
    assert hashed_seed(0, "final", "weight", "rows") == PINNED_SEED
    assert "".join("+-"[s < 0] for s in rademacher((64,), 0, "final", "weight", "rows").tolist()) == PINNED_SIGNS
    np.testing.assert_allclose(gaussian((4,), 0, "final", "weight", 0).numpy(), PINNED_NORMAL, rtol=1e-6)


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_a_function_of_the_key_alone(draw: type) -> None:
    torch.manual_seed(1)
    first = draw((3, 5), 0, "a")
    torch.manual_seed(2)
    assert torch.equal(draw((3, 5), 0, "a"), first)
    assert torch.equal(draw((15,), 0, "a").reshape(3, 5), first)  # the shape only folds the stream
    assert not torch.equal(draw((3, 5), 0, "b"), first)
    assert not torch.equal(draw((3, 5), 1, "a"), first)


def test_keys_are_told_apart() -> None:
    keys = [(1, 2), (12,), ("1", 2), (1, "2"), ("1", "2"), ("12",), ("1 2",), (1, 2, ""), (2, 1)]
    assert len({hashed_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= hashed_seed(*key) < 2**63 for key in keys)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_any_number_of_signs(count: int) -> None:
    signs = rademacher((count,), 0, "key")
    assert signs.shape == (count,)
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) <= {-1, 1}
    assert torch.equal(signs, rademacher((200,), 0, "key")[:count])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_any_number_of_normal_numbers(shape: tuple[int, ...]) -> None:
    values = gaussian(shape, 0, "key")
    assert values.shape == shape
    assert values.dtype == torch.float32
    assert values.isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4)])
def test_normal_numbers_of_several_keys_are_those_of_each(shape: tuple[int, ...]) -> None:
    keys = [("noise", row) for row in range(5)]
    assert torch.equal(row_gaussians(shape, keys), torch.stack([gaussian(shape, *key) for key in keys]))


def test_signs_are_fair_and_independent() -> None:
    signs = rademacher((200, 256), 0, "key").double()
    n = signs.numel()
    assert abs(signs.mean().item()) < 5 / math.sqrt(n)
    columns = signs.T @ signs / 200 - torch.eye(256)  # neighbours inside a byte, a word, between words
    assert columns.square().mean().item() == pytest.approx(1 / 200, rel=0.05)


def test_normal_numbers_are_normal() -> None:
    assert kstest(gaussian((20000,), 0, "key").numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with Random123
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)  # type: ignore[arg-type]
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_numbers_of_a_row_depend_on_it_and_the_key_alone() -> None:
    rows = [0, 1, 5, 2**32, 2**32 + 1, 2**40]
    whole = row_uniforms(rows, 5, 0, "labels")
    assert whole.shape == (6, 5)
    assert whole.dtype == torch.float64
    assert len(set(whole.flatten().tolist())) == 30
    assert torch.equal(row_uniforms(rows[::-1], 5, 0, "labels"), whole.flip(0))
    for count in (1, 2, 3, 4):
        assert torch.equal(row_uniforms([5], count, 0, "labels"), whole[2:3, :count])
    assert not torch.equal(row_uniforms(rows, 5, 1, "labels"), whole)


@pytest.mark.parametrize(("rows", "count"), [([], 3), ([1, 2], 0)])
def test_no_uniform_numbers(rows: list[int], count: int) -> None:
    assert row_uniforms(rows, count, 0).shape == (len(rows), count)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    values = row_uniforms(range(4000), 5, 0, "labels")
    assert 0 < values.min() < values.max() < 1
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 0.01
    correlations = values.T.corrcoef() - torch.eye(5)
    assert correlations.abs().max() < 0.06
    assert abs(torch.stack([values[:-1, 0], values[1:, 0]]).corrcoef()[0, 1].item()) < 0.06  # neighbouring rows
