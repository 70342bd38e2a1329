"""What a look at a run before it starts has found: the path of each layer, what it costs, what stands in its way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_attr.features.featurizer import AttributionPlan
from lightning_attr.objectives.apart import OutputApart
from lightning_attr.projectors import Projection

HOOKS, FROZEN, UNUSED = "hooks, in one pass", "frozen: not attributed", "left out by the method"
VMAP, LOOP, ALONE = "vmap(grad), slower", "a loop over samples, slowest", "autograd, one sample after the other"


@dataclass(frozen=True)
class CheckedLayer:
    """Parameters of one layer that take the same path.

    Args:
        name: of the layer in the module; empty for the module itself.
        kind: its class.
        parameters: how many entries they have together.
        share: of the trainable parameters, from 0 to 1; 0 where they are frozen.
        path: how their per-sample gradients are computed.

    Example:
        >>> CheckedLayer("head", "Linear", 30, 0.5, HOOKS).share
        0.5
    """

    name: str
    kind: str
    parameters: int
    share: float
    path: str


@dataclass(frozen=True)
class RunCheck:
    """What :meth:`lightning_attr.callbacks.AttributionCallback.check` has found; ``print`` shows it as a table.

    What was not come to is None, or empty.

    Args:
        model: class of the module.
        method: class of the method.
        refused: the message with which ``fit`` would refuse to record; None if it would not.
        error: the exception behind it.
        notes: what would be said besides: what falls back and why, what was chosen.
        num_samples: training samples.
        mode: that the module is attributed in, "eval" or "train".
        device: that all this was tried on.
        layers: the layers with their paths, in the order of the module.
        featurizes: whether features are computed while training; else ``trainer.attribute`` computes them.
        weight_bytes: of a snapshot's weights, and of the optimizer's moments where they are kept.
        feature_bytes: of a snapshot's features; 0 for a method that has none.
        seconds: that a snapshot takes on one such device, by the batches that were timed; None for a method without
            features.
        snapshots: how many the run has; None where its epochs are not known.
        free_bytes: of the disk of the store.
        store: its directory, where it is known.

    Example:
        >>> layer = CheckedLayer("head", "Linear", 30, 1.0, HOOKS)
        >>> check = RunCheck("Net", "GradDot", layers=(layer,), num_samples=8, mode="eval", device="cpu",
        ...                  featurizes=True, weight_bytes=120, feature_bytes=960, seconds=0.01, snapshots=3)
        >>> check.ok, check.total_bytes
        (True, 3240)
        >>> print(check)
        Attribution of Net by GradDot: 8 training samples, eval mode, cpu
          path                layers    parameters   share
          hooks, in one pass  1 Linear          30  100.0%
        each snapshot: weights 120 B, features 960 B, 0.010 s; features are computed while training
        the run: 3 snapshots, 3.24 kB, 0.030 s
        nothing stands in its way
    """

    model: str
    method: str
    refused: str | None = None
    error: Exception | None = None
    notes: tuple[str, ...] = ()
    num_samples: int | None = None
    mode: str | None = None
    device: str | None = None
    layers: tuple[CheckedLayer, ...] = ()
    featurizes: bool | None = None
    weight_bytes: int | None = None
    feature_bytes: int | None = None
    seconds: float | None = None
    snapshots: int | None = None
    free_bytes: int | None = None
    store: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether ``fit`` would record."""
        return self.refused is None

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot, with the features that ``trainer.attribute`` adds."""
        return (self.weight_bytes or 0) + (self.feature_bytes or 0)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the store of the whole run; None where its epochs are not known."""
        return None if self.snapshots is None else self.snapshots * self.snapshot_bytes

    def __str__(self) -> str:
        known = [f"{self.num_samples:,} training samples"] if self.num_samples is not None else []
        known += [f"{self.mode} mode"] if self.mode is not None else []
        known += [self.device] if self.device is not None else []
        title = f"Attribution of {self.model} by {self.method}" + (f": {', '.join(known)}" if known else "")
        lines = [title, *_table(self.layers), *self._costs()]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("nothing stands in its way" if self.ok else f"would be refused: {self.refused}")
        return "\n".join(lines)

    def _costs(self) -> list[str]:
        if self.weight_bytes is None:
            return []
        parts, when = [f"weights {_size(self.weight_bytes)}"], "the method runs the module in `trainer.attribute`"
        if self.seconds is not None and self.feature_bytes is not None:
            parts += [f"features {_size(self.feature_bytes)}", _time(self.seconds)]
            when = f"features are computed {'while training' if self.featurizes else 'by `trainer.attribute`'}"
        lines = [f"each snapshot: {', '.join(parts)}; {when}"]
        free = "" if self.free_bytes is None else f" ({_size(self.free_bytes)} free in {self.store})"
        if self.snapshots is not None and self.total_bytes is not None:
            time = "" if self.seconds is None else f", {_time(self.snapshots * self.seconds)}"
            lines.append(f"the run: {self.snapshots} snapshots, {_size(self.total_bytes)}{time}{free}")
        elif free:
            lines.append(f"the run: as many snapshots as its epochs bring{free}")
        return lines


def checked_layers(module: nn.Module, plan: AttributionPlan, projection: Projection) -> tuple[CheckedLayer, ...]:
    """List the layers of a module with the paths of their gradients; one with two paths is listed twice."""
    total = sum(p.numel() for p in module.parameters() if p.requires_grad)
    found: dict[tuple[str, str], int] = {}
    for name, p in module.named_parameters():
        owner = name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        key = owner, _path(name, plan, projection) if p.requires_grad else FROZEN
        found[key] = found.get(key, 0) + p.numel()
    return tuple(
        CheckedLayer(owner, _kind(module, owner), count, 0.0 if path == FROZEN else count / total, path)
        for (owner, path), count in found.items()
    )


def _path(name: str, plan: AttributionPlan, projection: Projection) -> str:
    if projection.names is not None and name not in projection.names:
        return UNUSED
    if isinstance(plan.objective, OutputApart):
        return ALONE
    if name in plan.hooked:
        return HOOKS
    return VMAP if plan.vectorised else LOOP


def _kind(module: nn.Module, name: str) -> str:
    layer: Any = module.get_submodule(name)
    kind = type(layer)
    # A parametrized layer has a class of its own, made for it.
    return kind.__mro__[1].__name__ if hasattr(layer, "parametrizations") else kind.__name__


def _table(layers: Sequence[CheckedLayer]) -> list[str]:
    """A line for each path and class of layers; those off the main path are named."""
    groups: dict[tuple[str, str], list[CheckedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.path, layer.kind), []).append(layer)
    rows = [("path", "layers", "parameters", "share")]
    for (path, kind), own in sorted(groups.items(), key=lambda group: -sum(layer.parameters for layer in group[1])):
        count, share = sum(layer.parameters for layer in own), sum(layer.share for layer in own)
        rows.append((path, _named(kind, own), f"{count:,}", "" if path == FROZEN else f"{share:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formatted = (
        f"  {path.ljust(widths[0])}  {kind.ljust(widths[1])}  {count.rjust(widths[2])}  {share.rjust(widths[3])}"
        for path, kind, count, share in rows
    )
    return [line.rstrip() for line in formatted] if layers else []


def _named(kind: str, layers: Sequence[CheckedLayer]) -> str:
    names = [layer.name for layer in layers if layer.path not in {HOOKS, FROZEN} and layer.name]
    return f"{len(layers)} {kind}" + (f" ({_some(names)})" if names else "")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.{3 if seconds < 0.1 else 2}f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
