"""The parts of the table of methods that need no peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")
import methods
import methods_runs
from methods_rows import ROWS
from methods_tuned import TUNED

import digits

QUICK = digits.Setting("quick", digits.mlp, (64,), epochs=1)


def row(by: str, seconds: float, lds: float, **others: object) -> dict[str, object]:
    figures = {"lds": lds, "low": lds - 0.05, "high": lds + 0.05, "seconds": seconds}
    return {"network": "mlp", "method": "A", "by": by, "settings": {}, **figures, **others}


def test_logistic_regression_is_at_its_optimum() -> None:
    data = methods_runs.clean(methods_runs.LR)
    network = methods_runs.converged(data.x[:200], data.y[:200])
    loss = F.cross_entropy(network(data.x[:200].double()), data.y[:200]) + methods_runs.penalty(network)
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in network.parameters()) < 1e-7
    again = methods_runs.converged(data.x[:200], data.y[:200], start=network)
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_penalty_is_the_weight_decay_of_sgd() -> None:
    network = methods_runs.regression()
    methods_runs.penalty(network).backward()
    for p in network.parameters():
        torch.testing.assert_close(p.grad, digits.WEIGHT_DECAY * p.detach())


def test_flipped_labels_are_those_of_the_mask() -> None:
    data = methods_runs.clean(QUICK)
    flipped, mask = methods_runs.noisy(data)
    assert torch.equal(flipped.y != data.y, mask)
    assert 0.08 < mask.double().mean() < 0.12
    assert torch.equal(flipped.y_target, data.y_target)


def test_what_is_first_is_removed_and_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = methods_runs.clean(QUICK)
    by_class = data.y.argsort()
    found = methods.mean_accuracy(QUICK, data, lambda _: by_class, share=0.5, cache=tmp_path)
    left = 100 * (data.y_target >= data.y[by_class[len(by_class) // 2]]).double().mean()
    assert 0 < found <= left
    monkeypatch.setattr(methods, "retrained", None)
    assert methods.mean_accuracy(QUICK, data, lambda _: by_class, share=0.5, cache=tmp_path) == found


def test_random_orders_are_permutations_of_their_own() -> None:
    order = methods.random_order(20)
    assert sorted(order(0).tolist()) == list(range(20))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(order(1), order(1))


def test_verdicts_name_what_is_slower_or_worse() -> None:
    rows = [row("ours", 2.0, 0.50), row("fast", 1.0, 0.52), row("good", 3.0, 0.60), row("broken", 0.0, 0.0)]
    del rows[3]["low"]
    assert methods.verdicts(rows) == [
        "mlp: A: 2.00 times the seconds of fast",
        "mlp: A: LDS 0.500, of good 0.600",
    ]
    assert methods.verdicts([row("ours", 1.0, 0.5), row("peer", 2.0, 0.5)]) == []


def test_cells_that_are_not_known_are_empty() -> None:
    figures = {"auroc": 0.9, "best_out": 1.0, "flipped_out": -0.5, "trainings": 2.0}
    assert methods.line(row("b", 1.0, 0.5, settings={"damping": 0.1, "l": None}, **figures)) == (
        "| mlp | A | b | damping=0.1 l=None | 0.500 (0.450 to 0.550) |  |  | 0.900 | +1.0 | -0.5 | 2.0 |"
    )
    failed = methods.line({"network": "lr", "method": "A", "by": "b", "settings": {}, "error": "TypeError: no"})
    assert failed.count("|") == methods.HEAD.count("|")
    assert "TypeError: no" in failed


def test_rows_have_names_of_their_own_and_what_is_tuned_belongs_to_one() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(TUNED) <= set(names)
    for row in ROWS:
        for key, settings in TUNED.get(row.name, {}).items():
            assert key in row.networks
            assert settings in row.grid
