"""The parts of the table of methods that need no peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")
import methods
import methods_ours
import methods_runs
import methods_verdicts
from methods_rows import ROWS
from methods_tuned import TUNED

import digits
from lightning_attr import AttributionTrainer

QUICK = digits.Setting("quick", digits.mlp, (64,), epochs=1)


def row(by: str, seconds: float, lds: float, **others: object) -> dict[str, object]:
    figures = {"lds": lds, "low": lds - 0.05, "high": lds + 0.05, "seconds": seconds, "targets": 360}
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


def test_verdicts_name_what_is_slower_than_the_fastest_or_worse_than_the_best() -> None:
    rows = [row("ours", 2.0, 0.50), row("fast", 1.0, 0.52), row("good", 1.5, 0.60), row("broken", 0.0, 0.0)]
    del rows[3]["low"]
    rows.append(row("of other targets", 0.5, 0.9, targets=60))
    assert methods_verdicts.verdicts(rows) == [
        "mlp: A: slower, 2.00 times the seconds of fast",
        "mlp: A: worse, LDS 0.500, of good 0.600",
    ]
    assert methods_verdicts.verdicts([row("ours", 1.0, 0.5), row("peer", 2.0, 0.54)]) == []


def test_verdicts_tell_aims_that_are_met_from_those_that_are_missed() -> None:
    trak = row("ours", 1.0, 0.67, method="TRAK, one run", auroc=0.991)
    start = row("ours", 1.0, 0.69, method="TRAK, one run from the start", auroc=0.98)
    peer = row("peer", 2.0, 0.9, method="TRAK, other", auroc=1.0)
    factors = row("ours", 1.0, 0.51, method="EK-FAC")
    apart = {"network": "lr", "method": "explicit less CG", "by": "", "difference": 2e-4}
    assert methods_verdicts.verdicts([trak, start, peer, factors, apart]) == [
        "mlp: EK-FAC: lds 0.510, aim 0.52: MISSED",
        "mlp: TRAK, one run from the start: lds 0.690, aim 0.68: met",
        "mlp: TRAK, one run: auroc 0.991, aim 0.99: met",
        "lr: explicit less CG: 2.0e-04, aim 1e-04: MISSED",
    ]


def test_the_difference_is_a_share_of_each_targets_largest_score() -> None:
    exact = torch.tensor([[10.0, 0.0, 1.0, 0.0], [1.0, 0.0, -2.0, 0.0]])
    assert methods.difference(exact, exact[:, ::2] + torch.tensor([[0.1, 0.0], [0.0, 0.2]])) == pytest.approx(0.1)


def test_thinned_runs_keep_every_training_sample() -> None:
    data = methods_runs.clean(QUICK)
    run = methods_runs.Run(
        QUICK, data, AttributionTrainer(**methods_runs.quiet()), digits.DigitsClassifier(QUICK), {}, Path()
    )
    few = methods_runs.thinned(run, 6)
    assert torch.equal(few.data.x_target, data.x_target[::6])
    assert torch.equal(few.data.y_target, data.y_target[::6])
    assert torch.equal(few.data.x, data.x)


def test_a_sum_of_methods_gives_each_an_equal_part() -> None:
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[300.0, 100.0]])
    parts = {"a": lambda run, own, damping: one * damping, "b": lambda run, own, damping: other * damping}
    found = methods_ours.equal_sum(**parts)(None, False, a=1.0, b=2.0)
    torch.testing.assert_close(found, one / one.std() + other / other.std())


def test_cells_that_are_not_known_are_empty() -> None:
    figures = {"auroc": 0.9, "best_out": 1.0, "trainings": 2.0}
    assert methods.line(row("b", 1.0, 0.5, settings={"damping": 0.1, "l": None}, **figures)) == (
        "| mlp | A | b | damping=0.1 l=None | 0.500 (0.450 to 0.550) | 360 |  |  | 0.900 | +1.0 | 2.0 |"
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
