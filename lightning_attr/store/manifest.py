"""The one JSON file of a store: what was attributed, how, and which rows are there."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.files.fields import (
    checked,
    integer,
    items,
    one_of,
    optional,
    pairs,
    plain,
    read_fields,
    real,
    sha256,
    text,
)
from lightning_attr.files.headers import config_digest
from lightning_attr.files.io import RESTORE
from lightning_attr.files.paths import check_key
from lightning_attr.files.sealed_records import read_record, write_record
from lightning_attr.parameters.layout import layout_difference
from lightning_attr.store.feature_dtype import check_feature_dtype

FORMAT = 2
_MOST_SHARDS = 2**20


@dataclass(frozen=True)
class Fingerprint:
    """What must not change between two uses of a store.

    Args:
        length: rows of the training data set.
        data: hash of a few of its samples, None if they differ each time they are read.
        layout: parameter name -> shape, of all parameters, frozen or not.
        projector: the projector's ``config``, None as long as nothing was featurized.
        output: what of the module is attributed, in words; None if it was not recorded.
        mode: of the module, "eval" or "train"; "auto" if it is to be found on the first samples, None in older stores.

    Example:
        >>> a = Fingerprint(10, None, {"w": (2,)}, None)
        >>> a.check(dataclasses.replace(a, length=11), "attribution")
        Traceback (most recent call last):
        ...
        lightning_attr.errors.StoreMismatchError: attribution was written for a training data set of 10 samples, but ...
    """

    length: int
    data: str | None
    layout: Mapping[str, tuple[int, ...]]
    projector: Mapping[str, Any] | None
    output: str | None = None
    mode: str | None = None

    @cached_property
    def projector_digest(self) -> str | None:
        """A hash of the projector's ``config``, which every file of features names."""
        return None if self.projector is None else config_digest(dict(self.projector))

    def check(self, found: Fingerprint, where: str) -> None:
        """Compare the fingerprint on record with the one at hand."""
        difference = self.difference(found)
        if difference is not None:
            raise StoreMismatchError(
                f"{where} {difference}. Use another directory, or delete this one to start afresh; nothing in it was "
                "changed."
            )

    def difference(self, found: Fingerprint) -> str | None:
        """Say how another fingerprint differs.

        Returns what this one was written for, and what the other has instead; None if they fit together.
        """
        if self.length != found.length:
            return f"was written for a training data set of {self.length:,} samples, but this one has {found.length:,}"
        if self.data is not None and found.data is not None and self.data != found.data:
            return (
                "was written for another training data set: it is as long, but its samples differ (a random split "
                "without a fixed seed does that)"
            )
        if list(self.layout.items()) != list(found.layout.items()):
            return f"was written for another model: {layout_difference(self.layout, found.layout)}"
        if self.projector is not None and found.projector is not None and self.projector != found.projector:
            return (
                f"was featurized with the projection {dict(self.projector)}, but here it is {dict(found.projector)}: "
                "give the method the store's projection, or no projector"
            )
        if self.output is not None and found.output is not None and self.output != found.output:
            return f"attributes {self.output}, but here it would be {found.output}"
        if {self.mode, found.mode} == {"eval", "train"}:
            return f"was written in {self.mode} mode (mode={self.mode!r}), but here it would be mode={found.mode!r}"
        return None


@dataclass(frozen=True)
class Snapshot:
    """The weights of the model at one moment of its training, and the features computed there.

    Args:
        key: its name in the store.
        epoch: epochs completed before this one, so 0 at the end of the first; -1 at the start of training.
        global_step: optimizer steps taken.
        learning_rate: its sum over the optimizer steps since the snapshot before; 0 if there is no record of them.
        folder: where it is, relative to the store.
        weights: digest of the weights.
        projection: key of its random projection; its name, unless it was merged from another store.
        shards: shard number -> digest, for the rows that have features.
        optimizer: digest of the optimizer's state, None if it was not recorded.
        frozen: digest of the weights in a file of their own, because training does not change them; None without.
        origin: id of the store that its files were written in, if they were merged from another.
        trainable: names of the parameters that were not frozen; None for all.
        rates: parameter name -> sum of its own rate; None if all are ``learning_rate``, else the mean over all entries.
        basis: digest of what its projection learned from training samples; None where it learns nothing.
        pilot: number of the pilot that it is the end of; None for a snapshot of the recorded run.
        directions: second directions that its features have of a sample; None for none.
        curvature: what these are of, see :attr:`lightning_attr.outputs.ModelOutput.curvature`; None without.
        losses: of the first samples, as training saw them there; None where features were computed there.

    Example:
        >>> Snapshot("epoch=0", 0, 10, 0.5, "snapshots/epoch=0", "ab", "epoch=0").shards
        {}
    """

    key: str
    epoch: int
    global_step: int
    learning_rate: float
    folder: str
    weights: str
    projection: str
    shards: Mapping[int, str] = field(default_factory=dict)
    optimizer: str | None = None
    frozen: str | None = None
    origin: str | None = field(default=None, compare=False)
    trainable: tuple[str, ...] | None = None
    rates: Mapping[str, float] | None = None
    basis: str | None = None
    pilot: int | None = None
    directions: int | None = None
    curvature: str | None = None
    losses: tuple[float, ...] | None = None


