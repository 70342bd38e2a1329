"""Bounded memory: a batch goes through in parts, when the whole would need more than there is to spend."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attr.arguments.checks import check_int
from lightning_attr.batches.nested import input_bytes, select_rows
from lightning_attr.errors import MemoryBudgetError

log = logging.getLogger(__name__)

Rows: TypeAlias = "dict[str, Tensor]"

_SHARE = 0.5
"""Of the free memory, by default: the loader, the shard being written and the user's own code want some, too."""
_OF_INPUTS, _OF_NUMBERS = 10_000, 256
"""Bytes for each byte of a sample's inputs and for each number of its gradient: many times what passes take."""
_COMFORTABLE, _CACHED = 1024, 2**25
"""Samples a batch, and bytes that stay in the caches of a processor: more than either is no faster."""


@dataclass
class _Demand:
    """What a pass takes, as far as it was measured."""

    inputs: int = 0  # bytes of a sample's inputs
    fixed: int = 0
    per_sample: int = 0
    most: int = 0  # samples at once, where a device has run out of memory with more

    def of(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.per_sample


def check_memory_budget(owner: object, value: Any, name: str = "memory_budget") -> int:
    """Check a number of bytes.

    Returns the number as Python's int.

    Example:
        >>> check_memory_budget("attribute", 2 * 1024**3)
        2147483648
    """
    return check_int(owner, name, value, 1, also="None", remedy="It counts bytes: 2 * 1024**3 are 2 GB.")


class MemoryBudget:
    """Splits batches into parts whose tensors stay within a limit; features do not depend on the split.

    How much a sample takes is measured for each kind of pass, and again when larger samples come: two samples go
    through while every tensor that comes to life is counted. If that is so little that no batch comes near the limit,
    it is all; else one sample and two tell what each takes, without what was made once and kept. Memory inside library
    calls is not seen.

    Args:
        limit: bytes that the tensors of a pass may take; by default half of what is free on the device.
        careful: measure what each sample takes in any case, for :meth:`comfortable`.

    Raises:
        ValueError: if the limit is not positive.

    Example:
        >>> import torch
        >>> def doubled(batch, rows):
        ...     print(len(rows), "samples")
        ...     return {"x": batch * 2}
        >>> MemoryBudget(limit=3 * 4000).run(doubled, torch.ones(5, 1000), range(5))["x"].shape
        2 samples
        1 samples
        2 samples
        3 samples
        2 samples
        torch.Size([5, 1000])
    """

    def __init__(self, limit: int | None = None, careful: bool = False) -> None:
        if limit is not None:
            limit = check_memory_budget(self, limit, "limit")
        self.limit = limit
        self.demanded = limit is not None
        self._careful = careful
        self._demands: dict[str, _Demand] = {}
        self._said = False

    def run(
        self,
        function: Callable[[Any, Sequence[int]], Rows],
        batch: Any,
        rows: Sequence[int],
        kind: str = "",
        numbers: int | None = None,
    ) -> Rows:
        """Call a function on a batch, or on its parts.

        Shapes: function (b, ...). Returns the columns of the whole batch.
        """
        b = len(rows)
        inputs, device = input_bytes(batch, b)
        if self.limit is None and device is not None:
            free = free_bytes(device)
            self.limit = int(_SHARE * free) if free is not None else None
        if numbers is not None and not (self.demanded or self._careful):
            ample = b * (_OF_INPUTS * inputs + _OF_NUMBERS * numbers)
            if self.limit is not None and ample <= self.limit:
                return function(batch, rows)  # so little that no device runs out of memory
        demand = self._demands.setdefault(kind, _Demand())
        if inputs > demand.inputs:
            self._measure(demand, function, batch, rows)
            demand.inputs = inputs
        size = min(self._fitting(demand, b), demand.most or b)
        while (found := _in_parts(function, batch, rows, size)) is None:
            size = demand.most = self._half(demand, size)
        return found

    def comfortable(self, batch_size: int) -> int:
        """Enlarge a batch of small samples, where the calls cost more than the arithmetic.

        Returns the batch size, doubled as long as it stays within 1,024 samples and their tensors within 32 MiB, as far
        as samples were measured.
        """

        def fits(size: int) -> bool:
            return size <= _COMFORTABLE and all(demand.of(size) <= _CACHED for demand in self._demands.values())

        while self._demands and fits(2 * batch_size):
            batch_size *= 2
        return batch_size

    def _measure(
        self,
        demand: _Demand,
        function: Callable[[Any, Sequence[int]], Rows],
        batch: Any,
        rows: Sequence[int],
    ) -> None:
        b = len(rows)

        def peak(count: int) -> int:
            part = select_rows(batch, b, range(count))
            return peak_bytes(lambda: function(part, rows[:count]))

        few = min(b, 2)
        most = -(-peak(few) // few)  # with a share of what is made once: no sample takes more
        if not self._careful and (self.limit is None or most * max(b, _COMFORTABLE) <= self.limit):
            demand.per_sample = max(demand.per_sample, most)
            return
        peaks = [peak(count) for count in range(1, few + 1)]
        demand.per_sample = max(demand.per_sample, peaks[-1] - peaks[0] if b > 1 else peaks[0])
        demand.fixed = max(demand.fixed, peaks[0] - demand.per_sample)

    def _half(self, demand: _Demand, size: int) -> int:
        """What to try after a device ran out of memory: the limit does not see what libraries take for themselves."""
        if size == 1:
            raise MemoryBudgetError(
                f"The device has no memory left for a single sample: one needs about {_readable(demand.of(1))}, and "
                "what the libraries beneath take besides. Free what else is on the device, use a smaller `proj_dim`, "
                "or freeze parameters that should not be attributed."
            )
        log.warning("The device ran out of memory with %d samples: featurizing in parts of %d.", size, -(-size // 2))
        return -(-size // 2)

    def _fitting(self, demand: _Demand, batch_size: int) -> int:
        """How many samples may go through at once."""
        if self.limit is None or demand.of(batch_size) <= self.limit:
            return batch_size
        size = (self.limit - demand.fixed) // max(1, demand.per_sample)
        if size < 1 and not self.demanded:
            size = 1  # what is free is a guess: try
        if size < 1:
            raise MemoryBudgetError(
                f"One sample needs about {_readable(demand.of(1))}, but the memory budget is "
                f"{_readable(self.limit)}. Raise `memory_budget` to at least {demand.of(1):,} bytes, "
                "use a smaller `proj_dim`, or freeze parameters that should not be attributed."
            )
        if not self._said:
            log.warning(
                "Featurizing in parts of %d samples: a batch of %d needs about %s, more than the memory budget of %s.",
                size,
                batch_size,
                _readable(demand.of(batch_size)),
                _readable(self.limit),
            )
            self._said = True
        return size


def _in_parts(
    function: Callable[[Any, Sequence[int]], Rows], batch: Any, rows: Sequence[int], size: int
) -> Rows | None:
    """Call a function on parts of a batch; None where the device runs out of memory."""
    b = len(rows)
    try:
        if size >= b:
            return function(batch, rows)
        parts = []
        for start in range(0, b, size):
            part = range(start, min(start + size, b))
            parts.append(function(select_rows(batch, b, part), [rows[i] for i in part]))
        return {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    except torch.OutOfMemoryError:  # what it held is gone once this returns
        return None


def peak_bytes(function: Callable[[], object]) -> int:
    """Measure the most memory that the tensors made by a function take at one time.

    Returns bytes, on all devices together; tensors from before do not count.
    """
    meter = _Meter()
    with meter:
        function()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages that live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.current = 0
        self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *(kwargs or {}).values()))}
        for storage in (tensor.untyped_storage() for tensor in _tensors((result,))):
            if storage._cdata not in given and storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self._release, storage.nbytes())
                self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        return result

    def _release(self, size: int) -> None:
        self.current -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments or results of an operator, which come alone or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:  # the storages of a sparse one are those of its parts
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def free_bytes(device: torch.device) -> int | None:
    """Read how much memory is free on a device.

    Returns bytes; None where the system does not tell.
    """
    if device.type not in {"cpu", "mps"}:
        return _free_on(device)
    known = [size for size in (_available(), _left_in_group()) if size is not None]
    return min(known) if known else None


def _free_on(device: torch.device) -> int | None:
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    cached = (
        module.memory_reserved(device) - module.memory_allocated(device) if hasattr(module, "memory_reserved") else 0
    )
    return int(module.mem_get_info(device)[0] + cached)


def _available() -> int | None:
    table = Path("/proc/meminfo")
    if table.exists():
        entries = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
        return int(entries["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS tells only what it has in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_group() -> int | None:
    """What the memory limit of a container leaves; file caches that give way do not count as used."""
    groups = Path("/sys/fs/cgroup")
    for folder, limit, used in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()).isdigit():
            statistics = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
            return max(0, int(most) - int((folder / used).read_text()) + cache)
    return None


def _readable(size: int) -> str:
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{size / unit:,.2f} {name}"
