"""The memory budget: what is counted, how a batch is split, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from lightning_attr.data import memory
from lightning_attr.data.memory import MemoryBudget, free_bytes, peak_bytes
from lightning_attr.errors import MemoryBudgetError

KB = 1000  # bytes of the tensors below


def _doubled(sizes: list[int]) -> Any:
    """A function whose tensors take 2 kB a sample: it notes how many samples came at once."""

    def function(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        sizes.append(len(rows))
        return {"x": (batch["x"] * 2) + 1, "row": torch.tensor(list(rows))}

    return function


def _batch(b: int, width: int = 250) -> dict[str, Any]:
    return {"x": torch.arange(b * width, dtype=torch.float32).view(b, width), "shared": torch.ones(3)}


def test_peak_counts_what_lives_together() -> None:
    x = torch.ones(250)
    assert peak_bytes(lambda: x + 1) == KB
    assert peak_bytes(lambda: (x + 1) * 2) == 2 * KB
    assert peak_bytes(lambda: ((x + 1) * 2, x.add(5))) == 2 * KB  # the first intermediate is gone by then
    assert peak_bytes(lambda: x.view(5, 50).T) == 0  # a view, and tensors from before, are not new
    assert peak_bytes(lambda: x.add_(1)) == 0


def test_peak_counts_what_autograd_keeps() -> None:
    x = torch.ones(250, requires_grad=True)

    def kept() -> None:
        y = x.exp().exp().exp()  # each keeps its result
        assert y.requires_grad

    assert peak_bytes(kept) == 3 * KB


def test_peak_sees_vmap_and_layers() -> None:
    layer = nn.Linear(10, 25)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (x,)).sum()

    x = torch.ones(4, 10)
    peak = peak_bytes(lambda: vmap(grad(output), in_dims=(None, 0))(params, x))
    assert peak >= 4 * 250 * 4  # at least the gradients of the weight


@pytest.mark.parametrize(("limit", "parts"), [(2 * KB, [1] * 7), (4 * KB, [2, 2, 2, 1]), (5 * KB, [2, 2, 2, 1])])
def test_batch_is_split_as_the_limit_says(limit: int, parts: list[int]) -> None:
    sizes: list[int] = []
    batch, rows = _batch(7), [10, 11, 12, 13, 14, 15, 16]
    columns = MemoryBudget(limit + 8 * 7).run(_doubled(sizes), batch, rows)
    assert sizes == [2, 1, 2, *parts]  # the first three measure
    torch.testing.assert_close(columns["x"], batch["x"] * 2 + 1)
    assert columns["row"].tolist() == rows


def test_batch_that_fits_goes_through_whole_and_is_measured_once() -> None:
    sizes: list[int] = []
    budget = MemoryBudget(100 * KB)
    for _ in range(3):
        budget.run(_doubled(sizes), _batch(7), range(7))
    assert sizes == [2, 1, 2, 7, 7, 7]


def test_what_is_made_once_and_kept_is_no_part_of_a_sample() -> None:
    kept: list[Tensor] = []

    def keeping(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        if not kept:
            kept.append(torch.ones(50 * 250))
        return {"x": batch["x"] * 2}

    budget = MemoryBudget(3 * KB)
    assert len(budget.run(keeping, _batch(7), range(7))["x"]) == 7
    assert budget._demands[""].per_sample == KB
    assert budget._demands[""].fixed == 0


def test_larger_samples_are_measured_again_smaller_ones_are_not() -> None:
    sizes: list[int] = []
    budget = MemoryBudget(9 * KB)
    budget.run(_doubled(sizes), _batch(4), range(4))
    assert sizes == [2, 1, 2, 4]
    budget.run(_doubled(sizes), _batch(4, width=500), range(4))  # 4 kB a sample
    assert sizes == [2, 1, 2, 4, 2, 1, 2, 2, 2]
    budget.run(_doubled(sizes), _batch(4), range(4))  # as if they were the larger ones
    assert sizes == [2, 1, 2, 4, 2, 1, 2, 2, 2, 2, 2]


def test_small_samples_are_measured_once_and_never_too_low() -> None:
    sizes: list[int] = []
    kept: list[Tensor] = []

    def keeping(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        if not kept:
            kept.append(torch.ones(250))
        sizes.append(len(rows))
        return {"x": batch["x"] * 2}

    budget = MemoryBudget()
    budget.run(keeping, _batch(7), range(7))
    assert sizes == [2, 7]
    assert budget._demands[""].per_sample == 1.5 * KB  # with half of what was made once


def test_passes_that_cannot_come_near_the_limit_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ample = 7 * (10_000 * KB + 256 * 500)
    for free, numbers, expected in [
        (2 * ample, 500, [7, 7]),
        (2 * ample, None, [2, 7, 7]),  # nobody says how many numbers there are
        (2 * ample - 2, 500, [2, 7, 7]),
        (None, 500, [2, 7, 7]),
    ]:
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        sizes: list[int] = []
        budget = MemoryBudget()
        for _ in range(2):
            budget.run(_doubled(sizes), _batch(7), range(7), numbers=numbers)
        assert sizes == expected
    sizes = []
    MemoryBudget(10 * ample).run(_doubled(sizes), _batch(7), range(7), numbers=500)  # a limit that was asked for
    assert sizes == [2, 7]


def test_each_kind_of_pass_is_measured() -> None:
    few: list[int] = []
    many: list[int] = []
    budget = MemoryBudget(100 * KB)

    def large(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        many.append(len(rows))
        return {"x": batch["x"].repeat(1, 50)}

    for _ in range(2):
        budget.run(_doubled(few), _batch(7), range(7), "values")
        budget.run(large, _batch(7), range(7), "features")
    assert few == [2, 1, 2, 7, 7]
    assert many == [2, 1, 2, 2, 2, 2, 1, 2, 2, 2, 1]


def test_batch_of_one() -> None:
    sizes: list[int] = []
    MemoryBudget(3 * KB).run(_doubled(sizes), _batch(1), [0])
    assert sizes == [1, 1, 1]


def test_split_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    budget = MemoryBudget(5_000_000)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            budget.run(_doubled([]), _batch(4, width=250_000), range(4))
    assert caplog.messages == [
        "Featurizing in parts of 2 samples: a batch of 4 needs about 8.00 MB, more than the memory budget of 5.00 MB."
    ]


def test_budget_too_small_for_one_sample_says_what_it_needs() -> None:
    message = (
        r"One sample needs about 2\.00 MB, but the memory budget is 1\.00 MB\. Raise `memory_budget` to at least "
        r"2,000,0\d\d bytes, use a smaller `proj_dim`"
    )
    with pytest.raises(MemoryBudgetError, match=message):
        MemoryBudget(1_000_000).run(_doubled([]), _batch(4, width=250_000), range(4))


@pytest.mark.parametrize("limit", [0, -5])
def test_budget_must_be_positive(limit: int) -> None:
    with pytest.raises(ValueError, match=f"`limit` of MemoryBudget to be an integer >= 1, or None, but got {limit}"):
        MemoryBudget(limit)


def test_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * KB + 100)
    sizes: list[int] = []
    MemoryBudget().run(_doubled(sizes), _batch(5), range(5))
    assert sizes == [2, 1, 2, 2, 2, 1]


def test_default_too_small_tries_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    sizes: list[int] = []
    MemoryBudget().run(_doubled(sizes), _batch(3), range(3))
    assert sizes == [2, 1, 2, 1, 1, 1]


def test_without_knowledge_of_free_memory_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    sizes: list[int] = []
    MemoryBudget().run(_doubled(sizes), _batch(5), range(5))
    assert sizes == [2, 5]


def test_free_memory_is_plausible() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 10**7 < free < 10**14


def test_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 500)
    monkeypatch.setattr(memory, "_left_in_group", lambda: 300)
    assert free_bytes(torch.device("cpu")) == 300
    monkeypatch.setattr(memory, "_left_in_group", lambda: None)
    assert free_bytes(torch.device("cpu")) == 500


@pytest.mark.parametrize(
    ("width", "batch_size", "expected"),
    [(250, 8, 1024), (250, 100, 800), (250, 300, 600), (40_000, 8, 64), (10**6, 8, 8)],
)
def test_batches_of_small_samples_may_be_larger(width: int, batch_size: int, expected: int) -> None:
    budget = MemoryBudget(careful=True)
    assert budget.comfortable(batch_size) == batch_size  # nothing is known yet
    budget.run(_doubled([]), _batch(2, width), range(2))  # 8 bytes a number
    assert budget.comfortable(batch_size) == expected


def test_a_device_out_of_memory_gets_half_and_remembers_it(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def run(batch: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        seen.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("of a device")
        return {"x": 2 * batch}

    budget, x = MemoryBudget(limit=10**9), torch.randn(8, 2)
    for _ in range(2):
        assert torch.equal(budget.run(run, x, range(8))["x"], 2 * x)
    assert seen == [2, 8, 4, *8 * [2]]  # measured, tried, halved, kept
    assert "The device ran out of memory with 8 samples: featurizing in parts of 4." in caplog.text


def test_a_device_without_memory_for_one_sample_says_what_one_needs() -> None:
    def run(batch: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        if len(rows) == 1 and batch[0, 0] == 5:
            raise torch.OutOfMemoryError("of a device")
        return {"x": batch.clone()}

    budget = MemoryBudget(limit=10**9)
    budget.run(run, torch.ones(4, 1000), range(4))
    with pytest.raises(MemoryBudgetError, match=r"no memory left for a single sample: one needs about 0\.00 MB"):
        budget.run(run, torch.full((1, 1000), 5.0), range(1))
