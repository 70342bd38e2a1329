"""Many models trained at once, like a pilot: their parameters are stacked, and one step is one for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics import Metric, MetricCollection

from lightning_attr.batches.nested import replace_tensors
from lightning_attr.data.loader import DataSource
from lightning_attr.data.memory import free_bytes, peak_bytes
from lightning_attr.data.sample_errors import read_sample
from lightning_attr.evaluation.loaders import subset_loader
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.targets import outputs_at
from lightning_attr.evaluation.train_one import seed_training
from lightning_attr.evaluation.vectorised.reference_run import NotVectorisableError, Pilot, state_of
from lightning_attr.features.transfer import to_device
from lightning_attr.gradients.functional import call_with
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.user_code.generators import find_generators
from lightning_attr.user_code.lightning_names import both, own

_SHARE = 0.25
"""Of the free memory, for the training data and for the models, each: other processes may do the same."""


class Stack:
    """Trains models at once as a pilot was trained; to be used in ``isolated``.

    Args:
        pilot: the pilot; its module becomes the form that all models are run through.
        make_module: makes a module.

    Raises:
        NotVectorisableError: if that is not possible.

    Example:
        >>> from lightning_attr.evaluation.train_one import LightningRetraining, isolated
        >>> class Mean(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.mean - batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        ...     def train_dataloader(self):
        ...         return DataLoader(torch.tensor([1.0, 2.0, 6.0]), batch_size=2)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> one = LightningRetraining(Mean, trainer, None, "train")
        >>> kept, other = torch.tensor([True, True, False]), torch.tensor([False, True, True])
        >>> with isolated(verbose=False):
        ...     pilot = Pilot.train(one, Retraining(0, 0, 5), kept, lambda: None)
        ...     stack = Stack(pilot, Mean)
        ...     _, outputs = stack.train([(Retraining(1, 0, 6), other)], lambda: None, check=False)
        >>> outputs  # the mean of 2 and 6, and minus its squared distances
        tensor([[-9., -4., -4.]])
    """

    def __init__(self, pilot: Pilot, make_module: Callable[[], L.LightningModule]) -> None:
        pilot.check_kind()
        self.pilot, self.make_module = pilot, make_module
        fitted = pilot.fitted
        self.module, self.trainer = fitted.module, fitted.trainer
        self.device, self.precision = self.trainer.strategy.root_device, self.trainer.precision_plugin
        batch = _read(fitted.train, self.device)
        self.batch = to_device(self.precision.convert_input(batch), self.module, fitted.datamodule, self.device)
        self.tensors: list[Tensor] = tree_leaves(self.batch)
        self.trainable = {name for name, p in self.module.named_parameters() if p.requires_grad}
        _silence(self.module, self.trainer)

    def fitting(self) -> int:
        """Say how many models fit into memory."""
        free = free_bytes(self.device)
        if free is None:
            return 2**31
        state = self._initial([self.pilot.retraining])
        rows = self._rows([(self.pilot.retraining, self.pilot.kept)], 1)[0]
        with self._training():
            step = peak_bytes(lambda: self._losses(state, 0, rows).sum().backward())
        size = step + 4 * sum(tensor.nbytes for tensor in state.values())  # with gradients and two moments
        if (count := int(_SHARE * free) // size) < 2:
            raise NotVectorisableError(f"two models need {2 * size:,} bytes, and {int(_SHARE * free):,} are to spend")
        return count

    def train(
        self, group: Sequence[tuple[Retraining, Tensor]], beat: Callable[[], None], check: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Train models, and compute their outputs.

        Shapes: group (n_train,). Returns name -> weights or buffer of every model ``(len(group), ...)``, and their
        outputs ``(len(group), n_target)``; NaN or Inf where training diverged.
        """
        pilot = self.pilot
        state = self._initial([retraining for retraining, _ in group])
        rows = self._rows(group, pilot.steps)
        optimizer = self._optimizer(state)
        before = _streams()
        with self._training():
            for step, (options, chosen) in enumerate(zip(pilot.recorder.options, rows, strict=True)):
                for own, recorded in zip(optimizer.param_groups, options, strict=True):
                    own.update(recorded)
                optimizer.zero_grad()
                self._losses(state, step % self.batches_per_epoch, chosen).sum().backward()
                optimizer.step()
                beat()
                if check:
                    pilot.check_state(step + 1, {name: tensor[0].detach() for name, tensor in state.items()})
        if _streams() != before:
            raise NotVectorisableError("its training step draws random numbers")
        state = {name: tensor.detach() for name, tensor in state.items()}
        outputs = self._outputs(state, beat)
        if check:
            pilot.check_outputs(outputs[0])
        return state, outputs

    @property
    def batches_per_epoch(self) -> int:
        """How many batches the Trainer takes of its loader."""
        return int(self.trainer.num_training_batches)

    def load(self, state: dict[str, Tensor], model: int) -> None:
        """Put the weights of a model into the pilot's module."""
        with torch.no_grad():
            for name, tensor in state_of(self.module).items():
                tensor.copy_(state[name][model])

    # Parts ------------------------------------------------------------------------------------------------------------

    def _initial(self, group: Sequence[Retraining]) -> dict[str, Tensor]:
        """Initialise each model from its own seed, as it would be alone."""
        shapes = {name: tensor.shape for name, tensor in state_of(self.module).items()}
        columns: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for retraining in group:
            L.seed_everything(retraining.seed, verbose=False)
            found = state_of(self.precision.convert_module(self.make_module()))
            if {name: tensor.shape for name, tensor in found.items()} != shapes:
                raise NotVectorisableError("the function `module` makes models whose parameters differ in shape")
            for name, tensor in found.items():
                columns[name].append(tensor.detach())
        state = {name: torch.stack(column).to(self.device) for name, column in columns.items()}
        for name in self.trainable:
            state[name].requires_grad_()
        return state

    def _rows(self, group: Sequence[tuple[Retraining, Tensor]], steps: int) -> list[Tensor]:
        """List the rows of each step's batch, ``(len(group), b)``, in the order in which loaders would give them."""
        found = []
        for retraining, kept in group:
            loader = _loader_of_rows(self.pilot.fitted.train.loader, kept)
            restores = seed_training(loader, retraining)
            found.append(list(islice(_forever(loader, self.batches_per_epoch), steps)))
            for restore in restores:
                restore()
        columns = list(zip(*found, strict=True))
        if any(len(batch) != len(column[0]) for column in columns for batch in column):
            raise NotVectorisableError("batches of the same step differ in size")
        return [torch.from_numpy(np.stack(column)).to(self.device) for column in columns]

    def _optimizer(self, state: dict[str, Tensor]) -> torch.optim.Optimizer:
        single = self.trainer.optimizers[0]
        names = {id(p): name for name, p in self.module.named_parameters()}
        groups = []
        for group, options in zip(single.param_groups, self.pilot.recorder.options[0], strict=True):
            groups.append({**options, "params": [state[names[id(p)]] for p in group["params"]]})
        kind: Any = type(single)
        optimizer: torch.optim.Optimizer = kind(groups)
        return optimizer

    def _losses(self, state: dict[str, Tensor], batch_idx: int, rows: Tensor) -> Tensor:
        """Compute the loss of each model on its batch, ``(len(group),)``."""
        n = len(self.tensors[0])

        def loss(own: dict[str, Tensor], *tensors: Tensor) -> Tensor:
            batch = replace_tensors(self.batch, n, tensors)
            found: Tensor = call_with(self.module, own, partial(_call_step, self.module, batch_idx), batch)
            return found.reshape(())

        try:
            losses: Tensor = vmap(loss)(state, *(tensor[rows] for tensor in self.tensors))
        except Exception as error:  # whatever the user's step raises under vmap
            raise NotVectorisableError(
                f"`training_step` of {type(self.module).__name__} does not run under torch.func.vmap: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            ) from error
        return losses

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Train mode, as the pilot was in, and no kernels that vmap can not run at once."""
        for layer, mode in self.pilot.recorder.modes:
            layer.training = mode
        context = self.precision.train_step_context()
        with context, torch.enable_grad(), plain_execution(), sdpa_kernel(SDPBackend.MATH):
            yield

    def _outputs(self, state: dict[str, Tensor], beat: Callable[[], None]) -> Tensor:
        fitted = self.pilot.fitted
        count = len(next(iter(state.values())))
        finite = [all(bool(tensor[model].isfinite().all()) for tensor in state.values()) for model in range(count)]
        loads = [partial(self.load, state, model) for model in range(count) if finite[model]]
        outputs = torch.full((count, len(fitted.targets)), torch.nan)
        if loads:
            found = outputs_at(self.trainer, self.module, fitted.datamodule, fitted.targets, loads, beat, fitted.train)
            outputs = outputs.to(found.dtype)
            outputs[torch.tensor(finite)] = found
        return outputs


def _call_step(module: L.LightningModule, batch_idx: int, batch: Any) -> Tensor:
    step: Callable[..., Any] = module.training_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    returned = step(batch, batch_idx) if takes_index else step(batch)
    loss = returned["loss"] if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise TypeError(f"it returned {type(loss).__name__} and no loss")
    return loss


def _silence(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Let what the pilot's module reports lead nowhere from now on: it is under vmap that it is called."""
    for inner in module.modules():
        if isinstance(inner, both(L.LightningModule)):
            vars(inner).update(log=_nothing, log_dict=_nothing, print=_nothing)
        elif isinstance(inner, (Metric, MetricCollection)):
            vars(inner).update(forward=_nothing, update=_nothing)
    trainer.loggers = [own(DummyLogger, trainer)()]  # not none at all: steps write to `self.logger.experiment`


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of what a step reports with."""


# Data -----------------------------------------------------------------------------------------------------------------


def _read(source: DataSource, device: torch.device) -> Any:
    """Read all samples into one batch, if a batch is nothing but its samples."""
    dataset, collate, n = source.dataset, source.loader.collate_fn, len(source)
    free, before = free_bytes(device), _streams(dataset)
    first = collate([read_sample(dataset, 0)])
    leaves = tree_leaves(first)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 for leaf in leaves):
        raise NotVectorisableError("a batch holds more than tensors whose first dimension is the batch")
    size = n * sum(leaf.nbytes for leaf in leaves)
    if free is not None and size > _SHARE * free:
        raise NotVectorisableError(f"the training data take {size:,} bytes, and {int(_SHARE * free):,} are to spend")
    samples = [read_sample(dataset, row) for row in range(n)]
    batch = collate(samples)
    rows = sorted({0, n // 2, n - 1})
    few = collate([samples[row] for row in rows])
    if _streams(dataset) != before:
        raise NotVectorisableError("training samples are random, and differ from epoch to epoch")
    pairs = zip(tree_leaves(batch), tree_leaves(few), strict=True)
    if not all(len(leaf) == n and torch.equal(leaf[rows], other) for leaf, other in pairs):
        raise NotVectorisableError("what `collate_fn` makes of a sample depends on the others in the batch")
    return batch


class _Rows(Dataset[int]):
    """Row numbers in the place of samples, a batch at a time."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = np.array(rows)

    def __getitems__(self, positions: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self.rows[positions]

    def __len__(self) -> int:
        return len(self.rows)


def _loader_of_rows(loader: DataLoader[Any], kept: Tensor) -> DataLoader[Any]:
    """Make the loader of a subset that gives row numbers, and draws the same random numbers."""
    found = subset_loader(loader, kept)
    subset: Any = found.dataset
    assert isinstance(subset, Subset)
    vars(found).update(dataset=_Rows(subset.indices), collate_fn=_same, num_workers=0, pin_memory=False, timeout=0)
    return found


def _same(rows: Any) -> Any:
    return rows


def _forever(loader: DataLoader[Any], batches: int) -> Iterator[Any]:
    while True:
        yield from islice(loader, batches)


def _streams(*data: object) -> list[Any]:
    """Read the states of all random streams, to see whether anything draws from them."""
    found: list[Any] = [random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()]  # noqa: NPY002 - the legacy stream
    for generator in (generator for item in data for generator in find_generators(item)):
        if isinstance(generator, np.random.Generator):
            found.append(repr(generator.bit_generator.state))
        elif isinstance(generator, torch.Generator):
            found.append(generator.get_state().tolist())
        else:
            found.append(repr(generator.getstate() if isinstance(generator, random.Random) else generator.get_state()))
    return found
