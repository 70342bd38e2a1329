"""The mode that sees every function which a module calls, and follows parameters to where they meet the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_attr.gradients.direct_use.copied_values import Attach, CopiedValues
from lightning_attr.gradients.direct_use.repetition import repeats_rows
from lightning_attr.gradients.direct_use.use import Use, handler_of, is_in_place, replace, tensors_in
from lightning_attr.gradients.factored import ParameterGradient

# Functions that say something of a tensor without its values, and give no tensor.
_WITHOUT_TENSORS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")
} | {Tensor.size, Tensor.dim}
# Functions that take from their second argument its form only.
_WITHOUT_VALUES = {"to", "type_as", "view_as", "reshape_as"}


class DirectUses(CopiedValues, TorchFunctionMode):
    """Follows the direct uses of some parameters through a forward pass, and through what checkpoints run again of it.

    Args:
        free: parameters and buffers of the module: they do not depend on the batch, and neither do tensors made inside
            the forward pass. Every other tensor from outside counts as the batch's.
        followed: the parameters, by name; they alone require gradients.
        batch_size: ``b``.
        attach: follows one use of a layer's parameters.
        leaves: gathers what the backward pass has to reach.
        sink: called with ``{name: gradient}``.
        known: names that were used directly when the module was checked; None if that is not known.
        checking: whether what is seen now decides for all batches to come.
    """

    def __init__(
        self,
        free: Iterable[Tensor],
        followed: Mapping[str, Tensor],
        batch_size: int,
        attach: Attach,
        leaves: list[Tensor],
        sink: Callable[[Mapping[str, ParameterGradient]], None],
        known: Collection[str] | None,
        checking: bool,
    ) -> None:
        super().__init__(free, followed, batch_size, attach, leaves, sink)
        self.skipped: set[str] = set()
        self._known = known
        self._single = batch_size == 1 and not checking  # then there is nothing to tell apart
        self._constants: dict[int, Tensor] = {}  # what stands for the parameters that rules cover
        # Of each layer being run: the constants in the place of parameters, and whether no sample has a part in its
        # input.
        self._layers: list[tuple[dict[int, Tensor], bool]] = [({}, False)]
        self.left_shared = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function that the module calls, in a form that shows each sample's part in its parameters."""
        kwargs = kwargs or {}
        if func in _WITHOUT_TENSORS:  # a third of the calls
            return func(*args, **kwargs)
        covered = self._layers[-1][0]
        if covered:
            args, kwargs = replace((args, kwargs), lambda t: covered.get(id(t), t))
        tensors = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        if tensors and not any(id(t) in self.free for t in tensors):  # nearly all others
            return func(*args, **kwargs)
        derived = [t for t in tensors if t.requires_grad and self.is_derived(t)] if torch.is_grad_enabled() else []
        rows = [t for t in tensors if not self.is_free(t)]
        if func.__name__ in _WITHOUT_VALUES and tensors:
            result = func(*args, **kwargs)
            return self.mark_free(result) if self.is_free(tensors[0]) else result
        if rows and not derived:
            if is_in_place(func):
                self.mark_overwritten(tensors[0])
            return func(*args, **kwargs)
        if not derived:
            return self.mark_free(func(*args, **kwargs))
        if not rows and not repeats_rows(func, args, kwargs, self._single):
            # Kept by checkpoints, so that pulling back runs nothing again.
            with saved_tensors_hooks(_itself, _itself):
                once = func is Tensor.contiguous and len(args) == 1 and not kwargs
                return self.mark_free(self.contiguous(args[0]) if once else func(*args, **kwargs))
        handler = handler_of(func)
        result = NotImplemented if handler is None else handler(Use(self, func, args, kwargs, derived, rows))
        return self._give_up(func, args, kwargs, derived) if result is NotImplemented else result

    def enter(self, x: Any, parameters: Mapping[str, Tensor]) -> None:
        """Begin a layer whose own rule covers some parameters, unless its input is the same for all samples."""
        with torch._C.DisableTorchFunction():
            shared = isinstance(x, Tensor) and self.is_free(x) and self._is_shared(x, parameters)
            if shared:
                self.skipped.update(parameters.keys() - self.followed.keys())
                self._layers.append((self._layers[-1][0], True))
                return
            for p in parameters.values():
                if id(p) not in self._constants:
                    self._constants[id(p)] = p.detach()
                    self.mark_free(self._constants[id(p)])
            self._layers.append((
                self._layers[-1][0] | {id(p): self._constants[id(p)] for p in parameters.values()},
                False,
            ))

    def leave(self) -> None:
        """End a layer; ``left_shared`` tells whether its rule has to leave it alone."""
        self.left_shared = self._layers.pop()[1]

    def _is_shared(self, x: Tensor, parameters: Mapping[str, Tensor]) -> bool:
        if self.is_derived(x) or x.ndim == 1:
            return True
        if x.shape[0] == 1:
            return False  # each sample gets a copy of the one row
        # Rows for all samples, such as token types, may be as free of values of the batch as a table of distances.
        # Sizes tell them apart while the module is checked; afterwards nothing may depend on the batch size.
        return x.shape[0] != self.batch_size if self._known is None else not parameters.keys().isdisjoint(self._known)

    def _give_up(self, func: Any, args: Any, kwargs: Any, derived: list[Tensor]) -> Any:
        """Run a function that nothing is known about; its parameters are left to others if a gradient comes of it."""
        instead = {id(t): self.copy(t, t.ndim + 1)[0] if self._single else t.detach() for t in derived}  # type: ignore[index]
        args, kwargs = replace((args, kwargs), lambda t: instead.get(id(t), t))
        result = func(*args, **kwargs)
        if self._single:
            return result
        outputs = tensors_in((result,))
        if is_in_place(func):
            self.mark_overwritten(tensors_in((args, kwargs))[0])
        elif not any(t.is_floating_point() or t.is_complex() for t in outputs):
            return result
        for value in derived:
            self.skipped.update(self.sources_of(value))
        return result


def _itself(tensor: Tensor) -> Tensor:
    return tensor
