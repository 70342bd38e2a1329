"""Going through a plan with many small models at once, where that gives what one at a time does."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_int
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation.ground_truth import Records
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.train_one import LightningRetraining, diverged, isolated, save_checkpoint
from lightning_attr.evaluation.vectorised.reference_run import NotVectorisableError, Pilot
from lightning_attr.evaluation.vectorised.stacked_models import Stack
from lightning_attr.files.claims import Claim

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Models at once by default: the digits MLP takes 0.25 ms a step and model then, 0.41 with 16, and no less with 128."""
_FEWEST = 4
"""Retrainings of a size, below which one at a time is as fast: the first is the pilot, and is trained again."""


def check_vectorise(vectorise: object) -> None:
    """Check the argument ``vectorise``.

    Example:
        >>> check_vectorise("always")
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `vectorise` of retrain_* to be True, False, 'auto' or an integer >= 2, but got
        'always'.
    """
    if isinstance(vectorise, int) and not isinstance(vectorise, bool):
        check_int("retrain_*", "vectorise", vectorise, minimum=2, also="True, False or 'auto'")
    else:
        check_choice("retrain_*", "vectorise", vectorise, (True, False, "auto"), also="an integer >= 2")


class VectorisedRetraining:
    """Trains many models at once; one at a time, what can not be.

    Args:
        one: trains one at a time.
        vectorise: "auto" to train one at a time where many at once is not possible; True or a number of models at once
            to raise an error there.

    Example:
        >>> import lightning as L, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr.evaluation import retrain_lds
        >>> class Mean(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.mean - batch[0]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.arange(6.0)), batch_size=3)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> import tempfile
        >>> outputs = []
        >>> for vectorise in (False, True):
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         truth = retrain_lds(
        ...             Mean, trainer, dirpath=folder, num_subsets=5, vectorise=vectorise, progress=False
        ...         )
        ...     outputs.append(truth.outputs)
        >>> torch.allclose(*outputs)
        True
    """

    def __init__(self, one: LightningRetraining, vectorise: int | Literal["auto"] = "auto") -> None:
        self.one = one
        self.demanded = vectorise != "auto"
        self.at_once = None if isinstance(vectorise, (bool, str)) else vectorise

    def __call__(
        self,
        retraining: Retraining,
        kept: Tensor,
        beat: Callable[[], None] = lambda: None,
        checkpoint: Path | None = None,
    ) -> tuple[Tensor, dict[str, object]]:
        """Train one model; see :class:`lightning_attr.evaluation.queue.Train`."""
        return self.one(retraining, kept, beat, checkpoint)

    def train_groups(
        self, records: Records, keep_checkpoints: bool, show: Callable[[], None], stopped: Callable[[], bool]
    ) -> None:
        """Train subsets of equal size at once; see :class:`lightning_attr.evaluation.queue.TrainGroups`."""
        groups: dict[int, list[Retraining]] = defaultdict(list)
        for retraining in records.unfinished():
            groups[int(records.plan.masks[retraining.subset].sum())].append(retraining)
        for pending in groups.values():
            if len(pending) < _FEWEST:
                continue
            try:
                with isolated(self.one.verbose):
                    self._train_group(records, pending, keep_checkpoints, show, stopped)
            except NotVectorisableError as error:
                if self.demanded:
                    raise AttributionError(
                        f"Many retrainings at once were asked for, but {error}. Change that, or retrain with "
                        '`vectorise="auto"` or `vectorise=False`; what is finished is kept.'
                    ) from error
                log.warning("Retraining one at a time: %s.", error)
                return

    def _train_group(
        self,
        records: Records,
        pending: list[Retraining],
        keep_checkpoints: bool,
        show: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Train retrainings of equally many samples: first a pilot, then many at once."""
        stack: Stack | None = None
        at_once, checked = 1, False
        while pending and not stopped():
            with ExitStack() as releases:
                claims = _claimed(records, pending, at_once, releases)
                if not claims:
                    return
                if stack is None:
                    stack = self._train_pilot(records, claims, keep_checkpoints)
                    at_once = self.at_once or min(_AT_ONCE, stack.fitting())
                else:
                    _train_stack(records, stack, claims, keep_checkpoints, not checked)
                    checked = True
            show()

    def _train_pilot(self, records: Records, claims: Mapping[Retraining, Claim], keep_checkpoint: bool) -> Stack:
        """Train one by the Trainer, write it, and prepare to train others like it."""
        [(retraining, claim)] = claims.items()
        kept, start = records.plan.masks[retraining.subset], time.perf_counter()
        pilot = Pilot.train(self.one, retraining, kept, claim.beat)
        if keep_checkpoint:
            save_checkpoint(pilot.fitted.trainer, records.checkpoint_path(retraining))
        seconds = f"{time.perf_counter() - start:.3f}"
        records.write(retraining, pilot.outputs, {"global_step": pilot.steps, "seconds": seconds})
        return Stack(pilot, self.one.factories.module)


def _claimed(records: Records, pending: list[Retraining], count: int, releases: ExitStack) -> dict[Retraining, Claim]:
    """Claim the first retrainings that no other process has, and take all that was looked at from the list."""
    found: dict[Retraining, Claim] = {}
    while pending and len(found) < count:
        retraining = pending.pop(0)
        claim = None if records.path(retraining).exists() else records.claim(retraining)
        if claim is not None:
            found[retraining] = releases.enter_context(claim)
    return found


def _train_stack(
    records: Records, stack: Stack, claims: Mapping[Retraining, Claim], keep_checkpoints: bool, check: bool
) -> None:
    """Train claimed retrainings at once, and write each; the pilot's is one more where that is to be checked."""
    masks, start = records.plan.masks, time.perf_counter()

    def beat() -> None:
        for claim in claims.values():
            claim.beat()

    group = [(retraining, masks[retraining.subset]) for retraining in claims]
    if check:
        group.insert(0, (stack.pilot.retraining, stack.pilot.kept))
    state, outputs = stack.train(group, beat, check)
    details = {
        "global_step": stack.pilot.steps,
        "at_once": len(group),
        "seconds": f"{(time.perf_counter() - start) / len(group):.3f}",
    }
    failed = None
    for model, (retraining, _) in list(enumerate(group))[check:]:
        wrong = [name for name, tensor in state.items() if not tensor[model].isfinite().all()]
        if wrong or not outputs[model].isfinite().all():  # the others are written first
            what = f"its parameter `{wrong[0]}` holds" if wrong else "its outputs hold"
            failed = failed or AttributionError(diverged(retraining, f"{what} NaN or Inf."))
            continue
        if keep_checkpoints:
            stack.load(state, model)
            save_checkpoint(stack.trainer, records.checkpoint_path(retraining))
        records.write(retraining, outputs[model], details)
    if failed is not None:
        raise failed
