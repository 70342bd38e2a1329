"""What has to hold for a package that nobody here wrote: training untouched, copies found, exact gradients right.

A test file says in ``train(callbacks)`` how a user of its package trains, with the callbacks among the Trainer's, and
returns the Trainer. The rest is the same for all.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import GradCos, GradDot

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}


def train_both(train: Callable[[list[Any]], Any], **arguments: Any) -> Any:
    """Train without the callback and with it, and compare to the last bit; give the trainer that had it."""
    plain = _seeded(train, [])
    plain_state = _state(plain)
    trainer = _seeded(train, [AttributionCallback("attribution", **arguments)])
    state = _state(trainer)
    assert plain_state.keys() == state.keys()
    changed = [name for name in state if not _equal(plain_state[name], state[name])]
    assert not changed, f"the callback changed {changed}"
    assert trainer.global_step > 0
    return trainer


def check_scores(
    trainer: Any,
    rows: Sequence[int],
    ones: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    mode: str = "eval",
    **attribute: Any,
) -> None:
    """Check the scores of planted targets: ``rows`` are the training rows that they are copies of.

    ``ones`` holds every training sample as a batch of one. ``loss`` is the loss of one, by default the training step's,
    in ``mode``. What else ``trainer.attribute`` takes comes as keywords.
    """
    rows = list(rows)
    usual = trainer.attribute(**attribute).scores.values
    assert usual.isfinite().all()
    cosines = trainer.attribute(method=GradCos(), **attribute).scores.values
    assert usual.shape == cosines.shape
    assert cosines.shape[1] == len(rows)
    assert cosines.argmax(0).tolist() == rows
    dots = trainer.attribute(method=GradDot(exact=True), **attribute).scores.values
    gradients = per_sample_gradients(trainer.lightning_module, ones, loss or step_loss, mode)
    expected = gradients @ gradients[rows].T
    assert dots.shape == expected.shape
    error = ((dots.double() - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-3, f"exact Grad-Dot is off by {error:.3g} of its largest value"


def per_sample_gradients(
    module: Any, ones: Iterable[Any], loss: Callable[[Any, Any], Tensor], mode: str = "eval"
) -> Tensor:
    """Gradient of each sample's loss by autograd, one after the other: (n, p), float64.

    In train mode BatchNorm keeps its statistics, as those of one sample are none.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    training = {m: m.training for m in module.modules()}
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    module.train(mode == "train")
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    rows = []
    for batch in ones:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(module, batch), parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]).double())
        module.load_state_dict(weights)  # a step may move an averaged copy of the model
    for m, mode in training.items():
        m.training = mode
    return torch.stack(rows)


def step_loss(module: Any, batch: Any) -> Tensor:
    """The loss of the module's own training step in the last epoch of its training, with nothing logged."""
    kind, trainer = type(module), module.trainer
    epoch, stage = trainer.current_epoch - 1, trainer.state.stage
    trainer.training = True
    arguments = (batch, 0)[: len(inspect.signature(module.training_step).parameters)]
    silenced = mock.patch.object(kind, "log"), mock.patch.object(kind, "log_dict")
    with silenced[0], silenced[1], mock.patch.object(kind, "current_epoch", epoch):
        found = module.training_step(*arguments)
    trainer.state.stage = stage
    return found["loss"] if isinstance(found, Mapping) else found


def _seeded(train: Callable[[list[Any]], Any], callbacks: list[Any]) -> Any:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - what packages draw from
    torch.manual_seed(1)
    return train(callbacks)


def _state(trainer: Any) -> dict[str, Any]:
    module = trainer.lightning_module
    state: dict[str, Any] = {f"weight {name}": p for name, p in module.named_parameters()}
    state |= {f"buffer {name}": b for name, b in module.named_buffers()}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {i} {j} {name}": value for name, value in values.items()}
    state |= {f"metric {name}": value for name, value in trainer.callback_metrics.items()}
    state = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in state.items()}
    numpy_state = np.random.get_state()  # noqa: NPY002
    state["random torch"] = torch.get_rng_state()
    state["random numpy"] = torch.from_numpy(numpy_state[1].astype(np.int64)), numpy_state[2:]
    state["random python"] = random.getstate()
    return state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
