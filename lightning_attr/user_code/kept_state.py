"""The state that a call of somebody's code can reach, put back after the call: only what has changed is written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from lightning_attr.batches.nested import dense_parts
from lightning_attr.errors import AttributionError
from lightning_attr.user_code.contents import Contents
from lightning_attr.user_code.generators import generator_state, restore_generator
from lightning_attr.user_code.reachable import Reachable
from lightning_attr.user_code.streams import Streams
from lightning_attr.user_code.written_tensors import WrittenTensors, copied, put_back

_COPIED_BYTES = 2**28
"""Of buffers and other tensors that are no parameters: what is copied once, in case a call changes them unforeseen."""
_COPIED_DATA_BYTES = 2**24
"""Of tensors and arrays that data are read from: what is larger is data."""


class KeptState:
    """The state that is reached from some objects, put back after each of many calls.

    What calls are known to change is copied before a call and written back after it. Of all other tensors the version
    counter and the address are compared; one that has changed all the same is put back from a copy that was made once
    (if it is no parameter) or from ``values``.

    Args:
        roots: name -> object, as :class:`lightning_attr.user_code.reachable.Reachable` takes them.
        changing: names of the tensors and arrays that calls are known to change; what is found is added.
        values: gives the values of tensors by name: the weights of a snapshot.
        reading: whether the objects read data; as :class:`lightning_attr.user_code.reachable.Reachable` takes it.

    Attributes:
        created: names of iterators that a recorded call has left behind.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> state, before = KeptState({"": layer}, set()), layer.weight.item()
        >>> with state.kept(recording=True) as changed, torch.no_grad():
        ...     _ = layer.weight.zero_()
        >>> changed, layer.weight.item() == before
        (['weight'], True)
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        changing: set[str],
        values: Callable[[], Mapping[str, Tensor]] | None = None,
        reading: bool = False,
    ) -> None:
        self.reachable = Reachable(roots, reading)
        self.changing = changing
        self.values = values
        self.created: list[str] = []
        self._contents = Contents(self.reachable.containers)
        self._streams = Streams(self.reachable.streams, self.reachable.containers)
        self._most_bytes = _COPIED_DATA_BYTES if reading else _COPIED_BYTES
        self._tensors = _Tensors(self.reachable.tensors, self._most_bytes)
        self._parameters = [p for _, p in self.reachable.tensors if isinstance(p, nn.Parameter)]

    @contextmanager
    def kept(self, recording: bool = False, by_value: bool = False) -> Iterator[list[str]]:
        """Put everything back in the end.

        Yields the names of what has changed, in the end.
        """
        changed: list[str] = []
        with torch._C.DisableTorchFunction():  # these are no calls of the module's, for modes around
            before = self._contents.taken()
            flags = [p.requires_grad for p in self._parameters]
            gradients = [p.grad for p in self._parameters]
            streams = [(restore_generator(g), generator_state(g)) for _, g in self.reachable.generators]
            arrays = self._array_copies(recording or self.reachable.reading)
            buffers = [(buffer, bytes(memoryview(buffer))) for _, buffer in self.reachable.buffers]
            self._tensors.remember(self.changing)
            swapped = list(self._copies_of_swapped()) if self.changing else []
        written = WrittenTensors(self._tensors.tensors) if recording else None
        try:
            with self._streams.lent(), self._tensors.graph_keeps_values(), written or nullcontext():
                yield changed
            if recording and not self._contents.same(before):  # what a call leaves behind is in a container
                self.created = self._new_streams()
        finally:
            with torch._C.DisableTorchFunction():
                changed += self._contents.put_back(before)
                self._put_flags_back(flags, gradients)
                for (restore, state), (_, generator) in zip(streams, self.reachable.generators, strict=True):
                    if generator_state(generator) != state:
                        restore()
                written_arrays = _put_arrays_back(arrays)
                changed += self._put_buffers_back(buffers)
                for tensor, values in swapped:
                    put_back(tensor, None, values)
                unseen = self._tensors.changed_values() if by_value else {}
                found, lost = self._tensors.put_back({**unseen, **(written.before if written else {})}, self.values)
                changed += [*written_arrays, *found]
                self.changing.update(written_arrays, found)
        if lost and self.reachable.reading:
            raise AttributionError(
                f"{_some(lost)} changed while attribution read the data, and cannot be put back: training would see "
                "other data than without attribution. Let the data set work on copies of what it holds "
                "(`x = self.data[i].clone()`), not in place."
            )
        if lost and not by_value:
            raise AttributionError(
                f"{_some(lost)} changed unforeseen during attribution, and the values before are not known. Update "
                "such state in `on_train_batch_end` or `optimizer_step`, which attribution does not call."
            )

    def _put_flags_back(self, flags: list[bool], gradients: list[Tensor | None]) -> None:
        for p, requires_grad, gradient in zip(self._parameters, flags, gradients, strict=True):
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not gradient:
                p.grad = gradient

    def _array_copies(self, every: bool) -> list[tuple[str, Any, Any]]:
        """Arrays count no versions: those of a first call are compared, and then those that it changed."""
        found, bytes_left = [], self._most_bytes
        for name, array in self.reachable.arrays:
            if (every or name in self.changing) and array.nbytes <= bytes_left and not array.dtype.hasobject:
                bytes_left -= array.nbytes
                found.append((name, array, array.copy()))
        return found

    def _put_buffers_back(self, buffers: list[tuple[Any, bytes]]) -> list[str]:
        changed = []
        for (name, _), (buffer, before) in zip(self.reachable.buffers, buffers, strict=True):
            if bytes(memoryview(buffer)) != before:
                if len(memoryview(buffer).cast("B")) == len(before):
                    memoryview(buffer).cast("B")[:] = before
                else:
                    del buffer[:]
                    buffer.extend(before) if isinstance(buffer, bytearray) else buffer.frombytes(before)
                changed.append(name)
        return changed

    def _new_streams(self) -> list[str]:
        known = {id(stream) for _, stream in self.reachable.streams}
        return [name for name, stream in Reachable(self.reachable.roots).streams if id(stream) not in known]

    def _copies_of_swapped(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy the tensors that stand in for those which calls are known to change."""
        own = {id(tensor) for tensor in self._tensors.tensors}
        for name, container in self.reachable.containers:
            if isinstance(container, dict):
                places = ((f"{name}.{local}" if name else local, tensor) for local, tensor in container.items())
                for place, tensor in places:
                    if place in self.changing and isinstance(tensor, Tensor) and id(tensor) not in own:
                        yield tensor, tensor.detach().clone()


class _Tensors:
    """Tensors with their names, memory, versions, and copies of those that may have to be put back."""

    def __init__(self, named: list[tuple[str, Tensor]], bytes_left: int) -> None:
        named = [(name, t) for name, t in named if not is_lazy(t)]
        self.names = [name for name, _ in named]
        self.tensors = [tensor for _, tensor in named]
        self._timed = [n for n, tensor in enumerate(self.tensors) if not tensor.is_inference()]
        self._dense = [n for n in self._timed if _has_memory(self.tensors[n])]
        self._places = {n: self.tensors[n].detach() for n in self._dense}
        self._watched = set(range(len(self.tensors))).difference(self._timed)
        self._known = 0
        self._replaced: set[int] = set()  # those that calls put into other memory
        self._copies: dict[int, tuple[Any, Tensor]] = {}
        self.versions, self.addresses = self._stamps()
        for n, tensor in enumerate(self.tensors):
            own = n in self._places or tensor.is_inference() or tensor.is_sparse
            size = sum(part.nbytes for part in dense_parts(tensor)) if own else 0
            if own and not isinstance(tensor, nn.Parameter) and size <= bytes_left and not _overlaps(tensor):
                bytes_left -= size
                self._copies[n] = (self._stamp(n), copied(tensor))

    def _stamps(self) -> tuple[list[int], list[int]]:
        return [self.tensors[n]._version for n in self._timed], [self.tensors[n].data_ptr() for n in self._dense]

    def _stamp(self, number: int) -> Any:
        tensor = self.tensors[number]
        if tensor.is_inference():
            return None
        return (tensor._version, tensor.data_ptr() if number in self._places else 0)

    def remember(self, changing: set[str]) -> None:
        """Take note of versions, and copy what is known to change and is not what it was."""
        self.versions, self.addresses = self._stamps()
        if len(changing) != self._known:
            self._watched.update(n for n, name in enumerate(self.names) if name in changing)
            self._known = len(changing)
        for n in self._watched:
            stamp = self._stamp(n)
            if stamp is None or n not in self._copies or self._copies[n][0] != stamp:
                self._copies[n] = (stamp, copied(self.tensors[n]))

    def graph_keeps_values(self) -> AbstractContextManager[Any]:
        """Copy saved tensors that lie in the memory of one that calls change: it is put back before backward runs."""
        numbers = [n for n in self._dense if n in self._watched]
        floating = [self.tensors[n] for n in numbers if self.tensors[n].is_floating_point()]
        allowed = torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
        if not (floating and allowed):  # without hooks: torch.func does not run inside them
            return nullcontext()
        memory = {tensor.untyped_storage().data_ptr() for tensor in floating}
        moving = [self.tensors[n] for n in numbers if n in self._replaced]

        def pack(saved: Tensor) -> Tensor:
            if saved.layout is not torch.strided:
                return saved
            address = saved.untyped_storage().data_ptr()
            own = address in memory or any(address == t.untyped_storage().data_ptr() for t in moving)
            return saved.clone() if own else saved

        return saved_tensors_hooks(pack, lambda saved: saved)

    def changed_values(self) -> dict[int, Tensor]:
        """Compare tensors with their copies; give the copies of those that differ, NaN included."""
        copies = {n: copy for n, (_, copy) in self._copies.items() if n in self._places}
        return {n: copy for n, copy in copies.items() if not _equal(self.tensors[n], copy)}

    def put_back(
        self, written: Mapping[int, Tensor], values: Callable[[], Mapping[str, Tensor]] | None
    ) -> tuple[list[str], list[str]]:
        """Put back what has changed; return the names of what was not known to change, and of what is lost."""
        versions, addresses = self._stamps()
        if not (written or self._watched) and versions == self.versions and addresses == self.addresses:
            return [], []
        moved = {n for n, was, now in zip(self._dense, self.addresses, addresses, strict=True) if was != now}
        rewritten = {n for n, was, now in zip(self._timed, self.versions, versions, strict=True) if was != now}
        rewritten |= self._watched | written.keys()
        found, lost = [], []
        for n in sorted(moved | rewritten):
            before = written.get(n)
            if before is None and n in rewritten:
                before = self._before(n, values)
                if before is None:
                    lost.append(self.names[n])
                    continue
            put_back(self.tensors[n], self._places[n] if n in moved else None, before)
            if before is not None:
                self._copies[n] = (self._stamp(n), before)
            if n not in self._watched:
                found.append(self.names[n])
        self._replaced |= moved
        return found, lost

    def _before(self, number: int, values: Callable[[], Mapping[str, Tensor]] | None) -> Tensor | None:
        """The values of a tensor before the call."""
        stamp, copy = self._copies.get(number, (None, None))
        if stamp is not None and stamp[0] != self.versions[self._timed.index(number)]:
            copy = None  # of values that are no longer the tensor's
        if copy is not None:
            return copy
        return None if values is None else values().get(self.names[number])


def _put_arrays_back(arrays: list[tuple[str, Any, Any]]) -> list[str]:
    changed = []
    for name, array, before in arrays:
        if array.tobytes() != before.tobytes():
            np.copyto(array, before)
            changed.append(name)
    return changed


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address: none that is sparse, nor one that stands for others in ``torch.func``."""
    return tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    return tensor.device == copy.device and tensor.dtype == copy.dtype and torch.equal(tensor, copy)


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements share their memory: nobody can write to such a tensor."""
    return tensor.layout is torch.strided and 0 in tensor.stride() and tensor.numel() > 1


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
