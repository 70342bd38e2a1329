"""What one optimizer step of a run hands on to the next: parameters, buffers, and what the optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class RunState(NamedTuple):
    """The state of a run between two optimizer steps; of an adjoint, the derivatives by these.

    Args:
        parameters: name -> parameter, frozen ones as well.
        buffers: name -> buffer.
        first: name -> momentum of SGD, or first moment of Adam; none before a parameter's first update.
        second: name -> second moment of Adam, likewise.
        updates: name -> updates of a parameter so far; none for 0.

    Example:
        >>> RunState.begin({"w": torch.ones(2)}, {}).nbytes
        8
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    updates: dict[str, int]

    @classmethod
    def begin(cls, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> RunState:
        """Give the state before the first step: no optimizer has kept anything."""
        return cls(dict(parameters), dict(buffers), {}, {}, {})

    @classmethod
    def adjoint(cls, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], end: RunState) -> RunState:
        """Give the adjoint at the end of a run of an output that sees parameters and buffers there.

        Shapes: those of ``end``; names that are left out have no derivative.
        """
        zeros = [{name: torch.zeros_like(tensor) for name, tensor in part.items()} for part in end[:4]]
        return cls({**zeros[0], **parameters}, {**floating(zeros[1]), **buffers}, zeros[2], zeros[3], {})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in self[:4] for tensor in part.values())


def floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the tensors that have derivatives: counters have none.

    Example:
        >>> sorted(floating({"mean": torch.ones(1), "count": torch.tensor(3)}))
        ['mean']
    """
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
