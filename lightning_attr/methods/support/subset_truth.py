"""Models retrained on subsets, for methods that fit something to them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_attr.arguments.messages import argument_message
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.files.io import digest

LEAST_SUBSETS = 20
"""Rank correlations over fewer subsets choose noise."""


class SubsetTruth(Protocol):
    """What :class:`lightning_attr.evaluation.GroundTruth` holds of models retrained on random subsets.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> masks, outputs = torch.ones(20, 3, dtype=torch.bool), torch.zeros(1, 20, 2)
        >>> check_subset_truth("TRAK", SimpleNamespace(kind="lds", masks=masks, outputs=outputs))
    """

    @property
    def kind(self) -> str:
        """The kind "lds", for random subsets."""

    @property
    def masks(self) -> Tensor:
        """Training samples of each subset, ``(num_subsets, n_train)``, bool."""

    @property
    def outputs(self) -> Tensor:
        """Model output of each target after retraining, ``(seeds, num_subsets, n_target)``."""


def check_subset_truth(
    owner: object, truth: SubsetTruth, n_train: int | None = None, n_target: int | None = None
) -> None:
    """Check that there is enough to choose by, and of the data at hand."""
    if not all(hasattr(truth, attribute) for attribute in ("kind", "masks", "outputs")):
        remedy = "Open a directory with `GroundTruth.open(dirpath)`."
        raise TypeError(argument_message(owner, "truth", "a GroundTruth of `retrain_lds`", truth, remedy))
    if truth.kind != "lds":
        raise ValueError(
            f'Expected argument `truth` to hold models retrained on random subsets (kind "lds"), but its kind is '
            f'"{truth.kind}". Make it with `retrain_lds`.'
        )
    if len(truth.masks) < LEAST_SUBSETS:
        raise ValueError(
            f"Expected argument `truth` to hold at least {LEAST_SUBSETS} subsets, but it has {len(truth.masks)}: a "
            "choice by fewer would follow the noise of retraining."
        )
    if truth.outputs.isnan().any():
        raise AttributionError(
            "Expected argument `truth` to be finished, but some of its retrainings have no outputs yet. Run the same "
            "`retrain_lds` call again: it goes on where it stopped."
        )
    sizes = {"training samples": (truth.masks.shape[1], n_train), "targets": (truth.outputs.shape[2], n_target)}
    for name, (found, expected) in sizes.items():
        if expected is not None and found != expected:
            raise StoreMismatchError(
                f"Expected argument `truth` to be of the data at hand, but it has {found:,} {name}, and here are "
                f"{expected:,}. Attribute with the datamodule and `targets` that the models were retrained with."
            )


def mask_digests(masks: Tensor) -> list[str]:
    """Name subsets by their content, so that an evaluation can tell those that something was fitted to.

    Shapes: masks (num_subsets, n_train). Returns a SHA-256 in hexadecimal for each.
    """
    return [digest({"mask": mask.bool()}) for mask in masks]