_SNAPSHOT = {
    "key": check_key,
    "epoch": integer(-1),
    "global_step": integer(0),
    "learning_rate": real(0),
    "folder": text(),
    "weights": sha256,
    "projection": text(),
    "shards": pairs(lambda shard: integer(0, _MOST_SHARDS)(int(shard)), sha256),
    "optimizer": optional(sha256),
    "frozen": optional(sha256),
    "origin": optional(text(100)),
    "trainable": optional(items(text())),
    "rates": optional(pairs(text(), real(0))),
    "basis": optional(sha256),
    "pilot": optional(integer(0)),
    "directions": optional(integer(1)),
    "curvature": optional(one_of("rest", "whole")),
    "losses": optional(items(real())),
}
"""What each field of a snapshot must be in a file."""
_FINGERPRINT = {
    "length": integer(1),
    "data": optional(text()),
    "layout": pairs(text(), items(integer(0))),
    "projector": optional(pairs(text(), plain)),
    "output": optional(text()),
    "mode": optional(one_of("eval", "train", "auto")),
}


@dataclass(frozen=True)
class Stopped:
    """Why the recording of a run ended before the run did.

    Args:
        epoch: index of the epoch in which it ended; -1 before the first.
        global_step: optimizer steps taken.
        cause: what went wrong, in words.
        incomplete: key of the snapshot that was being recorded; None if it was not begun.

    Example:
        >>> print(Stopped(3, 40, "No space left on device."))
        recording stopped in epoch 3 (step 40): No space left on device.
    """

    epoch: int
    global_step: int
    cause: str
    incomplete: str | None = None

    def __str__(self) -> str:
        """Say so."""
        return f"recording stopped in epoch {self.epoch} (step {self.global_step}): {self.cause}"


_STOPPED = {
    "epoch": integer(-1),
    "global_step": integer(0),
    "cause": text(1_000_000),
    "incomplete": optional(check_key),
}


