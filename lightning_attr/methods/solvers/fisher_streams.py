"""Streams of gradients of the training samples, layer by layer, for what is fitted to their second moments."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from lightning_attr.curvature.fisher import GradientBatch, GradientStream, Labels, fisher_batch, usual_labels
from lightning_attr.features.snapshot_model import Batches, SnapshotModel
from lightning_attr.gradients import HookedGradients
from lightning_attr.gradients.hooks import LayerSink
from lightning_attr.objectives.mixin import attribution_outputs


class FisherStreams:
    """The gradients of this process's training samples at a snapshot, for labels of the module's own or observed ones.

    Args:
        model: the module at the snapshot.
        names: of the parameters wanted.
    """

    def __init__(self, model: SnapshotModel, names: Collection[str]) -> None:
        self.model = model
        self.gradients = HookedGradients(model.module, names, direct=())

    def batches(self) -> Batches:
        """Training samples of this process, completed."""
        return ((rows, self.model.completed(rows, batch)) for rows, batch in self.model.train_batches())

    def usual_labels(self, draws: int) -> Labels:
        """The most careful labels that any process would take: those that are drawn cost the least."""
        module: Any = self.model.module
        names: tuple[Labels, ...] = ("mixed", "exact", "sampled")
        votes = torch.zeros(len(names), device=self.model.device)
        for rows, batch in islice(self.batches(), 1):
            with torch.no_grad(), self.model.precision():
                distribution = module.model_output.distribution(*attribution_outputs(module, batch))
            votes[names.index(usual_labels(distribution, len(rows), draws))] += 1
        return names[max(self.model.reduce(votes).nonzero().flatten().tolist(), default=0)]

    def fisher(self, labels: Labels, key: tuple[object, ...] = (), draws: int = 1) -> Iterator[GradientBatch]:
        """Gradients of the loss for labels of the model's own, or for those observed."""
        module: Any = self.model.module
        for rows, batch in self.batches():
            if labels == "observed" and not hasattr(module, "attribution_step"):
                yield GradientBatch([self.outputs(batch, len(rows))], len(rows))  # the loss but for its sign
                continue
            step, output = partial(attribution_outputs, module), module.model_output
            with self.model.precision():
                own = fisher_batch(self.gradients, step, batch, output, rows, labels=labels, key=key, draws=draws)
            yield replace(own, streams=[partial(self._precisely, stream) for stream in own.streams])

    def outputs(self, batch: Any, size: int) -> GradientStream:
        """Gradients of what is attributed."""
        objective = self.model.plan.objective
        return partial(
            self._precisely,
            lambda sink: self.gradients(lambda: objective.forward(batch, size)[0], size, sink),
        )

    def _precisely(self, stream: GradientStream, sink: LayerSink) -> object:
        with self.model.precision():
            return stream(sink)
