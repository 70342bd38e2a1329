"""What a result says of how it came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_attr.methods import AttributionMethod, SnapshotFeatures
from lightning_attr.store.manifest import Snapshot, Stopped


def provenance_of(
    method: AttributionMethod,
    used: Sequence[Snapshot],
    features: Sequence[SnapshotFeatures],
    *,
    train_data: str | None,
    target_probe: str | None,
    mode: str | None = None,
    stopped: Stopped | None = None,
    topk: int | None = None,
    target_function: Callable[..., Any] | None = None,
    parts: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Gather what a result records beside its scores; what does not apply is left out.

    Returns name -> plain value.
    """
    evidence = {snapshot.key: own.evidence for snapshot, own in zip(used, features, strict=True) if own.evidence}
    name = None if target_function is None else getattr(target_function, "__qualname__", repr(target_function))
    beside = {
        "mode": None if mode == "eval" else mode,
        "evidence": evidence or None,
        "stopped": None if stopped is None else str(stopped),
        "topk": topk,
        "target_function": name,
        "parts": dict(parts) if parts is not None and len(parts) > 1 else None,
    }
    return {
        **method.config,
        "snapshots": [snapshot.key for snapshot in used],
        "train_data": train_data,
        "target_probe": target_probe,
        **{name: value for name, value in beside.items() if value is not None},
    }
