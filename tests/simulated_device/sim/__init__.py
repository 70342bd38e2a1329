"""A simulated accelerator, torch's device ``sim``: two of them in the host's memory, and what CUDA refuses they refuse.

Importing this builds a C++ extension with g++ and ninja, a minute, once a version of torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's ninja
MISSING = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
"""Tools without which nothing can be built; tests skip."""


def _built() -> Any:
    own = f"sim-{torch.__version__}-{sys.implementation.cache_tag}"
    folder = Path(os.environ.get("SIMULATED_DEVICE_BUILD", Path(sys.prefix) / "simulated_device")) / own
    folder.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).parent / "operators.cpp")
    return cpp_extension.load(
        "_simulated_device", [source], extra_cflags=["-O1", "-g0", "-w"], build_directory=str(folder)
    )


if MISSING:
    raise ImportError(f"the simulated device needs {' and '.join(MISSING)} to be built")
_sim = _built()


def _index(device: Any) -> int:
    found = device if isinstance(device, int) else None if device is None else torch.device(device).index
    return _sim.current_device() if found is None else found


class _Module(types.ModuleType):
    """What ``torch.sim`` offers, in the names of ``torch.cuda``."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    device_count = staticmethod(_sim.device_count)
    current_device = staticmethod(_sim.current_device)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    set_device = staticmethod(lambda device: _sim.set_device(_index(device)))
    synchronize = staticmethod(lambda device=None: _sim.synchronize())
    get_rng_state = staticmethod(lambda device=None: _sim.default_generator(_index(device)).get_state())
    set_rng_state = staticmethod(lambda state, device=None: _sim.default_generator(_index(device)).set_state(state))
    manual_seed = staticmethod(lambda seed: _sim.default_generator(_sim.current_device()).manual_seed(seed))
    memory_allocated = staticmethod(lambda device=None: _sim.memory()[0])
    max_memory_allocated = staticmethod(lambda device=None: _sim.memory()[1])
    reset_peak_memory_stats = staticmethod(lambda device=None: _sim.reset_peak())
    mem_get_info = staticmethod(lambda device=None: (_sim.memory()[2] - _sim.memory()[0], _sim.memory()[2]))

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state(i) for i in range(_sim.device_count())]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for i, state in enumerate(states):
            self.set_rng_state(state, i)

    def manual_seed_all(self, seed: int) -> None:
        for i in range(_sim.device_count()):
            _sim.default_generator(i).manual_seed(seed)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = _sim.current_device()
        _sim.set_device(_index(device))
        try:
            yield
        finally:
            _sim.set_device(before)


torch.utils.rename_privateuse1_backend("sim")
torch._register_device_module("sim", _Module("torch.sim"))
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)

set_data, set_device_count, set_memory = _sim.set_data, _sim.set_device_count, _sim.set_memory


@contextmanager
def _switched(switch: Callable[[bool], None]) -> Iterator[None]:
    switch(True)
    try:
        yield
    finally:
        switch(False)


def without_float64() -> Any:
    """Refuse float64, as Apple's devices do."""
    return _switched(_sim.refuse_float64)


def tensor_cores() -> Any:
    """Round products and convolutions to the ten bits of TF32, where torch's own flags allow it."""
    return _switched(_sim.round_products)


def late_copies() -> Any:
    """Let pinned copies to the host land at the next wait; until then they read as NaN."""
    return _switched(_sim.land_copies_late)


@contextmanager
def counted(on_wait: Callable[[str], None] | None = None) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Count operators, and what makes the host wait; both are filled in the end."""
    operators: dict[str, int] = {}
    waits: dict[str, int] = {}
    _sim.start_counting(on_wait)
    try:
        yield operators, waits
    finally:
        found = _sim.stop_counting()
        operators.update(found[0])
        waits.update(found[1])
