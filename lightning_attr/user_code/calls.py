"""Calls of the user's code beside training: each with its own batch, in its own world, and all state put back after it.

What a function changes is found out in its first call, operation by operation; later calls cost a comparison of version
counters, and copies of what is known to change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.batch_copies import OwnBatch
from lightning_attr.user_code.generators import remembered_rng
from lightning_attr.user_code.kept_state import KeptState
from lightning_attr.user_code.metric_calls import answered_metrics
from lightning_attr.user_code.reachable import Reachable
from lightning_attr.user_code.streams import Streams

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Surroundings: TypeAlias = Callable[[str], AbstractContextManager[object]]
"""Name of a function -> the world that its calls are to see."""


@dataclass
class _Known:
    """What is known of the functions of a module.

    Args:
        called: names of those that have been called.
        changing: names of the tensors and arrays that they change.
        written: names of the functions that write to their batch.
        told: names of changes that the user has been told of.
        failed_metrics: name -> what a metric raised, after a first call in which none did.
        created: names of the iterators that the last first call has made, to be read by later ones.
    """

    called: set[str] = field(default_factory=set)
    changing: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    failed_metrics: dict[str, str] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)


class _Observed:
    """A module whose calls are looked after for some time, so that its state is looked through once.

    Args:
        roots: name -> object that its code reaches.
        changing: as :class:`_Known` has them.
        values: as :class:`lightning_attr.user_code.kept_state.KeptState` takes them.
    """

    def __init__(
        self, roots: Mapping[str, object], changing: set[str], values: Callable[[], Mapping[str, Tensor]] | None
    ) -> None:
        self.roots = roots
        self.changing = changing
        self.values = values
        self.state: KeptState | None = None

    def current(self) -> KeptState:
        """Look the state through, unless that has been done."""
        if self.state is None:
            self.state = KeptState(self.roots, self.changing, self.values)
        return self.state


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_observed: WeakKeyDictionary[nn.Module, _Observed] = WeakKeyDictionary()
_surroundings: WeakKeyDictionary[nn.Module, Surroundings] = WeakKeyDictionary()


@contextmanager
def observed(
    module: nn.Module,
    beside: Mapping[str, object] | None = None,
    values: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Look after the calls of a module's functions, and put back in the end what is left of their changes."""
    known = _known.setdefault(module, _Known())
    roots = {"": module, **(beside or {})}
    before = _observed.get(module)
    with KeptState(roots, set()).kept(by_value=True):
        _observed[module] = _Observed(roots, known.changing, values)
        try:
            yield
        finally:
            if before is None:
                del _observed[module]
            else:
                _observed[module] = before


def set_surroundings(module: nn.Module, surroundings: Surroundings | None) -> None:
    """Say what world the calls of a module's functions are to see from now on."""
    if surroundings is None:
        _surroundings.pop(module, None)
    else:
        _surroundings[module] = surroundings


def surroundings_of(module: nn.Module) -> Surroundings | None:
    """Give what :func:`set_surroundings` has set.

    Returns the surroundings; None if there are none.
    """
    return _surroundings.get(module)


def called(module: nn.Module, function: str, run: Callable[[Any], Result], batch: Any = None) -> Result:
    """Call the user's code, so that no trace of it is left and the graph of what it returns stays good.

    A call that is found to change tensors is made again: its graph holds tensors that have been put back since, of
    which calls keep the values once it is known that they change.
    """
    known = _known.setdefault(module, _Known())
    count = len(known.changing)
    restore_rng = None if function in known.called else remembered_rng()
    with user_call(module, function, batch) as own:
        result = run(own)
    if known.created:
        known.created.clear()
        _try_again_with_streams(module, function, run, batch)
    if len(known.changing) == count or not torch.is_grad_enabled():
        return result
    if restore_rng is not None:
        restore_rng()
    with user_call(module, function, batch) as own:
        return run(own)


def _try_again_with_streams(module: nn.Module, function: str, run: Callable[[Any], Result], batch: Any) -> None:
    """Call a function as training does from its second step on, when an iterator is there that the first has made."""
    restore_rng = remembered_rng()
    with user_call(module, function, batch) as own:
        run(own)
        reached = Reachable({"": module})
        with Streams(reached.streams, reached.containers).lent():
            run(OwnBatch(batch, copied=True).batch)
    restore_rng()


