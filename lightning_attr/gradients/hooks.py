"""Per-sample gradients of a whole batch from one forward and one backward pass, layer by layer, by hooks.

Parameters are frozen or stood in for while the hooks run, so that no weight gradient of the batch is ever formed: the
backward pass carries only the gradients of activations. Each layer's per-sample gradients leave through a sink as soon
as its output gradient is known, so that those of the whole model never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients.direct_use.tracer import DirectUses
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.gradients.rules import CHECKED_LAYERS, GradientRule, check_layer, forward_for, rule_for

GradientSink: TypeAlias = Callable[[str, ParameterGradient], None]
LayerSink: TypeAlias = Callable[[Mapping[str, ParameterGradient]], None]


def hooked_layers(module: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Find the layers that have a rule and parameters to attribute.

    Args:
        module: any module.

    Returns:
        Layer -> {local parameter name: name in ``module.named_parameters()``}, trainable parameters only. A tied
        parameter appears under its one name in each of its layers.

    Example:
        >>> from torch import nn
        >>> module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> list(hooked_layers(module).values())
        [{'weight': '0.weight', 'bias': '0.bias'}]
    """
    names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    layers = {}
    for layer in module.modules():
        own = {local: names[p] for local, p in layer.named_parameters(recurse=False) if p in names}
        if own and (rule_for(layer) is not None or forward_for(layer) is not None):
            layers[layer] = own
    return layers


