"""Checks whose answer stays on the device, and running sums."""

from __future__ import annotations

import torch

from lightning_attr.batches.float64 import doubled, has_float64
from lightning_attr.batches.late_checks import late_checks, noted
from lightning_attr.batches.running_sum import running_sum
from lightning_attr.outputs.base import bad_labels

META = torch.device("meta")
"""Stands in for a device: it has no values that could be asked for."""


def test_a_device_keeps_its_answers_and_the_cpu_gives_them_at_once() -> None:
    wrong = torch.empty((), dtype=torch.bool, device=META)
    assert not noted(wrong)
    with late_checks() as notes:
        assert noted(wrong)
        assert not noted(torch.tensor(True))
        with late_checks(False) as none:
            assert not noted(wrong)
        assert none == []
    assert len(notes) == 1
    assert not noted(wrong)


def test_labels_of_a_device_are_noted() -> None:
    labels = torch.empty(3, 1, dtype=torch.long, device=META)
    with late_checks() as notes:
        assert bad_labels(labels, labels >= 0, 4) == ([], [])
    assert [note.shape for note in notes] == [torch.Size([])]


def test_running_sums_of_the_cpu_are_those_of_torch() -> None:
    x = torch.randn(3, 5)
    torch.use_deterministic_algorithms(True)
    assert torch.equal(running_sum(x), x.cumsum(-1))


def test_float64_of_the_cpu() -> None:
    assert has_float64(torch.device("cpu"))
    assert doubled(torch.ones(2)).dtype == torch.float64
