"""The mode that sees every function which a module calls, and follows parameters to where they meet the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_attr.gradients.direct_use.repetition import repeats_rows
from lightning_attr.gradients.direct_use.use import Use, handler_of, is_in_place, replace, tensors_in
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.gradients.rules import GradientRule

# Functions that say something of a tensor without its values, and give no tensor.
_WITHOUT_TENSORS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")
} | {Tensor.size, Tensor.dim}
# Functions that take from their second argument its form only.
_WITHOUT_VALUES = {"to", "type_as", "view_as", "reshape_as"}
Attach: TypeAlias = Callable[[Any, dict[str, str], GradientRule, Tensor, Tensor], Tensor]


class DirectUses(TorchFunctionMode):
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
        super().__init__()
        self.batch_size = batch_size
        self.followed = followed
        self.used: set[str] = set()
        self.skipped: set[str] = set()
        self._names = {id(p): name for name, p in followed.items()}
        self._attach = attach
        self._leaves = leaves
        self._sink = sink
        self._known = known
        self._single = batch_size == 1 and not checking  # then there is nothing to tell apart
        # Held until the end, so that no id comes to stand for another tensor.
        self._free: dict[int, Tensor] = {id(t): t for t in free}
        self._overwritten: set[int] = set()  # storages into which values of the batch were written
        self._sources: dict[int, dict[str, Tensor]] = {}
        self._open: dict[int, int] = {}  # copies of derived values whose gradients are still to come
        self._sums: dict[int, Tensor] = {}  # those that have come
        self._made_contiguous: dict[int, tuple[Tensor, tuple[int, int] | None]] = {}
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
        if tensors and not any(id(t) in self._free for t in tensors):  # nearly all others
            return func(*args, **kwargs)
        derived = [t for t in tensors if t.requires_grad and self.is_derived(t)] if torch.is_grad_enabled() else []
        rows = [t for t in tensors if not self.is_free(t)]
        if func.__name__ in _WITHOUT_VALUES and tensors:
            result = func(*args, **kwargs)
            return self._mark_free(result) if self.is_free(tensors[0]) else result
        if rows and not derived:
            if is_in_place(func):
                self._mark_overwritten(tensors[0])
            return func(*args, **kwargs)
        if not derived:
            return self._mark_free(func(*args, **kwargs))
        if not rows and not repeats_rows(func, args, kwargs, self._single):
            # Kept by checkpoints, so that pulling back runs nothing again.
            with saved_tensors_hooks(_itself, _itself):
                once = func is Tensor.contiguous and len(args) == 1 and not kwargs
                return self._mark_free(self._contiguous(args[0]) if once else func(*args, **kwargs))
        handler = handler_of(func)
        result = NotImplemented if handler is None else handler(Use(self, func, args, kwargs, derived, rows))
        return self._give_up(func, args, kwargs, derived) if result is NotImplemented else result

    def is_free(self, tensor: Tensor) -> bool:
        """Tell whether a value does not depend on the batch."""
        if id(tensor) not in self._free:
            return False
        if tensor.layout != torch.strided:  # nothing is written into these
            return True
        return not self._overwritten or tensor.untyped_storage()._cdata not in self._overwritten

    def is_derived(self, tensor: Tensor) -> bool:
        """Tell whether a value depends on parameters that are followed, and not on the batch."""
        return self.is_free(tensor) and bool(self._sources_of(tensor))

    def copy(self, value: Tensor, ndim: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Give each sample its own copy of a value, as a view, aligned to tensors of ``ndim`` dimensions.

        Returns ``(b, 1, ..., *value.shape)``; None if the first dimension of the value stands where the batch does.
        """
        if value.ndim >= ndim and not (value.ndim == ndim and value.shape[0] == 1):
            return None
        shape = value.shape[1:] if value.ndim == ndim else (*[1] * (ndim - 1 - value.ndim), *value.shape)
        leaf = value.detach().reshape(1, *shape).expand(self.batch_size, *shape).requires_grad_()
        self._leaves.append(leaf)
        copies = leaf.view_as(leaf) if dtype is None else leaf.to(dtype).view_as(leaf)
        self._open[id(value)] = self._open.get(id(value), 0) + 1

        def arrive(gradient: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._arrive(value, gradient.reshape(self.batch_size, *value.shape))
                return gradient.new_zeros(()).expand_as(gradient)  # so that it is not kept until the end

        copies.register_hook(arrive)
        self.used.update(self._sources_of(value))
        return copies

    def attach(self, values: Mapping[str, Tensor], rule: GradientRule, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Follow one use of values, by the local names that a rule gives their gradients."""
        names = {name: name for value in values.values() for name in self._sources_of(value)}
        self.used.update(names)

        def give(_: Any, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
            gradients = rule(layer, activations, backprops)
            for local, value in values.items():
                self.give(value, gradients[local])
            return {}

        return self._attach(None, names, give, x, output)

    def _arrive(self, value: Tensor, gradient: Tensor) -> None:
        """Pass on the gradient of a copy; all copies of a derived value, such as a bias of all layers, at once."""
        key = id(value)
        self._open[key] -= 1
        if key in self._names:
            self.give(value, gradient)
            return
        self._sums[key] = self._sums[key] + gradient if key in self._sums else gradient
        if self._open[key] == 0:
            self.give(value, self._sums.pop(key))

    def finish(self) -> None:
        """Pass on what has waited for copies that have no part in the output."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for key in list(self._sums):
                self.give(self._free[key], self._sums.pop(key))

    def give(self, value: Tensor, gradient: ParameterGradient) -> None:
        """Pass a value's per-sample gradients on to the parameters that it is derived from."""
        sources = self._sources_of(value)
        if id(value) in self._names:
            if isinstance(gradient, Tensor):
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self._sink({self._names[id(value)]: gradient})
            return
        rows = materialise(gradient, tuple(value.shape)).to(value.dtype)
        pulled = _pull_back(value, list(sources.values()), rows)
        dtypes = (torch.promote_types(tensor.dtype, torch.float32) for tensor in pulled)
        self._sink({name: tensor.to(dtype) for name, tensor, dtype in zip(sources, pulled, dtypes, strict=True)})

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
                    self._mark_free(self._constants[id(p)])
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

    def _contiguous(self, value: Tensor) -> Tensor:
        """Make a derived value contiguous once for all layers, so that a bias common to them is pulled back once."""
        result, versions = self._made_contiguous.get(id(value), (value, None))
        if versions != (value._version, result._version):  # new, or changed in place since
            result = value.contiguous()
            self._made_contiguous[id(value)] = result, (value._version, result._version)
        return result

    def _mark_free(self, result: Any) -> Any:
        for tensor in tensors_in((result,)):
            self._free[id(tensor)] = tensor
        return result

    def _mark_overwritten(self, tensor: Tensor) -> None:
        if self.is_free(tensor):
            self._overwritten.add(tensor.untyped_storage()._cdata)

    def _give_up(self, func: Any, args: Any, kwargs: Any, derived: list[Tensor]) -> Any:
        """Run a function that nothing is known about; its parameters are left to others if a gradient comes of it."""
        instead = {id(t): self.copy(t, t.ndim + 1)[0] if self._single else t.detach() for t in derived}  # type: ignore[index]
        args, kwargs = replace((args, kwargs), lambda t: instead.get(id(t), t))
        result = func(*args, **kwargs)
        if self._single:
            return result
        outputs = tensors_in((result,))
        if is_in_place(func):
            self._mark_overwritten(tensors_in((args, kwargs))[0])
        elif not any(t.is_floating_point() or t.is_complex() for t in outputs):
            return result
        for value in derived:
            self.skipped.update(self._sources_of(value))
        return result

    def _sources_of(self, value: Tensor) -> dict[str, Tensor]:
        """The followed parameters that a value is derived from, by name."""
        if id(value) in self._names:
            return {self._names[id(value)]: value}
        known = self._sources.get(id(value))
        if known is None:
            found = {id(getattr(node, "variable", None)) for node in _nodes(value)}
            known = {name: p for name, p in self.followed.items() if id(p) in found}
            self._sources[id(value)] = known
        return known


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _nodes(value: Tensor) -> set[Any]:
    """The nodes of the graph that a value comes from."""
    nodes, seen = [value.grad_fn], {value.grad_fn}
    while nodes:
        node = nodes.pop()
        if node is not None:  # else a tensor that needs gradients by itself, or by nothing
            new = {following for following, _ in node.next_functions} - seen
            seen |= new
            nodes += new
    return seen - {None}


def _pull_back(value: Tensor, parameters: list[Tensor], rows: Tensor) -> list[Tensor]:
    """Vector-Jacobian products with each sample's row, ``(b, *shape)`` of each parameter."""

    def product(row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, parameters, row, retain_graph=True)

    try:
        # `is_grads_batched` runs the backward of an embedding, as of relative positions, row by row; but it is silent
        # about functions that neither runs at once.
        if any(type(node).__name__ == "EmbeddingBackward0" for node in _nodes(value)):
            return list(torch.func.vmap(product)(rows))
        return list(torch.autograd.grad(value, parameters, rows, retain_graph=True, is_grads_batched=True))
    except (RuntimeError, NotImplementedError):  # a backward formula that vmap cannot run
        return [torch.stack(column) for column in zip(*map(product, rows), strict=True)]
