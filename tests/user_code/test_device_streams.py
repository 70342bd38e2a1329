"""Random streams of devices: put back where something runs on them, and not started where nothing does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_attr.user_code import generators


class Device(SimpleNamespace):
    """A kind of device that starts when it is first used."""

    def __init__(self, started: bool) -> None:
        super().__init__(started=started, state=1, asked=0)
        self._lazy_seed_tracker = SimpleNamespace(get_calls=lambda: [None, (self.seed, ["stack"])])

    def seed(self) -> None:
        self.state = 7

    def is_initialized(self) -> bool:
        return self.started

    def get_rng_state_all(self) -> int:
        self.asked += 1
        return self.state

    def set_rng_state_all(self, state: int) -> None:
        self.state = state


@pytest.fixture(params=[True, False], ids=["started", "new"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Device(request.param)
    monkeypatch.setattr(generators, "_accelerators", lambda: ["own"])
    monkeypatch.setattr(torch, "get_device_module", lambda kind: found)
    return found


def test_a_device_that_nothing_runs_on_is_not_started(device: Any) -> None:
    with generators.preserved_rng():
        pass
    assert device.asked == (1 if device.started else 0)


def test_streams_are_put_back_to_where_they_were_or_began(device: Any) -> None:
    before = device.started
    with generators.preserved_rng():
        device.started, device.state = True, 3
    assert device.state == (1 if before else 7)


def test_cuda_is_not_started_on_the_cpu() -> None:
    assert generators._accelerators()[0] == "cuda"
    if not torch.cuda.is_initialized():
        with generators.preserved_rng():
            torch.rand(1)
        assert not torch.cuda.is_initialized()