@contextmanager
def user_call(module: nn.Module, function: str, batch: Any = None) -> Iterator[Any]:
    """Surround one call of the user's code, so that no trace of it is left.

    Yields the batch to call it with.
    """
    known = _known.setdefault(module, _Known())
    observed = _observed.get(module)
    state = observed.current() if observed is not None else KeptState({"": module}, known.changing)
    first = function not in known.called and torch._C._functorch.peek_interpreter_stack() is None
    before = set(known.changing)
    own = OwnBatch(batch, copied=first or function in known.written)
    metrics = [] if first else [(name, inner) for name, inner in state.reachable.modules if isinstance(inner, Metric)]
    failed: dict[str, str] = {}
    kept, silenced = state.kept(recording=first), _silenced(state)
    try:
        with kept as changed, _world(module, function), silenced, answered_metrics(metrics, failed):
            yield own.batch
    except RuntimeError as error:
        if known.changing and "saved tensor hooks" in str(error):
            raise AttributionError(
                f"`{function}` of {type(module).__name__} changes `{min(known.changing)}` and differentiates with "
                "torch.func, which does not go together with keeping the values from before the change. Make the "
                "change in `on_train_batch_end`, or differentiate with torch.autograd.grad."
            ) from error
        raise
    if own.written() and function not in known.written:
        known.written.add(function)
        if not first:
            raise AttributionError(
                f"`{function}` of {type(module).__name__} writes to its batch, as it did not when it was first called: "
                "the batch cannot be used again. Let it work on a copy (`x = x.clone()`)."
            )
    if first:
        known.called.add(function)
        known.created[:] = state.created
    if failed:
        _tell_of_metrics(module, function, failed, known)
    if changed:
        _tell(module, function, state, changed, known, before)


@contextmanager
def lasting_call(module: nn.Module, function: str) -> Iterator[None]:
    """Surround a call of the user's code whose changes are wanted until :func:`observed` ends."""
    observed = _observed.get(module)
    silenced = nullcontext() if observed is None else _silenced(observed.current())
    try:
        with _world(module, function), silenced:
            yield
    finally:
        if observed is not None:
            observed.state = None  # to be looked through again


def _world(module: nn.Module, function: str) -> AbstractContextManager[object]:
    surroundings = _surroundings.get(module)
    return nullcontext() if surroundings is None else surroundings(function)


@contextmanager
def _silenced(state: KeptState) -> Iterator[None]:
    """Let what modules report through Lightning lead nowhere."""
    own = [vars(inner) for _, inner in state.reachable.modules if hasattr(inner, "log_dict")]
    before = [{name: own_one[name] for name in _REPORTS if name in own_one} for own_one in own]
    for attributes in own:
        attributes.update(_REPORTS)
    try:
        yield
    finally:
        for attributes, kept in zip(own, before, strict=True):
            for name in _REPORTS:
                attributes.pop(name, None)
            attributes.update(kept)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of what a module reports with."""


_REPORTS = dict.fromkeys(("log", "log_dict", "print"), _nothing)


def failed_metrics(module: nn.Module) -> str:
    """Say which metrics raised in calls beside training, and were answered with NaN.

    Returns what to show: names, and what they raised; empty if there are none.

    Example:
        >>> failed_metrics(nn.Linear(1, 1))
        ''
    """
    known = _known.get(module)
    return "" if known is None else ", ".join(f"`{name}` ({error})" for name, error in known.failed_metrics.items())


def changed_state(module: nn.Module) -> list[str]:
    """Name all that functions of a module change, of its tensors first.

    Example:
        >>> changed_state(nn.Linear(1, 1))
        []
    """
    known = _known.get(module)
    return [] if known is None else [*sorted(known.changing), *sorted(known.told - known.changing)]


def known_changes(module: nn.Module) -> list[str]:
    """Name what functions of a module change, as far as it is none of its parameters and buffers.

    Returns the names, in order.

    Example:
        >>> known_changes(nn.Linear(1, 1))
        []
    """
    known = _known.get(module)
    return [] if known is None else sorted(known.told - set(module.state_dict()))


def _tell_of_metrics(module: nn.Module, function: str, failed: dict[str, str], known: _Known) -> None:
    """Say once which metrics do not run on the samples that attribution tries."""
    news = failed.keys() - known.failed_metrics.keys()
    known.failed_metrics.update(failed)
    for name in sorted(news):
        log.info(
            "The metric `%s` in `%s` of %s does not run on the samples that attribution tries (%s): it is NaN there.",
            name,
            function,
            type(module).__name__,
            failed[name],
        )


def _tell(
    module: nn.Module, function: str, state: KeptState, changed: list[str], known: _Known, before: set[str]
) -> None:
    """Say once what a function changes; that metrics count is what they are for."""
    counting = tuple(f"{name}." for name, inner in state.reachable.modules if isinstance(inner, Metric))
    news = [name for name in dict.fromkeys(changed) if name not in known.told and not name.startswith(counting)]
    known.told.update(news)
    news.sort(key=lambda name: name not in known.changing)  # tensors first
    if not news:
        return
    tensors = known.changing - before
    shown = ", ".join(f"`{name}`" for name in news[:4]) + (f" and {len(news) - 4} more" if len(news) > 4 else "")
    log.log(
        logging.WARNING if tensors.intersection(news) else logging.INFO,
        "`%s` of %s changes %s. Attribution puts that back after each of its own calls: training does not notice, and "
        "every sample is seen from the same state.",
        function,
        type(module).__name__,
        shown,
    )
