"""The processes that attribute together: sums over all of them, and an end for all where one fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor

from lightning_attr.batches.float64 import has_float64
from lightning_attr.errors import AttributionError

_PART_BYTES = 2**26
"""Of a tensor of the CPU, on the device at one time."""
_PATIENCE = timedelta(seconds=10)
"""How long a process that has failed waits to tell the others; then its end is what they notice."""


class Processes:
    """The processes of a strategy, seen from one of them.

    Every wait for the others is a chance to hear that one of them has failed: none waits for what never comes. All
    processes call the methods in the same order, but for :meth:`tell`.

    Args:
        rank: number of this process.
        world_size: how many there are.
        device: where tensors are exchanged.

    Example:
        >>> alone = Processes(0, 1, torch.device("cpu"))
        >>> with alone.together():
        ...     total = alone.sum(torch.ones(2))
        >>> total
        tensor([1., 1.])
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._apart = world_size == 1
        """Whether nobody is to be told anything, because there is nobody, or all know already."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes.

        Returns the sum, the same in all of them, on the tensor's device.
        """
        if self.world_size == 1:
            return tensor
        self.meet()
        if tensor.device == self.device or tensor.ndim == 0:
            on_device = tensor.to(self.device)
            torch.distributed.all_reduce(on_device)
            return on_device.to(tensor.device)
        # A matrix may be mapped from a file, and larger than the device.
        for part in tensor.split(max(1, _PART_BYTES * len(tensor) // max(1, tensor.nbytes))):
            on_device = part.to(self.device)
            torch.distributed.all_reduce(on_device)
            part.copy_(on_device)
        return tensor

    def placed(self, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Put what is computed with where it is computed fastest: on the device, unless that has no float64."""
        if not has_float64(self.device):
            return columns
        return {name: values.to(self.device) for name, values in columns.items()}

    def joined(self, columns: Mapping[str, Tensor], own: Sequence[int]) -> Mapping[str, Tensor]:
        """Bring rows of all processes together.

        Shapes: columns (n, ...). Returns the columns, with each row as its process has it.
        """
        if self.world_size == 1:
            return columns
        found = {}
        for name, values in columns.items():
            others = torch.ones(len(values), dtype=torch.bool)
            others[list(own)] = False
            found[name] = self.sum(values.masked_fill(others.view(-1, *[1] * (values.ndim - 1)), 0))
        return found

    def meet(self) -> None:
        """Wait for all processes."""
        if self._apart:
            return
        failed = torch.zeros(1, device=self.device)
        torch.distributed.all_reduce(failed)
        if not failed.item():
            return
        self._apart = True
        for rank, message in enumerate(self._exchange(None)):
            if message is not None:
                raise AttributionError(f"Process {rank} of {self.world_size} has failed, and all with it. {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something, and wait until all processes have come through."""
        try:
            yield
        except Exception as error:
            self.tell(error)
            raise
        self.meet()

    def tell(self, error: BaseException) -> None:
        """Let the others know that this process has failed, wherever they wait next; once is enough."""
        if self._apart:
            return
        self._apart = True
        # Others that are far from waiting, or gone, do not hear it: what is to be raised here is the error itself.
        with suppress(RuntimeError):
            work = torch.distributed.all_reduce(torch.ones(1, device=self.device), async_op=True)
            assert work is not None  # it is None only outside of a group
            work.wait(_PATIENCE)
            self._exchange(f"{type(error).__name__}: {error}")

    def _exchange(self, message: str | None) -> list[str | None]:
        messages: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(messages, message)
        return messages
