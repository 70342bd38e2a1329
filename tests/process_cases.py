"""Groups of processes on this machine, for tests and benchmarks of what several processes do together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import Any

import torch

from cases import child

__all__ = ["connect", "run"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(count: int, function: Callable[..., None], *arguments: Any, seconds: float = 120) -> list[int | None]:
    """Run a function of a file in so many processes, which get their rank, and tell how they ended (None: not)."""
    group = {"WORLD_SIZE": str(count), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    end = monotonic() + seconds
    with ExitStack() as stack:
        started = [stack.enter_context(child(function, rank, count, group, *arguments)) for rank in range(count)]
        for process in started:
            process.join(max(0.0, end - monotonic()))
        return [process.exitcode for process in started]


def connect(rank: int, count: int, group: dict[str, str]) -> None:
    """What a launcher does before Lightning starts."""
    torch.set_num_threads(1)
    os.environ.update(group, LOCAL_RANK=str(rank), RANK=str(rank))
