"""What is in a store, and whether its files are whole; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_attr.errors import AttributionError
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot

_NONE = "not recorded"


def described(store: FeatureStore) -> str:
    """Describe a store.

    Returns its settings, and a line per snapshot.
    """
    written, manifest = store.fingerprint, store.manifest
    entries = sum(math.prod(shape) for shape in written.layout.values())
    projection = (
        "none yet" if written.projector is None else ", ".join(f"{k}={v}" for k, v in written.projector.items())
    )
    facts = {
        "training samples": f"{written.length:,}",
        "model": f"{len(written.layout)} parameters with {entries:,} entries",
        "attributes": written.output or _NONE,
        "mode": written.mode or _NONE,
        "projection": projection or "none yet",
        "features": f"{manifest.feature_dtype}, {manifest.shard_rows} rows per shard",
        "size": _size(sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())),
    }
    facts["journal"] = _journal(store)
    if manifest.stopped is not None:
        facts["recording"] = str(manifest.stopped)
    rows: list[tuple[str, ...]] = [("snapshot", "epoch", "step", "learning rate", "rows with features", "size")]
    rows += [_line(store, snapshot) for snapshot in store.snapshots]
    name = max(map(len, facts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{key.ljust(name)}  {value}" for key, value in facts.items()]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{store.path}: {len(store.snapshots)} snapshots", *lines, "", *table])


def damages(store: FeatureStore) -> list[str]:
    """Read every file of a store that its manifest names, and compare it with its digest and its place.

    Returns what is wrong, a message per file; empty if nothing is.
    """
    reads: list[Callable[[], object]] = []
    for snapshot in store.snapshots:
        reads += [partial(store.weights, snapshot.key), partial(store.basis, snapshot.key)]
        if snapshot.optimizer is not None:
            reads.append(partial(store.optimizer_state, snapshot.key))
        reads += [partial(store.shard, snapshot.key, shard) for shard in snapshot.shards]
    reads.append(partial(_read_journal, store))
    return [message for message in map(_damage, reads) if message is not None]


def _journal(store: FeatureStore) -> str:
    """Say what the journal of the run holds."""
    try:
        journal = store.journal()
        if journal is None:
            return "none"
        if journal.unknown is not None:
            return f"the order of the samples is not known: {journal.unknown}"
        steps, gap = sum(1 for _ in journal.steps()), journal.gap()
        return f"{steps:,} steps{'' if gap is None else f', of which {gap}'}"
    except AttributionError:
        return "damaged: `lightning-attr verify` says how"


def _read_journal(store: FeatureStore) -> None:
    """Read every file of the journal."""
    journal = store.journal()
    if journal is not None:
        journal.exposure(store.fingerprint.length)


def _damage(read: Callable[[], object]) -> str | None:
    """What the reader says is wrong."""
    try:
        read()
    except AttributionError as error:
        return str(error)
    return None


def _line(store: FeatureStore, snapshot: Snapshot) -> tuple[str, ...]:
    rows = sum(len(store.rows(shard)) for shard in snapshot.shards)
    files = (Path(store.path) / snapshot.folder).rglob("*")
    return (
        snapshot.key,
        str(snapshot.epoch),
        f"{snapshot.global_step:,}",
        f"{snapshot.learning_rate:.4g}",
        f"{rows:,}",
        _size(sum(file.stat().st_size for file in files if file.is_file())),
    )


def _size(count: float) -> str:
    """Bytes in three digits, in powers of 1,000."""
    power = 0 if count < 1 else min(3, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"
