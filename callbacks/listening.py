"""The callback whose self-influence another callback of the same Trainer acts on or shows."""

from __future__ import annotations

import lightning as L

from lightning_attr.callbacks.attribution import AttributionCallback

__all__ = ["recorder_of"]


def recorder_of(trainer: L.Trainer, because: str, listener: str) -> AttributionCallback:
    """Find the AttributionCallback that featurizes, or say ``because`` of what it is needed, and how to add it."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
    recorder = next((c for c in callbacks if isinstance(c, AttributionCallback)), None)
    if recorder is None or not recorder.featurize:
        found = "none" if recorder is None else "one with featurize=False"
        raise ValueError(
            f"Expected an AttributionCallback that featurizes among the Trainer's callbacks, because {because} what it "
            f"computes, but found {found}. Use callbacks=[AttributionCallback(), {listener}]."
        )
    return recorder
