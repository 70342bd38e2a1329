"""Per-sample gradients of a whole batch from one forward and one backward pass, layer by layer, by hooks.

All parameters are frozen while the hooks run, so that no weight gradient of the batch is ever formed: the backward pass
carries only the gradients of activations. Each layer's per-sample gradients leave through a sink as soon as its output
gradient is known, so that those of the whole model never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients.execution import plain_execution
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.gradients.rules import GradientRule, check_layers, forward_for, rule_for

__all__ = ["GradientSink", "frozen", "hooked_gradients", "hooked_layers"]

GradientSink: TypeAlias = Callable[[str, ParameterGradient], None]


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
    """Stream the per-sample gradients of the parameters that rules cover.

    Args:
        module: the module, in eval mode.
        forward: runs it on a batch and returns the model output of each sample, ``(b,)``.
        batch_size: ``b``.
        names: parameters wanted, among those that :func:`hooked_layers` lists.
        sink: called with ``(name, gradient)``, more than once for a parameter that is used more than once: the gradient
            of a sample is the sum.
        skipped: gathers the parameters of layers that do not see one row a sample; without it, these are an error.

    Returns:
        The model output, detached, ``(b,)``.

    Raises:
        UnsupportedLayerError: if a layer mixes samples, or does not see one row a sample.

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
    layers = {
        layer: {local: name for local, name in own.items() if name in names}
        for layer, own in hooked_layers(module).items()
    }
    check_layers(module)
    capture = _Capture(batch_size, sink)
    handles = [
        layer.register_forward_hook(capture.watch(rule, layer, own), with_kwargs=True)
        for layer, own in layers.items()
        if own and (rule := rule_for(layer)) is not None
    ]
    try:
        with torch.enable_grad(), frozen(module), plain_execution(), _explicit_forwards(module, layers, capture):
            output = forward()
            if capture.leaves and output.requires_grad:
                torch.autograd.grad(output.sum(), capture.leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if skipped is None and capture.skipped:
        raise UnsupportedLayerError(
            f"The layer of {', '.join(f'`{name}`' for name in sorted(capture.skipped))} was called with other rows "
            f"than the {batch_size} samples of the batch, one each, although it was not when the module was checked. "
            "Where samples are routed through the module depending on their values, per-sample gradients by hooks do "
            "not exist: freeze these parameters."
        )
    if skipped is not None:
        skipped |= capture.skipped
    return output.detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze all parameters; put their ``requires_grad`` flags back in the end.

    Args:
        module: any module.

    Yields:
        Nothing.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(1, 1)
        >>> with frozen(layer):
        ...     layer.weight.requires_grad
        False
        >>> layer.weight.requires_grad
        True
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def _explicit_forwards(module: nn.Module, layers: dict[nn.Module, dict[str, str]], capture: _Capture) -> Iterator[None]:
    """Let layers with an explicit forward run it, where they or layers inside them have parameters wanted."""
    changed = []
    try:
        for layer in module.modules():
            forward = forward_for(layer)
            if forward is None or "forward" in vars(layer):
                continue  # the second: somebody else has put his own in its place
            if any(layers.get(inner) for inner in layer.modules()):
                attach = partial(capture.attach, layer, layers.get(layer, {}))
                vars(layer)["forward"] = partial(forward, layer, attach)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del vars(layer)["forward"]


class _Capture:
    """Keeps each watched layer's input until the gradient at its output arrives."""

    def __init__(self, batch_size: int, sink: GradientSink) -> None:
        self.batch_size = batch_size
        self.sink = sink
        self.leaves: list[Tensor] = []
        self.skipped: set[str] = set()

    def watch(self, rule: GradientRule, layer: nn.Module, names: dict[str, str]) -> Callable[..., Tensor]:
        """Make the forward hook of a layer."""

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return self.attach(layer, names, rule, args[0] if args else next(iter(kwargs.values())), output)

        return after_forward

    def attach(
        self, layer: nn.Module, names: dict[str, str], rule: GradientRule, activations: Tensor, output: Tensor
    ) -> Tensor:
        """Follow one use of a layer's parameters; the rest of the forward pass goes on from the output returned."""
        if not torch.is_grad_enabled():
            return output  # the module itself wants no gradient here
        activations = activations.detach()
        if activations.shape[0] == 1 < self.batch_size:
            # An input shared by the batch, such as position ids of shape (1, s): give each sample its own copy, so
            # that its gradient arrives apart.
            activations = activations.expand(self.batch_size, *activations.shape[1:])
            output = output.expand(self.batch_size, *output.shape[1:])
        if not output.requires_grad:
            # Nothing before this layer needs a gradient: the backward pass ends here. The clone keeps an in-place
            # activation that follows from touching the leaf.
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()
        output.register_hook(lambda backprops: self._emit(rule, layer, names, activations, backprops))
        return output

    def _emit(
        self, rule: GradientRule, layer: nn.Module, names: dict[str, str], activations: Tensor, backprops: Tensor
    ) -> None:
        if activations.shape[0] != self.batch_size or backprops.shape[0] != self.batch_size:
            self.skipped.update(names.values())
            return
        # Half-precision factors would lose the small products; autocast must not put them back.
        with torch.no_grad(), torch.autocast(backprops.device.type, enabled=False):
            dtype = torch.promote_types(backprops.dtype, torch.float32)
            if activations.dtype.is_floating_point:
                activations = activations.to(dtype)
            gradients = rule(layer, activations, backprops.to(dtype))
            for local, name in names.items():
                if local in gradients:  # a layer may own parameters that its rule does not know
                    self.sink(name, gradients[local])
