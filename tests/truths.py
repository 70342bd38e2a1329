"""Ground truth without retraining, for tests of what is fitted to it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.evaluation import GroundTruth


def truth_of(
    scores: Tensor, subsets: int = 40, seeds: int = 1, noise: float = 0.0, seed: int = 0, kind: str = "lds"
) -> GroundTruth:
    """Models retrained on random halves, whose outputs are sums of scores ``(n_train, n_target)``, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    n, m = scores.shape
    order = torch.rand(subsets, n, generator=generator).argsort(1)
    masks = order < n // 2
    outputs = masks.double() @ scores.double() + noise * torch.randn(seeds, subsets, m, generator=generator).double()
    return GroundTruth(Path(), kind, masks, outputs, torch.zeros(seeds, subsets, dtype=torch.int64), {})