def hooked_gradients(
    module: nn.Module,
    forward: Callable[[], Tensor],
    batch_size: int,
    names: Collection[str],
    sink: GradientSink,
    skipped: set[str] | None = None,
) -> Tensor:
    """Stream the per-sample gradients of parameters in one pass; :class:`HookedGradients` does it batch after batch.

    Args:
        module: the module, in eval mode.
        forward: runs it on a batch and returns the model output of each sample, ``(b,)``.
        batch_size: ``b``.
        names: parameters wanted.
        sink: called with ``(name, gradient)``, more than once for a parameter that is used more than once: the gradient
            of a sample is the sum. One that has no part in the output never comes.
        skipped: gathers the parameters of which some use shows no row a sample; without it, these are an error.

    Returns:
        The model output, detached, ``(b,)``.

    Raises:
        UnsupportedLayerError: if a layer mixes samples, or a parameter is used in a way that shows no row a sample.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> hooked_gradients(layer, lambda: layer(x).squeeze(1), 2, ["weight"], lambda name, g: print(g.materialise()))
        ... # doctest: +ELLIPSIS
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 4.]]])
        tensor([...])
    """

    def each(gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            sink(name, gradient)

    return HookedGradients(module, names)(forward, batch_size, each, skipped)


class HookedGradients:
    """Streams the per-sample gradients of parameters, batch after batch; the module is looked through once.

    Args:
        module: the module, in eval mode. Layers and parameters are not replaced afterwards.
        names: parameters wanted. Those that no layer with a rule owns are followed through the functions that use them.
        direct: those among the others that are also used outside their layers, and so are followed as well; None
            follows all, which is slower.

    Attributes:
        used: names whose direct uses the last call has seen.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> gradients = HookedGradients(layer, ["bias"], direct=())
        >>> output = gradients(lambda: layer(x).squeeze(1), 2, lambda gradients: print(*gradients))
        bias
    """

    def __init__(self, module: nn.Module, names: Collection[str], direct: Collection[str] | None = None) -> None:
        self.module = module
        self.used: set[str] = set()
        self._direct = direct
        wanted = set(names)
        owned = hooked_layers(module)
        self._layers = {
            layer: kept
            for layer, own in owned.items()
            if (kept := {local: name for local, name in own.items() if name in wanted})
        }
        self._rules = {layer: rule for layer in self._layers if (rule := rule_for(layer)) is not None}
        self._forwards = {
            layer: forward
            for layer in module.modules()
            if (forward := forward_for(layer)) is not None and any(inner in self._layers for inner in layer.modules())
        }
        self._checked = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, CHECKED_LAYERS)]
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        ruled = {name for own in owned.values() for name in own.values()}
        self._followed = {
            name: p
            for name, p in trainable.items()
            if name in wanted and (direct is None or name in direct or name not in ruled)
        }
        self._frozen = [p for name, p in trainable.items() if name not in self._followed]
        # A layer whose parameters are followed nowhere looks the same to a mode with its rule and without.
        self._bracketed = {
            layer
            for layer, own in self._layers.items()
            if direct is None or not self._followed.keys().isdisjoint(own.values())
        }
        self._parameters = list(module.parameters())
        self._buffered = [layer for layer in module.modules() if any(True for _ in layer.buffers(recurse=False))]

    def __call__(
        self, forward: Callable[[], Tensor], batch_size: int, sink: LayerSink, skipped: set[str] | None = None
    ) -> Tensor:
        """Stream the gradients of one batch; arguments, result and errors are those of :func:`hooked_gradients`."""
        return self.several(lambda: (forward(),), batch_size, (sink,), skipped)[0]

    @property
    def shares(self) -> bool:
        """Whether several outputs can share a forward pass: no parameter is followed through functions."""
        return not self._followed

    def several(
        self,
        forward: Callable[[], Sequence[Tensor]],
        batch_size: int,
        sinks: Sequence[LayerSink],
        skipped: set[str] | None = None,
    ) -> list[Tensor]:
        """Stream the gradients of each output of one forward pass into its sink: of one, or where it :attr:`shares`."""
        for name, layer in self._checked:
            check_layer(name, layer)
        capture = _Capture(batch_size, sinks[0])
        uses = None
        if self._followed:
            buffers = (buffer for layer in self._buffered for buffer in layer.buffers(recurse=False))
            uses = DirectUses(
                (*self._parameters, *buffers),
                self._followed,
                batch_size,
                capture.attach,
                capture.leaves,
                sinks[0],
                self._direct,
                checking=skipped is not None,
            )
            capture.uses = uses
        # The mode is around the backward pass, too: checkpoints run parts of the forward pass again in it.
        mode = nullcontext() if uses is None else uses
        with torch.enable_grad(), frozen(self._frozen), plain_execution(), self._hooks(capture, uses), mode:
            outputs = forward()
            for number, (output, sink) in enumerate(zip(outputs, sinks, strict=True), 1):
                capture.sink, capture.again = sink, number < len(sinks)
                if output.requires_grad and (capture.leaves or uses is not None):
                    self._backward(output, capture, uses)
            if uses is not None and outputs[0].requires_grad:
                uses.finish()
        if uses is not None:
            self.used = uses.used
            capture.skipped |= uses.skipped
        if skipped is None and capture.skipped:
            raise UnsupportedLayerError(
                f"The layer of {', '.join(f'`{name}`' for name in sorted(capture.skipped))} was called with other rows "
                f"than the {batch_size} samples of the batch, one each, or the parameter was used in a function that "
                "does not show them, although it was not when the module was checked. Where samples are routed through "
                "the module depending on their values, per-sample gradients by hooks do not exist: freeze these "
                "parameters."
            )
        if skipped is not None:
            skipped |= capture.skipped
        return [output.detach() for output in outputs]

    def _backward(self, output: Tensor, capture: _Capture, uses: DirectUses | None) -> None:
        if uses is None:
            torch.autograd.grad(output.sum(), capture.leaves, allow_unused=True, retain_graph=capture.again)
            return
        leaves = len(capture.leaves)  # checkpoints run again find more
        inputs = (*capture.leaves, *self._followed.values())
        # `torch.autograd.grad` takes the mode away, and what checkpoints run again needs it.
        total = output.sum()
        run_backward = torch.autograd.Variable._execution_engine.run_backward
        rows = run_backward((total,), (torch.ones_like(total),), False, False, inputs, True, accumulate_grad=False)
        # A parameter that the backward pass reaches itself was used where nobody saw it.
        reached = zip(self._followed, rows[leaves:], strict=True)
        capture.skipped.update(name for name, row in reached if row is not None)

    @contextmanager
    def _hooks(self, capture: _Capture, uses: DirectUses | None) -> Iterator[None]:
        """Watch the layers with a rule; let those with an explicit forward run it."""
        handles, changed = [], []
        try:
            for layer, own in self._layers.items():
                bracketed = uses is not None and layer in self._bracketed
                if uses is not None and bracketed:
                    handles += _bracket(uses, layer, own, layer in self._rules)
                rule = self._rules.get(layer)
                if rule is not None:
                    hook = capture.watch(rule, layer, own, bracketed)
                    handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            for layer, forward in self._forwards.items():
                if "forward" not in vars(layer):  # else somebody else has put his own in its place
                    attach = partial(capture.attach, layer, self._layers.get(layer, {}))
                    vars(layer)["forward"] = partial(forward, layer, attach)
                    changed.append(layer)
            yield
        finally:
            for layer in changed:
                del vars(layer)["forward"]
            for handle in handles:
                handle.remove()


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Freeze parameters; put their ``requires_grad`` flags back in the end."""
    trainable = [p for p in parameters if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def _bracket(uses: DirectUses, layer: nn.Module, own: dict[str, str], has_rule: bool) -> list[RemovableHandle]:
    """Say when a layer begins and ends, in which its rule and not the mode covers its own parameters."""
    parameters = {name: layer.get_parameter(local) for local, name in own.items()}

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        uses.enter(_first(args, kwargs) if has_rule else None, parameters)

    def after_forward(*_: Any) -> None:
        uses.leave()

    # A checkpoint that has seen enough leaves in the middle of a layer, by an exception.
    return [
        layer.register_forward_pre_hook(before_forward, with_kwargs=True),
        layer.register_forward_hook(after_forward, always_call=True),
    ]


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _unviewed(output: Tensor) -> Tensor:
    """Give the tensor that an output is a reshaping of: a view that is written to afterwards loses its hooks."""
    base = output._base
    if base is None or base.numel() != output.numel() or base.is_leaf or not base.requires_grad:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


class _Capture:
    """Keeps each watched layer's input until the gradient at its output arrives."""

    def __init__(self, batch_size: int, sink: LayerSink) -> None:
        self.batch_size = batch_size
        self.sink = sink
        self.leaves: list[Tensor] = []
        self.skipped: set[str] = set()
        self.uses: DirectUses | None = None
        self.again = False  # whether another backward pass needs the inputs

    def watch(
        self, rule: GradientRule, layer: nn.Module, names: dict[str, str], bracketed: bool
    ) -> Callable[..., Tensor]:
        """Make the forward hook of a layer; one that is bracketed may have been run on what all samples share."""

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if bracketed and self.uses is not None and self.uses.left_shared:
                return output
            return self.attach(layer, names, rule, _first(args, kwargs), output)

        return after_forward

    def attach(
        self, layer: nn.Module, names: dict[str, str], rule: GradientRule, activations: Tensor, output: Tensor
    ) -> Tensor:
        """Follow one use of a layer's parameters; the rest of the forward pass goes on from the output returned."""
        if not torch.is_grad_enabled():
            return output  # the module itself wants no gradient here
        if self.uses is not None and self.uses.is_derived(output):
            self.skipped.update(names.values())  # no sample has a part in it yet
            return output
        with torch._C.DisableTorchFunction():
            return self._attach(layer, names, rule, activations, output)

    def _attach(
        self, layer: nn.Module, names: dict[str, str], rule: GradientRule, activations: Tensor, output: Tensor
    ) -> Tensor:
        activations = activations.detach()
        if activations.shape[0] == 1 < self.batch_size:
            # An input shared by the batch, such as position ids of shape (1, s): give each sample its own copy, so
            # that its gradient arrives apart.
            activations = activations.expand(self.batch_size, *activations.shape[1:])
            output = output.expand(self.batch_size, *output.shape[1:])
        if not output.requires_grad or output.is_leaf or not self.leaves:
            # Nothing before this layer needs a gradient, or only a tensor that is not ours: the backward pass ends
            # here. The clone keeps an in-place activation that follows from touching the leaf.
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()
        held = [activations]  # given away when they are needed: the graph keeps its hooks to the end
        shape, watched = output.shape, _unviewed(output)

        def arrived(g: Tensor) -> None:
            self._emit(rule, layer, names, held[0] if self.again else held.pop(), g.reshape(shape))

        watched.register_hook(arrived)
        return output

    def _emit(
        self, rule: GradientRule, layer: nn.Module, names: dict[str, str], activations: Tensor, backprops: Tensor
    ) -> None:
        if activations.shape[0] != self.batch_size or backprops.shape[0] != self.batch_size:
            self.skipped.update(names.values())
            return
        # Half-precision factors would lose the small products; autocast must not put them back. A backward pass without
        # a graph of its own has gradients disabled.
        with torch._C.DisableTorchFunction(), _without_autocast(backprops.device.type):
            dtype = torch.promote_types(backprops.dtype, torch.float32)
            if activations.dtype.is_floating_point:
                activations = activations.to(dtype)
            gradients = rule(layer, activations, backprops.to(dtype))
            # A layer may own parameters that its rule does not know.
            self.sink({name: gradients[local] for local, name in names.items() if local in gradients})
