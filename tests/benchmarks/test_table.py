"""The parts of the table that need no peer."""

from __future__ import annotations

import torch
from table import Data, accuracy_without, flip_rate, flipped, table

from digits import SETTINGS, Setting, load, mlp

QUICK = Setting("quick", mlp, (64,), epochs=2)


def data() -> Data:
    x, x_target, y, y_target = load(SETTINGS["mlp"])
    return Data(x, y, x_target, y_target)


def test_flipped_labels_are_those_of_the_mask() -> None:
    noisy, mask = flipped(data())
    assert torch.equal(noisy.y != data().y, mask)
    assert 0.08 < mask.double().mean() < 0.12
    assert torch.equal(noisy.x_target, data().x)
    assert torch.equal(noisy.y_target, noisy.y)


def test_what_is_first_is_removed() -> None:
    by_class = data().y.argsort()  # without the first 40 % there are only the classes from 4 on
    accuracy = accuracy_without(QUICK, data(), lambda _: by_class)
    left = (data().y_target >= data().y[by_class[round(0.4 * len(by_class))]]).double().mean()
    assert (accuracy[:, 2] <= left).all()
    assert (accuracy[:, 0] > accuracy[:, 2]).all()


def test_targets_flip_without_their_class() -> None:
    targets = [0, 1]
    of_class = [(data().y == data().y_target[target]).nonzero().flatten().tolist() for target in targets]
    assert flip_rate(QUICK, data(), of_class, targets) == 1.0


def test_cells_that_are_not_known_are_empty() -> None:
    row = {"what": "a", "lds": 0.5, "low": 0.4, "high": 0.6, "auroc": 0.9, "removal": 1.0, "removal_error": 0.25}
    lines = table([{**row, "flipped": 0.5, "seconds": 2.0}, {"what": "b", "auroc": 0.8}]).splitlines()
    assert lines[2:] == ["| a | 0.500 (0.400 to 0.600) | 0.900 | 1.0 ± 0.2 | 50% | 2.0 |", "| b |  | 0.800 |  |  |  |"]
