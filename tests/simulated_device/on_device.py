"""A pytest plugin: the Trainers of all tests run on the simulated device.

    PYTHONPATH=tests/simulated_device pytest -p on_device tests/test_end_to_end.py

A test that asks for a CPU Trainer's own bits says so with the marker `cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sim
from sim.trainer import trainers_on_sim


@pytest.fixture(autouse=True)
def simulated_device() -> Iterator[None]:
    sim.set_device_count(1)  # of several, `torch.random.fork_rng()` warns
    with trainers_on_sim():
        yield
