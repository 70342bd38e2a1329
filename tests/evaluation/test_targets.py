"""The hash of all targets, and outputs in eval mode."""

from __future__ import annotations

import torch
from evaluation.retraining_cases import Data, Tiny
from torch.utils.data import TensorDataset

from cases import loader_of, quiet_trainer
from lightning_attr.data.loader import DataSource
from lightning_attr.evaluation.targets import digest_of_all, target_outputs


def hashed(x: torch.Tensor, **settings: object) -> str:
    return digest_of_all(DataSource.of(loader_of(TensorDataset(x, x[:, 0].long()), **settings), "target"))


def test_the_hash_sees_every_sample_and_their_order_but_not_the_batches() -> None:
    x = torch.arange(20.0).reshape(10, 2)
    reference = hashed(x)
    assert hashed(x, batch_size=3) == reference == hashed(x, shuffle=True)
    for row in range(10):
        other = x.clone()
        other[row, 1] += 0.5
        assert hashed(other) != reference
    assert hashed(x.flip(0)) != reference
    assert hashed(x[:9]) != reference


def test_outputs_are_those_of_the_mixin_in_eval_mode_in_the_order_of_the_data_set() -> None:
    module, data = Tiny(), Data()
    source = DataSource.of(loader_of(data.targets, batch_size=2, shuffle=True), "target")
    beats: list[None] = []
    found = target_outputs(quiet_trainer(), module.train(), None, source, lambda: beats.append(None))
    with torch.no_grad():
        expected = module.eval().functional_output({}, {}, data.targets.tensors)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert len(beats) == 3
