r"""RelatIF (Barshan et al., 2020): influence relative to how much a sample changes the model at all.

Leaving out training sample i moves the parameters by :math:`\Delta_i = \frac1n (C + \lambda I)^{-1} g_i`. Its influence
is divided by the length of that, or by the root of the change of its own loss, so that samples that move everything,
such as outliers, are not the proponents of everything.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

Relative: TypeAlias = Literal["theta", "loss"]

_LEAST = 1e-12


def divisor(relative: str | None, own_loss: Tensor, squared_change: Tensor) -> Tensor | float:
    r"""Give what the scores of each training sample are divided by.

    Shapes: own_loss (b,), squared_change (b,). Returns ``(b,)``, positive.
    """
    if relative is None:
        return 1.0
    return (squared_change if relative == "theta" else own_loss).clamp(min=0).sqrt().clamp(min=_LEAST)
