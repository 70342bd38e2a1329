"""Dropout masks as further members of an ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_attr.arguments.checks import check_flag, check_float, check_int, check_seed
from lightning_attr.features.dropout_masks import CHANNELWISE, ELEMENTWISE, dropout_ensemble
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, check_method
from lightning_attr.methods.cache import CacheKey, SnapshotCache
from lightning_attr.methods.support.module_method import model_of
from lightning_attr.methods.trak import TRAK
from lightning_attr.projectors import NoProjection, Projection, check_not_learned
from lightning_attr.projectors.eigen import DefaultProjector
from lightning_attr.randomness.streams import hashed_seed

T = TypeVar("T")


class DropoutEnsemble(AttributionMethod):
    """Each snapshot under several dropout masks, every one a member of the ensemble (Deng et al., 2024).

    A mask is one sub-network: the same units are dropped for all training samples and all targets, see
    :func:`lightning_attr.func.dropout_ensemble`, which says what is covered (``nn.Dropout``) and what is not
    (functional dropout). All else stays in eval mode, BatchNorm too. Each member has a projection of its own.

    Features are computed when targets are attributed, and kept beside the snapshot: a run that was killed goes on
    behind its last mask. Memory and disk: ``n_train`` x features x 4 bytes for each snapshot and mask.

    Args:
        method: what scores the features of all members; by default TRAK.
        masks: how many, for each snapshot.
        rate: of all dropout layers; by default each keeps its own.
        seed: of the masks.
        forward_only: take the gradients once, without dropout, and only the out-to-loss gradients over the masks: one
            forward pass a mask.

    Raises:
        TypeError: if the method runs the module itself, or wants the optimizer's state.
        ValueError: if an argument is out of range.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, nn.Sequential): ...
        >>> module = Classifier(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 2)).eval()
        >>> batch = (torch.eye(2), torch.tensor([0, 1]))
        >>> snapshot = SnapshotFeatures.at(SnapshotModel.of(module, [batch], [batch]), {})
        >>> (block,) = DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=3).score([snapshot])
        >>> block.scores.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        method: AttributionMethod | None = None,
        masks: int = 10,
        rate: float | None = None,
        seed: int = 0,
        forward_only: bool = False,
    ) -> None:
        method = TRAK() if method is None else method
        check_method(self, method)
        if method.projector is None:
            raise TypeError(
                f"Expected argument `method` to score features, as TRAK does, but {type(method).__name__} runs the "
                "module itself."
            )
        if method.needs_optimizer_state:
            raise TypeError(
                f"Expected argument `method` to need no optimizer state, but {type(method).__name__} does: under a "
                "dropout mask there is none."
            )
        if rate is not None:
            rate = check_float(self, "rate", rate, minimum=0, below=1, also="None")
        self.projector = None
        self.scale = method.scale
        self.method = _with_random_default(method)
        self.masks = check_int(self, "masks", masks, minimum=1)
        self.rate = rate
        self.seed = check_seed(self, seed)
        self.forward_only = check_flag(self, "forward_only", forward_only)

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Choose the snapshots of the method; see :meth:`AttributionMethod.select`.

        Args:
            snapshots: all that a run has.

        Returns:
            Those it uses.
        """
        return self.method.select(snapshots)

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:
        """Featurize training samples and targets under every mask; see :meth:`AttributionMethod.prepare`.

        Args:
            snapshots: with their models, and all targets.

        Raises:
            ValueError: if the module has no dropout layers.
        """
        members = [member for snapshot in snapshots for member in self._members(snapshot)]
        self.method.prepare(members)
        snapshots[0].cache.keep(_MEMBERS, members)

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Score the members with the method; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: with their models.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if the module has no dropout layers.
        """
        if snapshots[0].cache.find(_MEMBERS) is None:
            self.prepare(snapshots)
        members = snapshots[0].cache.find(_MEMBERS) or []
        rows = snapshots[0].target_rows
        yield from self.method.score([_restricted(member, rows) for member in members])
        of_snapshot = len(members) // len(snapshots)
        for number, snapshot in enumerate(snapshots):
            own = members[number * of_snapshot : (number + 1) * of_snapshot]
            if any(member.evidence for member in own):
                snapshot.evidence["members"] = [member.evidence for member in own]

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, with those of the method."""
        config = {name: value for name, value in super().config.items() if name not in {"method", "projector"}}
        of = self.method.config
        fitted_on = {"fitted_on": of["fitted_on"]} if "fitted_on" in of else {}
        return {**config, "method": type(self).__name__, "of": of, **fitted_on}

    def _members(self, snapshot: SnapshotFeatures) -> Iterator[SnapshotFeatures]:
        model = model_of(snapshot)
        rows = [range(rows[0], rows[-1] + 1) for rows, _ in model.train_batches()]
        pushes = []
        for mask in range(self.masks):
            if self.forward_only:
                pushes.append(self._train(model, NoProjection(), mask, rows)["out_to_loss"])
            else:
                yield self._member(snapshot, model, mask, rows, {})
        if self.forward_only:
            yield self._member(snapshot, model, None, rows, {"out_to_loss": torch.stack(pushes).mean(0)})

    def _member(
        self,
        snapshot: SnapshotFeatures,
        model: SnapshotModel,
        mask: int | None,
        rows: Sequence[range],
        instead: Mapping[str, Tensor],
    ) -> SnapshotFeatures:
        """Features under a mask, or without; some columns of the training samples instead of what was found."""
        key = model.key if mask is None else f"{model.key}/mask={mask}"
        projection = self.method.bind(model.layout, key)
        check_not_learned(projection, "DropoutEnsemble")
        train = {**self._train(model, projection, mask, rows), **instead}
        with self._dropout(model, mask):
            targets = model.targets(self.method.bind_targets(projection), snapshot.target_rows)
        edges = [0, *torch.tensor([len(block) for block in rows]).cumsum(0).tolist()]

        def blocks() -> Iterator[tuple[range, Mapping[str, Tensor]]]:
            for block, (start, stop) in zip(rows, pairwise(edges), strict=True):
                yield block, {name: values[start:stop] for name, values in train.items()}

        return replace(
            snapshot,
            blocks=blocks,
            targets={name: values.cpu() for name, values in targets.items()},
            cache=SnapshotCache(),
            model=None,
            layers=projection.layers,
            directions=0,
        )

    def _train(
        self, model: SnapshotModel, projection: Projection, mask: int | None, rows: Sequence[range]
    ) -> dict[str, Tensor]:
        """Columns of this process's training samples, one block of rows after the other."""
        shapes = {name: (model.n_train, *([projection.dim] if name == "features" else [])) for name in _COLUMNS}

        def compute() -> dict[str, Tensor]:
            everything = {name: torch.zeros(shape, dtype=model.dtype) for name, shape in shapes.items()}
            with self._dropout(model, mask):
                for block, columns in model.train(projection):
                    for name, values in everything.items():
                        values[block.start : block.stop] = columns[name]
            return {name: model.reduce(values) for name, values in everything.items()}

        projector = None if projection.dim == 0 else self.method.projector_config
        found = model.kept(f"dropout-{hashed_seed(str(projector), mask, self.rate, self.seed):016x}", compute, shapes)
        own = torch.tensor([row for block in rows for row in block], dtype=torch.int64)
        if torch.equal(own, torch.arange(model.n_train)):
            return found
        return {name: values[own] for name, values in found.items()}

    @contextmanager
    def _dropout(self, model: SnapshotModel, mask: int | None) -> Iterator[None]:
        model.load()
        with ExitStack() as stack:
            if mask is not None and self.rate != 0:
                stack.enter_context(_at_rate(model.module, self.rate))
                stack.enter_context(dropout_ensemble(model.module, hashed_seed(self.seed, model.key, mask)))
            yield


_MEMBERS: CacheKey[list[SnapshotFeatures]] = CacheKey("members")
_COLUMNS = ("features", "output", "loss", "out_to_loss", "newton_weight")


@contextmanager
def _at_rate(module: nn.Module, rate: float | None) -> Iterator[None]:
    """Lend the dropout layers a rate; None leaves them theirs."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, (*ELEMENTWISE, *CHANNELWISE))]
    own = [layer.p for layer in layers]
    try:
        for layer in layers if rate is not None else ():
            layer.p = rate
        yield
    finally:
        for layer, p in zip(layers, own, strict=True):
            layer.p = p


def _with_random_default(method: AttributionMethod) -> AttributionMethod:
    """A default that learns from the gradients of a snapshot gives way: under a mask they are others."""
    learned = method.projector
    if isinstance(learned, DefaultProjector):
        method = copy(method)
        method.projector = learned.random()
    return method


def _restricted(member: SnapshotFeatures, rows: range) -> SnapshotFeatures:
    """Leave a member with some of its targets."""
    index = [member.target_rows.index(row) for row in rows]
    return replace(member, targets={name: values[index] for name, values in member.targets.items()}, target_rows=rows)
