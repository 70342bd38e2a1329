"""Second directions that share the forward pass of the model output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.features.finite import check_finite
from lightning_attr.gradients.hooks import LayerSink
from lightning_attr.objectives.objective import MixinOutput
from lightning_attr.outputs import SampleDraws
from lightning_attr.store.feature_dtype import SECOND


def words_of(rows: Sequence[int], snapshot: str, direction: int, draw: int, device: torch.device) -> Tensor:
    """Give the words that the signs of a direction are drawn from, ``(b,)``: of snapshot and row alone."""
    return SampleDraws.of(rows, "second direction", snapshot, direction, draw, device=device).words


class SharedForwardFeaturizer(Featurizer):
    """A featurizer whose rows have second directions: one forward pass, and a backward pass for each.

    Args:
        featurizer: whose arguments it takes.
        directions: second directions a sample; none where they cannot share the forward pass.
        scale: of these.

    Attributes:
        directions: as passed.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.featurizer import plan
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, torch.nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> identity = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> one = Featurizer(module, plan(module, batch, 4), identity)
        >>> SharedForwardFeaturizer(one, 2, 1.0)(batch, [0, 1, 2, 3])["second_features"].shape
        torch.Size([4, 2, 9])
    """

    def __init__(self, featurizer: Featurizer, directions: int, scale: float) -> None:
        one = featurizer
        super().__init__(one.module, one.plan, one.projection, one.memory, one.snapshot, one.first_row)
        self.directions, self.scale = directions, scale
        self.rows_a_sample = 1 + directions
        self._sinks: list[LayerSink] = []
        self._words: list[Tensor] = []

    def _featurize(self, batch: Any, rows: Sequence[int], out: Tensor | None, late: bool) -> dict[str, Tensor]:
        if not self.directions:
            return super()._featurize(batch, rows, out, late)
        device = next(self.module.parameters()).device
        seconds = torch.empty(self.directions, len(rows), self.projection.dim, dtype=self.dtype, device=device)
        with ExitStack() as stack:
            self._sinks = [stack.enter_context(self.projection.filling(each)) for each in seconds]
            columns = super()._featurize(batch, rows, out, late)
        finished = [self.projection.finish({"features": each})["features"] for each in seconds]
        for each in finished if not late else ():
            check_finite(self.module, {"features": each}, rows)
        return {**columns, SECOND: torch.stack(finished, 1)}

    def given(self, batch: Any, rows: Sequence[int], number: int) -> Any:
        """Complete a batch, and draw its directions; see :meth:`Featurizer.given`."""
        device = next(self.module.parameters()).device
        self._words = [words_of(rows, self.snapshot, each, number, device) for each in range(self.directions)]
        return super().given(batch, rows, number)

    def _draw(self, batch: Any, batch_size: int, add: LayerSink, seed: int | None) -> dict[str, Tensor]:
        if not self.directions:
            return super()._draw(batch, batch_size, add, seed)
        objective, seen = self.plan.objective, []

        def forward() -> list[Tensor]:
            output, behind = objective.forward(batch, batch_size)
            seen.append(behind)
            second = self.module.model_output.second_direction
            return [output, *(self.scale * second(*behind, SampleDraws(words)) for words in self._words)]

        output, *_ = self.gradients.several(forward, batch_size, [add, *self._sinks])
        return objective.columns(batch, output, seen[0])


def shares_forward(featurizer: Featurizer) -> bool:
    """Say whether second directions can share the forward pass: all gradients come by hooks, nothing is random."""
    plan: AttributionPlan = featurizer.plan
    hooked = featurizer.gradients.shares and not featurizer.fallback
    return hooked and not plan.seeded and isinstance(plan.objective, MixinOutput) and featurizer.projection.dim > 0
