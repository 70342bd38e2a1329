"""Rows that hold NaN or Inf are refused, by the name of their sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attr.errors import NonFiniteGradientError


def all_finite(columns: Mapping[str, Tensor]) -> bool:
    """Whether no value is NaN or Inf: one pass and one wait, as either makes the sum one."""
    return bool(torch.stack([values.sum(dtype=torch.float32) for values in columns.values()]).isfinite().all())


def check_finite(module: Any, columns: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    """Refuse rows that are not finite.

    Shapes: columns (b, ...).

    Example:
        >>> check_finite(torch.nn.Linear(1, 1), {"features": torch.ones(2, 3)}, [0, 1])
    """
    if all_finite(columns):
        return
    for name, values in sorted(columns.items(), key=lambda column: column[0] == "features"):  # the output before it
        finite = values.isfinite().reshape(len(rows), -1).all(1)
        if not finite.all():
            bad = [rows[i] for i in (~finite).nonzero().flatten().tolist()]
            what = "gradient" if name == "features" else name
            raise NonFiniteGradientError(
                f"The {what} of sample {', '.join(map(str, bad[:8]))}{' ...' if len(bad) > 8 else ''} is NaN or Inf "
                f"({len(bad)} of the {len(rows)} samples of its batch). {_culprit(module, bad[0])}"
            )


def _culprit(module: Any, row: int) -> str:
    if not all(p.isfinite().all() for p in module.parameters()):
        return "The weights hold NaN or Inf: a diverged model has no attribution."
    return (
        f"The weights are finite, so it is the sample. Look at dataset[{row}]: at NaN or Inf in its inputs, a label "
        "that is missing or ignored (the mean over no labels is NaN), or an infinite slope, as of a root at zero."
    )
