"""Small modules and data that test files share."""

from __future__ import annotations

import ast
import atexit
import importlib.util
import inspect
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.gradients import ParameterGradient, hooked_gradients, hooked_layers, materialise
from lightning_attr.user_code.written_tensors import WrittenTensors


def _converts_under_modes() -> bool:
    class Subclass(Tensor):
        pass

    try:
        with WrittenTensors([]):
            torch.ones(1).as_subclass(Subclass)
    except RuntimeError:  # "... but the raw Tensor object is already associated to a python object"
        return False
    return True


needs_subclasses_under_modes = pytest.mark.skipif(
    not _converts_under_modes(), reason="this torch converts to no subclass while a mode sees its operations"
)
"""Torch 2.5 is one."""

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}


def quiet_trainer(kind: type[L.Trainer] = AttributionTrainer, **settings: Any) -> Any:
    """A trainer on the CPU that prints and writes nothing."""
    return kind(**{**QUIET, **settings})


class PlainClassifier(L.LightningModule):
    """A step without the mixin, on :func:`blobs`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def leave_group_at_exit() -> None:
    """Let a process leave its process group before the interpreter ends, as Lightning does it for NCCL alone.

    Otherwise a thread of gloo may still hold a tensor then, and torch ends the process with SIGABRT, rarely.
    """

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def blobs(n: int, seed: int = 0, classes: int = 3, size: int = 4) -> TensorDataset:
    """Points around one centre per class; the centres are those of every seed."""
    centres = 2 * torch.randn(classes, size, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    y = torch.randint(classes, (n,), generator=generator)
    return TensorDataset(centres[y] + torch.randn(n, size, generator=generator), y)


class BlobClassifier(AttributionMixin, L.LightningModule):
    """A small MLP for :func:`blobs`."""

    def __init__(self, size: int = 4, classes: int = 3, seed: int = 0, learning_rate: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, classes))
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def loader_of(dataset: Any, batch_size: int = 8, **settings: Any) -> DataLoader[Any]:
    """A loader of a data set."""
    return DataLoader(dataset, batch_size=batch_size, **settings)


@contextmanager
def child(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run a function of a test file in a process of its own, to be killed; it is gone in the end."""
    # Not "fork": a copy of a process whose torch has started threads may wait for one of them for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_attr", "pytest"])
    target = (inspect.getfile(function), function.__name__, arguments)
    process = context.Process(target=_run_function, args=target)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run_function(file: str, name: str, arguments: tuple[Any, ...]) -> None:
    """Test files are no modules that a new process could import by name."""
    spec = importlib.util.spec_from_file_location("test_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own up
    spec.loader.exec_module(module)
    getattr(module, name)(*arguments)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.002)


@contextmanager
def told(match: str) -> Iterator[None]:
    """Expect one warning that matches; others, of Lightning, do not matter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if re.search(match, text, re.DOTALL)]) == 1, texts


class LayersOf(nn.Module):
    """One value a sample from layers and a function that runs them: ``run(module, x)``."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.run(self, x).flatten(1)
        return (flat.sin() * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


class DoubledLinear(nn.Linear):
    """A forward function of its own, which no rule covers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LinearWithGain(nn.Linear):
    """A parameter that the rule of its base does not know; what calls the layer applies it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs))


class StandardisedConv(nn.Conv1d):
    """The base's forward function, and another computation inside it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def position_weighted(outputs: Tensor) -> Tensor:
    """One value a sample, not linear in the outputs, different for every position."""
    flat = outputs.reshape(len(outputs), -1)
    return (flat.sin() * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


def check_gradients(layer: nn.Module, *inputs: Tensor, b: int = 3) -> None:
    """Hooks against autograd, one sample after the other, in float64; inputs of one row are shared by the samples."""
    layer = layer.double().eval()
    rows_of = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: ParameterGradient) -> None:
        found[name] = found.get(name, 0) + materialise(gradient, tuple(trainable[name].shape))

    names = [name for own in hooked_layers(layer).values() for name in own.values()]
    output = hooked_gradients(layer, lambda: position_weighted(layer(*rows_of)), b, names, add)
    assert output.shape == (b,)
    rows = []
    for i in range(b):
        one = [x[i : i + 1] if len(x) == b else x for x in rows_of]
        value = position_weighted(layer(*one))[0]
        torch.testing.assert_close(output[i], value.detach(), rtol=1e-12, atol=1e-12)
        rows.append(torch.autograd.grad(value, list(trainable.values())))
    assert found.keys() == trainable.keys()
    for name, *expected in zip(trainable, *rows, strict=True):
        assert all(row.abs().sum() > 0 for row in expected), name
        message = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], torch.stack(expected), rtol=1e-10, atol=1e-12, msg=message)


class Tally:
    """A list in a file: what a module, data set or test keeps in variables, attribution puts back."""

    def __init__(self) -> None:
        self.file = Path(tempfile.mkdtemp()) / "tally"
        self.file.touch()

    def append(self, entry: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{entry!r}\n")

    def clear(self) -> None:
        self.file.write_text("")

    def __iter__(self) -> Iterator[Any]:
        return (ast.literal_eval(line) for line in self.file.read_text().splitlines())
