"""A chunk of a journal: steps and batches of one process as columns of a tensor file, and back, checked.

Batches are numbered through the whole journal of a process; a step names the first and the last of its own. States of
random streams are kept once each, and batches name them by their place; -1 is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_attr.journal.steps import GroupStep

STREAMS = {"torch": 5056, "numpy": 2520, "python": 2520, "cuda": 16}
"""Bytes of a state of each."""
_MOMENTS = ("before", "reading")
_COLUMNS = {
    "step": torch.int64,
    "step_epoch": torch.int64,
    "step_optimizer": torch.int64,
    "step_groups": torch.int64,
    "step_first": torch.int64,
    "step_last": torch.int64,
    "clip_factor": torch.float64,
    "loss_scale": torch.float64,
    "lr": torch.float64,
    "weight_decay": torch.float64,
    "batch_epoch": torch.int64,
    "batch_idx": torch.int64,
    "batch_size": torch.int64,
}


@dataclass(frozen=True)
class BatchEntry:
    """A batch of one process.

    Args:
        rows: ``(batch,)``, int64; empty where they are not known.
        epoch: index of the epoch.
        batch_idx: as ``training_step`` got it.
        before: stream -> its state before the step.
        reading: stream -> its state before the samples were read.
    """

    rows: Tensor
    epoch: int
    batch_idx: int
    before: Mapping[str, bytes] = field(default_factory=dict)
    reading: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class StepEntry:
    """An optimizer step of one process; see :class:`lightning_attr.journal.steps.JournalStep`.

    Args:
        global_step: steps taken before.
        epoch: index of the epoch.
        optimizer: index.
        first: number of its first batch.
        last: number of its last batch; the one before ``first`` where it has none.
        groups: learning rate and weight decay of each parameter group.
        clip_factor: NaN where it is not known.
        loss_scale: of the scaler.
    """

    global_step: int
    epoch: int
    optimizer: int
    first: int
    last: int
    groups: tuple[GroupStep, ...]
    clip_factor: float = 1.0
    loss_scale: float = 1.0


def to_tensors(steps: Sequence[StepEntry], batches: Sequence[BatchEntry]) -> dict[str, Tensor]:
    """Write entries as columns."""
    groups = [group for step in steps for group in step.groups]
    columns = {
        "step": [step.global_step for step in steps],
        "step_epoch": [step.epoch for step in steps],
        "step_optimizer": [step.optimizer for step in steps],
        "step_groups": [len(step.groups) for step in steps],
        "step_first": [step.first for step in steps],
        "step_last": [step.last for step in steps],
        "clip_factor": [step.clip_factor for step in steps],
        "loss_scale": [step.loss_scale for step in steps],
        "lr": [group.lr for group in groups],
        "weight_decay": [group.weight_decay for group in groups],
        "batch_epoch": [batch.epoch for batch in batches],
        "batch_idx": [batch.batch_idx for batch in batches],
        "batch_size": [len(batch.rows) for batch in batches],
    }
    tensors = {name: torch.tensor(values, dtype=_COLUMNS[name]) for name, values in columns.items()}
    rows = torch.cat([batch.rows for batch in batches]) if batches else torch.zeros(0, dtype=torch.int64)
    small = not len(rows) or int(rows.max()) < 2**31
    tensors["rows"] = rows.to(torch.int32) if small else rows
    return {**tensors, **_states(batches)}


def _states(batches: Sequence[BatchEntry]) -> dict[str, Tensor]:
    """Each state once, and for every batch which it is."""
    tensors = {}
    for stream in STREAMS:
        known: dict[bytes, int] = {}
        for moment in _MOMENTS:
            found = [getattr(batch, moment).get(stream) for batch in batches]
            places = [-1 if state is None else known.setdefault(state, len(known)) for state in found]
            if any(place >= 0 for place in places):
                tensors[f"{moment}_{stream}"] = torch.tensor(places, dtype=torch.int32)
        if known:
            table = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8)
            tensors[f"state_{stream}"] = table.view(len(known), -1)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], first_batch: int) -> tuple[list[StepEntry], list[BatchEntry]]:
    """Read columns that may hold anything.

    Raises ValueError with what is wrong.
    """
    _check(tensors, first_batch)
    plain = {name: tensors[name].tolist() for name in _COLUMNS}
    counts = plain["step_groups"]
    groups = [GroupStep(lr, decay) for lr, decay in zip(plain["lr"], plain["weight_decay"], strict=True)]
    steps, place = [], 0
    names = ("step", "step_epoch", "step_optimizer", "step_first", "step_last")
    for number, values in enumerate(zip(*(plain[name] for name in names), strict=True)):
        own, place = tuple(groups[place : place + counts[number]]), place + counts[number]
        step, epoch, optimizer, first, last = values
        beside = plain["clip_factor"][number], plain["loss_scale"][number]
        steps.append(StepEntry(step, epoch, optimizer, first, last, own, *beside))
    rows = tensors["rows"].to(torch.int64).split(plain["batch_size"]) if plain["batch_size"] else []
    before, reading = (_places(tensors, moment, len(plain["batch_size"])) for moment in _MOMENTS)
    numbers = zip(rows, plain["batch_epoch"], plain["batch_idx"], before, reading, strict=True)
    return steps, [BatchEntry(*values) for values in numbers]


def _places(tensors: Mapping[str, Tensor], moment: str, count: int) -> list[dict[str, bytes]]:
    found: list[dict[str, bytes]] = [{} for _ in range(count)]
    for stream in STREAMS:
        if f"{moment}_{stream}" in tensors:
            states = [state.numpy().tobytes() for state in tensors[f"state_{stream}"]]
            for batch, place in zip(found, tensors[f"{moment}_{stream}"].tolist(), strict=True):
                if place >= 0:
                    batch[stream] = states[place]
    return found


def _check(tensors: Mapping[str, Tensor], first_batch: int) -> None:
    """See that columns are all there, of their dtype and length, and point to what is there."""
    allowed = {*_COLUMNS, "rows"} | {f"{kind}_{stream}" for kind in ("state", *_MOMENTS) for stream in STREAMS}
    unknown = set(tensors) - allowed
    missing = {*_COLUMNS, "rows"} - set(tensors)
    if unknown or missing:
        what = f"`{min(unknown)[:40]}` is no column of a journal" if unknown else f"`{min(missing)}` is missing"
        raise ValueError(what)
    for name, dtype in {**_COLUMNS, "rows": tensors["rows"].dtype}.items():
        if tensors[name].ndim != 1 or tensors[name].dtype not in ({dtype} & {torch.int32, torch.int64, torch.float64}):
            raise ValueError(f"`{name}` is {tensors[name].dtype} {tuple(tensors[name].shape)}, not a column of {dtype}")
    steps, batches = len(tensors["step"]), len(tensors["batch_idx"])
    _check_lengths(tensors, steps, batches)
    first, last = tensors["step_first"], tensors["step_last"]
    if steps and (
        bool((first < 0).any()) or bool((last < first - 1).any()) or int(last.max()) >= first_batch + batches
    ):
        raise ValueError("a step names batches that are not there")
    if steps and (int(tensors["step"][0]) < 0 or bool((tensors["step"].diff() < 1).any())):
        raise ValueError("its steps do not follow one another")
    if len(tensors["rows"]) and int(tensors["rows"].min()) < 0:
        raise ValueError("a row is negative")
    for stream, size in STREAMS.items():
        _check_states(tensors, stream, size, batches)


def _check_lengths(tensors: Mapping[str, Tensor], steps: int, batches: int) -> None:
    """Steps have one length, batches another, groups and rows what those say."""
    for counts, total in (("step_groups", "lr"), ("batch_size", "rows")):
        found = tensors[counts]
        if len(found) and (int(found.min()) < 0 or int(found.max()) > len(tensors[total])):
            raise ValueError(f"`{counts}` does not fit to `{total}`")
        if int(found.sum()) != len(tensors[total]):
            raise ValueError(f"`{counts}` does not fit to `{total}`")
    lengths = {"lr": len(tensors["lr"]), "weight_decay": len(tensors["lr"])}
    for name in _COLUMNS:
        wanted = lengths.get(name, batches if name.startswith("batch") else steps)
        if len(tensors[name]) != wanted:
            raise ValueError(f"`{name}` has {len(tensors[name])} entries, where {wanted} are expected")


def _check_states(tensors: Mapping[str, Tensor], stream: str, size: int, batches: int) -> None:
    table = tensors.get(f"state_{stream}", torch.zeros(0, size, dtype=torch.uint8))
    if table.ndim != 2 or table.shape[1] != size or table.dtype != torch.uint8:
        raise ValueError(f"`state_{stream}` is {table.dtype} {tuple(table.shape)}, not states of {size} bytes")
    for moment in _MOMENTS:
        places = tensors.get(f"{moment}_{stream}")
        if places is None:
            continue
        fits = places.shape == (batches,) and places.dtype == torch.int32
        if not fits or (batches and not -1 <= int(places.min()) <= int(places.max()) < len(table)):
            raise ValueError(f"`{moment}_{stream}` names states that are not there")
