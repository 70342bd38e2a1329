"""Featurized batches on their way from a device to the host, each while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Columns: TypeAlias = Mapping[str, Tensor]
Settle: TypeAlias = "Callable[[dict[str, Tensor]], dict[str, Tensor]]"


@dataclass
class _Flight:
    """A batch whose copy has been asked for."""

    rows: Sequence[int]
    names: list[str]
    bytes: Tensor
    like: list[tuple[torch.dtype, torch.Size]]
    event: torch.Event | None
    settle: Settle | None

    @classmethod
    def begin(cls, rows: Sequence[int], columns: Columns, settle: Settle | None) -> _Flight:
        """Put all columns into one piece of memory, the widest dtype first, and ask for one copy of it."""
        ordered = dict(sorted(columns.items(), key=lambda column: -column[1].element_size()))
        parts = [values.detach().contiguous() for values in ordered.values()]
        packed = torch.cat([part.flatten().view(torch.uint8) for part in parts])
        pinned = packed.device.type not in {"cpu", "mps"}  # Apple's say nothing of when a copy has come
        landed = packed.to("cpu", non_blocking=pinned)
        event = None
        if pinned:
            event = torch.Event(packed.device)
            event.record()
        return cls(rows, list(ordered), landed, [(part.dtype, part.shape) for part in parts], event, settle)

    def end(self) -> dict[str, Tensor]:
        """Wait for the copy: the only wait of a batch."""
        if self.event is not None:
            self.event.synchronize()
        columns, start = {}, 0
        for name, (dtype, shape) in zip(self.names, self.like, strict=True):
            stop = start + shape.numel() * dtype.itemsize
            piece = self.bytes[start:stop].view(dtype).view(shape)
            columns[name] = piece if name == "features" else piece.clone()  # what is small does not hold what is large
            start = stop
        return columns if self.settle is None else self.settle(columns)


class Landing:
    """Gives each batch on when it is on the host: one of the CPU at once, one of a device when the next one comes.

    Args:
        put: takes rows and columns on the CPU, in the order of :meth:`add`.

    Example:
        >>> landing = Landing(lambda rows, columns: print(rows, columns["loss"]))
        >>> landing.add([0, 1], {"loss": torch.tensor([1.0, 2.0])})
        [0, 1] tensor([1., 2.])
        >>> landing.finish()
    """

    def __init__(self, put: Callable[[Sequence[int], Columns], None]) -> None:
        self.put = put
        self.landed = False  # whether what is put comes late from a device
        self._flight: _Flight | None = None

    def add(self, rows: Sequence[int], columns: Columns, settle: Settle | None = None) -> None:
        """Take a batch.

        Shapes: columns (b, ...).
        """
        if all(values.device.type == "cpu" for values in columns.values()):
            self.finish()
            own = {name: values.detach() for name, values in columns.items()}
            self.put(rows, own if settle is None else settle(own))
            return
        flight = _Flight.begin(rows, columns, settle)
        self.finish()
        self._flight = flight

    def finish(self) -> None:
        """Give on what is on its way."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self.landed = True
            try:
                self.put(flight.rows, flight.end())
            finally:
                self.landed = False

    def drop(self) -> None:
        """Forget what is on its way, after an error."""
        self._flight = None
