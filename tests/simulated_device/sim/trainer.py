"""Lightning on the simulated device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from sim.emulation import like_cuda


class SimAccelerator(Accelerator):
    """What Lightning wants to know of an accelerator."""

    def setup_device(self, device: torch.device) -> None:
        torch.sim.set_device(device)

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("sim", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "sim"


def on_sim(precision: str | None = None, index: int = 0) -> dict[str, Any]:
    """The arguments that put a Trainer on ``sim:index``; mixed precision needs a plugin that knows the device."""
    strategy = SingleDeviceStrategy(torch.device("sim", index), accelerator=SimAccelerator())
    found: dict[str, Any] = {"strategy": strategy, "devices": 1}
    if precision in {"16-mixed", "bf16-mixed"}:
        scaler = torch.amp.GradScaler("sim") if precision == "16-mixed" else None
        found["plugins"] = [MixedPrecision(precision, "sim", scaler)]
    elif precision is not None:
        found["precision"] = precision
    return found


_TAKEN = {"accelerator": ("auto", "cpu"), "strategy": ("auto",), "devices": ("auto", 1)}


@contextmanager
def trainers_on_sim() -> Iterator[None]:
    """Put every Trainer on the device that would take the CPU, alone; what it moves stays itself."""
    init = L.Trainer.__init__

    @functools.wraps(init)
    def moved(self: L.Trainer, *args: Any, **given: Any) -> None:
        fits = all(given.get(name, allowed[0]) in allowed for name, allowed in _TAKEN.items())
        if args or given.get("plugins") or not fits:
            init(self, *args, **given)
            return
        rest = {name: value for name, value in given.items() if name not in {*_TAKEN, "precision"}}
        init(self, **rest, **on_sim(given.get("precision")))

    L.Trainer.__init__ = moved
    try:
        with like_cuda():
            yield
    finally:
        L.Trainer.__init__ = init
