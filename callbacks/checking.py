"""The look at a run before it starts: which path each layer takes, what a snapshot costs, what would be refused."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from lightning_attr.arguments.checks import check_instance
from lightning_attr.attribution.arguments import check_datamodule
from lightning_attr.attribution.rehearsal import heard, rehearse
from lightning_attr.attribution.run_check import RunCheck, checked_layers
from lightning_attr.attribution.strategies import check_one_process, check_strategy
from lightning_attr.callbacks.beside import beside_training
from lightning_attr.callbacks.guard import describe
from lightning_attr.callbacks.preparation import Preparation, RecordingRequest, prepare
from lightning_attr.callbacks.recording import Recording, snapshot_bytes
from lightning_attr.callbacks.run_hooks import RunHooks
from lightning_attr.callbacks.schedule import SnapshotSchedule, epoch_limit, steps_of_an_epoch
from lightning_attr.data.loader import OrderedLoader
from lightning_attr.features.featurizer import AttributionPlan
from lightning_attr.features.learned_projection import learn_from
from lightning_attr.features.second_direction import featurizer_with, module_curvature
from lightning_attr.features.transfer import placed, samples_on_device
from lightning_attr.files.io import digest
from lightning_attr.objectives.objective import check_module
from lightning_attr.parameters.weights import weights_of
from lightning_attr.projectors import LearnedProjection, Projection
from lightning_attr.store.feature_dtype import row_bytes
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.lightning_names import both

_SECONDS = 2.0
"""For timing batches after the first."""
_BATCHES = 8


class CheckedRun(RunHooks):
    """Looks at a run before it starts, by what it does itself when a training starts.

    Args:
        on_error: as in :class:`RunHooks`.
        dirpath: likewise.
        log: likewise.
    """

    schedule: SnapshotSchedule

    def _request(self) -> RecordingRequest:
        raise NotImplementedError  # what is to be recorded, its subclass knows

    def check(
        self, model: L.LightningModule, datamodule: Any = None, *, train_dataloaders: Any = None, trainer: Any = None
    ) -> RunCheck:
        """Say what this callback would do in a run, and what it would cost, without training.

        A few samples go the whole way, some batches are timed, and the store of ``dirpath`` is compared with the run.
        The module, its data, the trainer, random streams and this callback stay as they are; nothing is written.

        Args:
            model: the module, as it would be passed to ``fit``.
            datamodule: gives the training data.
            train_dataloaders: the training loader, in place of the datamodule's.
            trainer: of the run, for its device, precision and number of epochs. By default one on one device, of a run
                whose epochs are not known; of one with several processes, one is tried.

        Returns:
            What was found; ``print`` shows it. What ``fit`` would refuse is in ``refused``, and not raised.

        Raises:
            TypeError: if an argument is of another class than its own.

        Example:
            >>> import lightning as L, torch
            >>> from torch.utils.data import DataLoader, TensorDataset
            >>> from lightning_attr.callbacks import AttributionCallback
            >>> class Regression(L.LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.layer = torch.nn.Linear(2, 1)
            ...     def training_step(self, batch, batch_idx):
            ...         return (self.layer(batch[0]) - batch[1]).square().mean()
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.1)
            >>> loader = DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 1)), batch_size=4)
            >>> check = AttributionCallback().check(Regression(), train_dataloaders=loader)
            >>> check.ok, [(layer.name, layer.path, layer.share) for layer in check.layers]
            (True, [('layer', 'hooks, in one pass', 1.0)])
        """
        check_datamodule("AttributionCallback.check", datamodule)
        if trainer is not None:
            check_instance("AttributionCallback.check", "trainer", trainer, both(L.Trainer), "a Trainer")
        request, read = self._request(), self._reads_features(trainer)
        found = RunCheck(type(model).__name__, type(request.method).__name__)
        look = _Look(request, self.schedule, self.dirpath, read, model, found)
        try:
            check_module(model)
            if trainer is not None:
                check_strategy(trainer.strategy)
                check_one_process(trainer.strategy)
            rehearse(trainer, model, datamodule, train_dataloaders, look)
        except Exception as error:  # told in the result, after what was found before it
            look.note(refused=describe(error), error=error)
        return look.found

    def _reads_features(self, trainer: Any) -> bool:
        """Whether something will read features while training."""
        callbacks, loggers = ([], []) if trainer is None else (trainer.callbacks, trainer.loggers)
        return any(getattr(one, "reads_features", False) for one in callbacks) or (self._report.log and bool(loggers))


@dataclass
class _Look:
    """What is called in the world of a fit, and finds one thing after the other."""

    request: RecordingRequest
    schedule: SnapshotSchedule
    dirpath: Path | None
    read: bool
    """Whether something reads features while training."""
    module: L.LightningModule
    found: RunCheck
    learning = 0.0
    """Seconds in which the projection of a snapshot is learned."""

    def __call__(self, trainer: L.Trainer) -> None:
        """Look at everything that ``fit`` looks at, and time some batches."""
        said: list[str] = []
        try:
            with heard(said):
                self._look(trainer)
        finally:
            self.note(notes=tuple(dict.fromkeys(said)))

    def _look(self, trainer: L.Trainer) -> None:
        module = self.module
        prepared = prepare(self.request, trainer, module, self.read)
        self.note(
            num_samples=len(prepared.source),
            mode=prepared.mode,
            device=str(trainer.strategy.root_device),
            featurizes=prepared.featurize,
            weight_bytes=snapshot_bytes(module, self.request.optimizer_state) + prepared.basis_bytes,
            snapshots=self.schedule.count(epoch_limit(trainer), steps_of_an_epoch(trainer)) or None,
        )
        with beside_training(trainer, module, prepared.source, prepared.mode, None, dict):
            plan, projection = self._projection(trainer, prepared)
            self.note(layers=checked_layers(module, plan, projection))
            if prepared.method.projector is not None:
                self._time(trainer, prepared, plan, projection)
        self._store(prepared)

    def note(self, **values: Any) -> None:
        self.found = replace(self.found, **values)

    def _projection(self, trainer: L.Trainer, prepared: Preparation) -> tuple[AttributionPlan, Projection]:
        """Of the first snapshot, where it learns from samples as well."""
        module = self.module
        (layout, plan), state = prepared.plans.current(), self.request.state(trainer, module)
        projection = prepared.method.projection_at(layout, "", lambda: state)
        if isinstance(projection, LearnedProjection):
            samples = samples_on_device(trainer, module, getattr(trainer, "datamodule", None), prepared.source)
            begun = time.perf_counter()
            learn_from(projection, module, plan, samples, "", trainer.precision_plugin.forward_context)
            self.learning = time.perf_counter() - begun
        return plan, projection

    def _time(self, trainer: L.Trainer, prepared: Preparation, plan: AttributionPlan, projection: Projection) -> None:
        """Featurize batches until some seconds are over; the first is none of them, as it warms up."""
        source, feature_dtype = prepared.source, self.request.feature_dtype
        directions = prepared.method.second_directions(module_curvature(self.module))
        settings = (projection, prepared.memory, "", directions, len(source))
        featurizer = featurizer_with(self.module, plan, *settings)
        batches = source.batches(range(len(source)))
        batches = (batches * 2 if len(batches) == 1 else batches)[: _BATCHES + 1]
        device, datamodule = trainer.strategy.root_device, getattr(trainer, "datamodule", None)
        ends, begun = [], time.perf_counter()
        for rows, batch in OrderedLoader(source, batches):
            converted = trainer.precision_plugin.convert_input(batch)
            on_device = placed(converted, rows, self.module, datamodule, device, source)
            with trainer.precision_plugin.forward_context():
                columns = featurizer(on_device, rows)
            per_row = row_bytes({name: values.cpu() for name, values in columns.items()}, feature_dtype)
            ends.append((time.perf_counter(), len(rows)))
            if ends[-1][0] - begun > _SECONDS and len(ends) > 1:
                break
        rows_timed = sum(count for _, count in ends[1:])
        seconds = (ends[-1][0] - ends[0][0]) / rows_timed * len(source)
        self.note(seconds=self.learning + seconds, feature_bytes=per_row * len(source))

    def _store(self, prepared: Preparation) -> None:
        """Compare the store that is there, and see what its disk has left."""
        if self.dirpath is None:
            return
        path = self.dirpath.absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        self.note(store=path, free_bytes=shutil.disk_usage(there).free)
        if FeatureStore.exists(path):
            store, started = FeatureStore.open(path, writer=False), digest(weights_of(self.module))
            Recording().check(store, prepared.fingerprint(self.module), started, self.request.feature_dtype)
