"""The recorded run that pilots are trained like."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor

from lightning_attr.data.loader import DataSource
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.files.io import digest
from lightning_attr.objectives.objective import describe_output
from lightning_attr.parameters.trainable import parameter_shapes, trainable_names
from lightning_attr.parameters.weights import weights_of
from lightning_attr.pilots.again import check_settings
from lightning_attr.pilots.beginning import unlike_a_fresh_one
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot

_REMEDY = "Pass `pilots=Pilots(..., module=...)` with a function that makes the module as the run began with it."


@dataclass(frozen=True)
class RecordedRun:
    """A run on record and what trained it; it refuses pilots that would be of another kind.

    Args:
        store: of the run.
        trainer: the user's.
        module: the user's, trained.
        datamodule: the user's, if any.
        train: the training data, with the loader that trained.

    See :func:`lightning_attr.pilots.training.train_pilots` for its use.
    """

    store: FeatureStore
    trainer: L.Trainer
    module: L.LightningModule
    datamodule: L.LightningDataModule | None
    train: DataSource

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those of the run itself."""
        return [snapshot for snapshot in self.store.manifest.usable if snapshot.pilot is None]

    @property
    def last(self) -> Snapshot:
        """The end of the run; of several merged ones, of the longest."""
        return max(self.snapshots, key=lambda snapshot: snapshot.global_step)

    @property
    def epochs(self) -> int:
        """How many it trained for; 0 where there is no record of a step."""
        return self.last.epoch + 1 if self.last.global_step > 0 else 0

    def steps_of(self, epochs: int) -> int:
        """Count the optimizer steps of so many of its epochs."""
        return round(self.last.global_step * epochs / max(1, self.epochs))

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse a Trainer that trains otherwise; to be called when it is about to make its first step."""
        check_settings(self.store.manifest.training, trainer, self.train.loader)
        last, batches = self.last, trainer.num_training_batches
        by_hand = not trainer.lightning_module.automatic_optimization  # which may step any number of times
        if by_hand or not self.epochs or math.isinf(batches):
            return
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        if not last.epoch * steps < last.global_step <= (last.epoch + 1) * steps:
            raise AttributionError(
                f"Pilots are trained as the run was, which took {last.global_step} optimizer steps in {last.epoch + 1} "
                f"epoch(s), but here an epoch has {steps}. Use the run's batch size, `accumulate_grad_batches` and "
                "`limit_train_batches`: pass the datamodule or the loader that the run was fitted with."
            )

    def check_beginning(self, module: L.LightningModule) -> None:
        """Warn where the run began from other weights than chance gives; to be called before the first step."""
        began = (self.store.manifest.training or {}).get("began", {})
        name = unlike_a_fresh_one(began, module)
        if name is not None:
            rank_zero_warn(
                f"Pilots train a fresh {type(self.module).__name__}, but the run began with a `{name}` that it has not "
                "by chance: weights were loaded after the constructor, or trained before. Pilots from other "
                f"weights tell little of such a run. {_REMEDY}"
            )

    def check_module(self, module: L.LightningModule) -> None:
        """Refuse another module than the run's, or one that shares its weights."""
        name = type(self.module).__name__
        taken = {id(p) for p in self.module.parameters()}
        shared = next((key for key, p in module.named_parameters() if id(p) in taken), None)
        if shared is not None:
            raise AttributionError(
                f"Pilots train a fresh {name}, but made again it shares its parameter `{shared}` with the trained one, "
                f"whose constructor took it as an argument. {_REMEDY}"
            )
        layout = parameter_shapes(module)
        if layout and layout != dict(self.store.fingerprint.layout):  # `configure_model` may add parameters later
            raise StoreMismatchError(
                f"Pilots train a fresh {name}, but the parameters of the one made again are not the run's. {_REMEDY}"
            )
        output, found = self.store.fingerprint.output, describe_output(module)
        if output is not None and found != output:
            raise StoreMismatchError(
                f"Pilots train a fresh {name}, but of the one made again {found} would be attributed, and {output} of "
                f"the run's. {_REMEDY}"
            )
        self._check_frozen(module)

    def _check_frozen(self, module: L.LightningModule) -> None:
        """Frozen weights are part of the model: those of the module made again must be the run's."""
        frozen = self.store.fingerprint.layout.keys() - self._trained
        weights = self.store.weights(self.last.key) if frozen else {}
        for name, tensor in weights_on_cpu(module).items():
            if name in frozen and digest({name: tensor}) != digest({name: weights[name]}):
                raise AttributionError(
                    f"Pilots train a fresh {type(module).__name__}, but made again its parameter `{name}`, which the "
                    f"run kept frozen, has other values: it was loaded after the constructor. {_REMEDY}"
                )

    @property
    def _trained(self) -> set[str]:
        """Parameters that the run trained at any time."""
        every = self.store.fingerprint.layout
        return {name for snapshot in self.snapshots for name in (snapshot.trainable or every)}

    def check_trained(self, number: int, module: L.LightningModule, trainer: L.Trainer) -> None:
        """Refuse a pilot that is of no use."""
        for why in self._failures(module, trainer):
            raise AttributionError(f"Pilot {number} {why} Nothing of it was kept; pilots before it are.")

    def _failures(self, module: L.LightningModule, trainer: L.Trainer) -> list[str]:
        if not trainer.state.finished or trainer.global_step == 0:
            return [f"ended after {trainer.global_step} optimizer steps, before its time. Call again to go on."]
        bad = next((name for name, p in module.named_parameters() if not p.isfinite().all()), None)
        if bad is not None:
            return [
                f"diverged: its parameter `{bad}` holds NaN or Inf. Lower the learning rate, or clip gradients, by "
                "`pilots=Pilots(..., module=..., trainer=...)`."
            ]
        extra = set(trainable_names(module) or self.store.fingerprint.layout) - self._trained
        if extra:
            return [f"trained the parameter `{min(extra)}`, which the run kept frozen. {_REMEDY}"]
        content = digest(weights_on_cpu(module))
        same = next((snapshot.key for snapshot in self.store.snapshots if snapshot.weights == content), None)
        if same is not None:
            return [
                f"came out as {same} did, to the last bit: nothing in its training is random. Leave seeds out of the "
                "module (`seed_everything`, `manual_seed`), or let the loader shuffle."
            ]
        return []


def weights_on_cpu(module: L.LightningModule) -> dict[str, Tensor]:
    """List parameters and buffers, as they are stored.

    Example:
        >>> weights_on_cpu(L.LightningModule())
        {}
    """
    return {name: tensor.cpu() for name, tensor in weights_of(module).items()}
