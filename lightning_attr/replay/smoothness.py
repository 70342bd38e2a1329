"""Whether a run is smooth enough for derivatives to say what other weights of its samples would have done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import ReplayStep, advance


def metasmoothness(
    start: RunState, steps: Sequence[ReplayStep], n_rows: int, seed: int = 0, size: float = 0.05
) -> float:
    r"""Train three times and compare how the end moves (Engstrom et al., 2025, "metasmoothness").

    .. math:: \frac{\sum_k |\Delta_k| \operatorname{sign}(\Delta_k \Delta'_k)}{\sum_k |\Delta_k|}, \qquad
        \Delta = \theta(1 + h v) - \theta(1), \quad \Delta' = \theta(1 + 2 h v) - \theta(1 + h v)

    with random signs :math:`v` of the samples' weights and the size :math:`h` of their change.

    Returns 1 where all parameters go on as they began, about 0 where they move by chance, as in a run at the edge of
    stability.

    Example:
        >>> metasmoothness(RunState.begin({"w": torch.ones(2)}, {}), [], n_rows=3)
        1.0
    """
    signs = 2 * torch.randint(0, 2, (n_rows,), generator=torch.Generator().manual_seed(seed)) - 1
    ends = [_end(start, steps, 1 + factor * size * signs) for factor in (0, 1, 2)]
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    total = first.abs().sum()
    return ((first.abs() * (first * second).sign()).sum() / total).item() if total > 0 else 1.0


def _end(state: RunState, steps: Sequence[ReplayStep], weights: Tensor) -> Tensor:
    for step in steps:
        state = advance(step, state, weights)[0]
    return torch.cat([p.double().flatten() for p in state.parameters.values()])
