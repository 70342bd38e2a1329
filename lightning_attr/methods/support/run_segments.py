"""Parts of a run that snapshots stand for together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from lightning_attr.arguments.checks import check_float, check_int
from lightning_attr.arguments.messages import argument_message

T = TypeVar("T")


def check_segments(owner: object, segments: Any) -> int | list[float]:
    """Check a number of segments, or the shares of a run at which they end.

    Returns plain numbers.
    """
    if not isinstance(segments, Sequence) or isinstance(segments, (str, bytes)):
        return check_int(owner, "segments", segments, minimum=1, also="a list of shares at which segments end")
    ends = [check_float(owner, f"segments[{i}]", end, above=0, below=1) for i, end in enumerate(segments)]
    if not ends or any(one >= after for one, after in pairwise(ends)):
        raise ValueError(argument_message(owner, "segments", "ascending shares in (0, 1), at least one", segments))
    return ends


def segments_of(snapshots: Sequence[T], rates: Sequence[float], segments: int | Sequence[float]) -> list[list[T]]:
    """Divide the snapshots of a run, each by the middle of the learning rates that it stands for.

    Snapshots that stand for no steps are left out, and so are segments without any snapshot. Returns the snapshots of
    each segment, in the order of training.

    Example:
        >>> segments_of("start 0 1 2 4 8 16 19".split(), [0, 1, 1, 1, 2, 4, 8, 3], 3)
        [['0', '1', '2', '4'], ['8', '16'], ['19']]
        >>> segments_of("abc", [1.0, 1.0, 2.0], [0.3])
        [['a'], ['b', 'c']]
    """
    ends = [(i + 1) / segments for i in range(segments - 1)] if isinstance(segments, int) else list(segments)
    found: list[list[T]] = [[] for _ in range(len(ends) + 1)]
    passed, total = 0.0, sum(rates)
    for snapshot, rate in zip(snapshots, rates, strict=True):
        middle = (passed + rate / 2) / total
        passed += rate
        if rate > 0:
            found[sum(end <= middle for end in ends)].append(snapshot)
    return [own for own in found if own]
