"""Whether a sample is the same each time it is read: data sets and collate functions may count, drift, or draw."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.form import leaves
from lightning_attr.data.loader import DataSource
from lightning_attr.data.lost_rows import same_content
from lightning_attr.errors import AttributionError
from lightning_attr.user_code.kept_state import KeptState
from lightning_attr.user_code.reachable import Reachable
from lightning_attr.user_code.reading_state import unchanged_data

log = logging.getLogger(__name__)


def check_repeated_reads(source: DataSource, rows: Sequence[int]) -> None:
    """Read some samples twice, each time with the same random numbers.

    Where data set and collate function keep state that changes what is read, it is put back after each reading from
    now on: all samples are seen from the same state. Where they draw random numbers that cannot be repeated, that is
    said.
    """
    with unchanged_data(source.dataset, source.loader.collate_fn):  # once for all: not after each reading
        _check(source, list(rows[:2]))


def _check(source: DataSource, row: list[int]) -> None:
    try:
        first = source.collated(row)
    except Exception:  # which the next look at them explains
        return
    source.collated(row[1:] or row)
    if not _differ(first, source.collated(row)):
        return
    data = {type(source.dataset).__name__: source.dataset, "collate_fn": source.loader.collate_fn}
    arrays = [(name, array) for name, array in Reachable(data, reading=True).arrays if not array.dtype.hasobject]
    sums = [zlib.crc32(array.tobytes()) for _, array in arrays]
    with KeptState(data, set(), reading=True).kept(by_value=True) as changed:
        source.collated(row)
    written = [name for (name, array), known in zip(arrays, sums, strict=True) if zlib.crc32(array.tobytes()) != known]
    if written:
        raise AttributionError(
            f"Reading dataset[{row[0]}] of the {source.role} data changes `{written[0]}`, which is too large to be put "
            "back: training would see other data than without attribution. Let the data set work on copies of what it "
            "holds (`x = self.data[i].copy()`), not in place."
        )
    source.form.put_back = True
    if not _differ(source.collated(row), source.collated(row)):
        log.warning(
            "Reading the %s data changes %s, and what is read with it, dataset[%d] for instance. Attribution puts "
            "that back after each sample it reads: training does not notice, and every sample is seen from the same "
            "state.",
            source.role,
            ", ".join(f"`{name}`" for name in changed[:4]) or "something",
            row[0],
        )
        source.form.drifting = tuple(changed)
        return
    source.form.put_back, source.form.random = False, True
    log.warning(
        "dataset[%d] of the %s data has other values each time it is read, although all random streams that are known "
        "start anew: each score is of one reading of its sample. Draw from `torch`, `numpy.random`, `random`, or from "
        "a generator that the data set keeps.",
        row[0],
        source.role,
    )


def _differ(first: Any, second: Any) -> bool:
    """Whether two batches are known to differ: objects that cannot be compared are none."""
    if same_content(first, second):
        return False
    pairs = list(zip(leaves(first), leaves(second), strict=False))
    return any(not same_content(one, another) for one, another in pairs if _is_comparable(one))


def _is_comparable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or all(isinstance(value, (str, bytes, int, float, torch.Tensor)) for value in leaf)