@dataclass(frozen=True)
class Manifest:
    """All that a store records.

    Args:
        fingerprint: what must not change.
        shard_rows: rows a shard; shard ``s`` holds the rows from ``s * shard_rows``.
        run: digest of the weights that the run started from, None if it was not recorded.
        snapshots: in the order of training.
        feature_dtype: how features are stored, "float16", "bfloat16" or "float32"; see
        :mod:`lightning_attr.store.feature_dtype`. stopped: why the recording ended before the run did; None if it did
        not. id: of the store, in all of its files; drawn at random when it is made. trained_on: which rows training can
        draw, as :func:`lightning_attr.data.exposure.to_bitmap` writes it; None for all. training: settings of the
        Trainer that a step depends on, name -> value; None where they were not recorded.

    Example:
        >>> Manifest(Fingerprint(10, None, {"w": (2,)}, None), shard_rows=4, run=None).num_shards
        3
    """

    fingerprint: Fingerprint
    shard_rows: int
    run: str | None
    snapshots: tuple[Snapshot, ...] = ()
    feature_dtype: str = "float32"
    stopped: Stopped | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    trained_on: str | None = None
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_feature_dtype(self.feature_dtype)

    @property
    def num_shards(self) -> int:
        """Shards a snapshot."""
        return -(-self.fingerprint.length // self.shard_rows)

    @property
    def usable(self) -> tuple[Snapshot, ...]:
        """The snapshots to attribute at: all, but one in which the recording stopped."""
        incomplete = None if self.stopped is None else self.stopped.incomplete
        return tuple(snapshot for snapshot in self.snapshots if snapshot.key != incomplete)

    def write(self, path: Path) -> None:
        """Write the file, at once."""
        length, rows = self.fingerprint.length, self.shard_rows
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        for name in ("stopped", "trained_on", "training"):
            if record[name] is None:
                del record[name]
        for snapshot in record["snapshots"]:
            present = sorted(snapshot["shards"])
            bitmap = sum(((1 << min(rows, length - s * rows)) - 1) << (s * rows) for s in present)
            snapshot["rows"] = f"{bitmap:x}"  # bit i: row i has features
            for name in [name for name, value in snapshot.items() if value is None]:
                del snapshot[name]
        write_record(path, record)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the file, and check every field: it may come from anywhere."""
        record = read_record(path, "attribution store", FORMAT)
        del record["format"]
        for name in ("stopped", "trained_on", "training"):
            record.setdefault(name, None)
        try:
            manifest = read_fields(cls, record, _MANIFEST, whole=True)
            manifest._check()
        except (ValueError, RecursionError) as error:
            raise CorruptedStoreError(f"{path} is damaged: {error}. {RESTORE}") from error
        return manifest

    def _check(self) -> None:
        """Refuse fields that do not fit each other."""
        if self.trained_on is not None and len(self.trained_on) != 2 * -(-self.fingerprint.length // 8):
            raise ValueError("`trained_on` has other rows than the data set")
        checked("shard_rows", self.shard_rows, integer(-(-self.fingerprint.length // _MOST_SHARDS)))
        for snapshot in self.snapshots:
            if snapshot.folder != f"snapshots/{snapshot.key}":
                raise ValueError(f"the folder of snapshot {snapshot.key!r} is {snapshot.folder[:100]!r}")
            if any(shard >= self.num_shards for shard in snapshot.shards):
                raise ValueError(f"snapshot {snapshot.key!r} has rows of more than {self.fingerprint.length:,} samples")
        places = sorted(f"{snapshot.key.lower()}/" for snapshot in self.snapshots)  # some file systems know no case
        for one, after in pairwise(places):
            if after.startswith(one):
                raise ValueError(f"a snapshot {one[:-1]!r} is there twice, or holds another one")

    @classmethod
    def joined(cls, manifests: Sequence[tuple[Path, Manifest]]) -> Manifest:
        """Join the snapshots of several stores.

        Returns one manifest; the snapshots of store ``i`` are named and placed ``run<i>/<key>``. Each shard tells its
        own dtype; new ones take the first store's.
        """
        if not manifests:
            raise ValueError("Expected argument `stores` to name at least one store, but got none.")
        (path, first), *others = manifests
        fingerprint = first.fingerprint
        for other_path, other in others:
            difference = fingerprint.difference(other.fingerprint)
            if difference is None and other.shard_rows != first.shard_rows:
                difference = (
                    f"has {first.shard_rows} rows a shard, but this one has {other.shard_rows}: featurize both with "
                    "the same batch size"
                )
            if difference is None and other.trained_on != first.trained_on:
                difference = "is of a run that could draw other training samples: merge runs of the same samplers"
            if difference is not None:
                raise StoreMismatchError(f"{other_path} cannot be merged with {path}, which {difference}.")
            fingerprint = dataclasses.replace(
                fingerprint,
                data=fingerprint.data or other.fingerprint.data,
                projector=fingerprint.projector or other.fingerprint.projector,
                output=fingerprint.output or other.fingerprint.output,
                mode=fingerprint.mode or other.fingerprint.mode,
            )
        snapshots = [
            dataclasses.replace(
                snapshot,
                key=f"run{i}/{snapshot.key}",
                folder=f"snapshots/run{i}/{snapshot.key}",
                origin=snapshot.origin or manifest.id,
            )
            for i, (_, manifest) in enumerate(manifests)
            for snapshot in manifest.usable
        ]
        return cls(
            fingerprint,
            first.shard_rows,
            None,
            tuple(snapshots),
            first.feature_dtype,
            trained_on=first.trained_on,
            training=_settings(first) if all(_settings(other) == _settings(first) for _, other in others) else None,
        )


def _settings(manifest: Manifest) -> dict[str, Any] | None:
    """Settings of the Trainer, without the weights that each run began with."""
    training = manifest.training
    return None if training is None else {name: value for name, value in training.items() if name != "began"}


_MANIFEST = {
    "fingerprint": lambda found: read_fields(Fingerprint, found, _FINGERPRINT),
    "shard_rows": integer(1),
    "run": optional(text(1000)),
    "snapshots": items(lambda found: read_fields(Snapshot, found, _SNAPSHOT, ignored=("rows",)), most=100_000),
    "feature_dtype": text(100),
    "stopped": optional(lambda found: read_fields(Stopped, found, _STOPPED)),
    "id": text(100),
    "trained_on": optional(text(2**28)),
    "training": optional(plain),
}
