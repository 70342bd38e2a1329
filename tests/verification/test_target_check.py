"""A target function that cannot be right is named before any target is attributed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError
from lightning_attr.methods import TRAK, Influence

TARGETS = blobs(9, seed=1)
COPY = BlobClassifier(seed=3)


def measure(function: Any, method: Any = None) -> Any:
    return quiet_trainer().attribute(
        model=BlobClassifier(),
        train_dataloaders=loader_of(blobs(24)),
        target_dataloaders=loader_of(TARGETS),
        method=method or TRAK(8),
        target_function=function,
    )


def logit(module: Any, batch: Any) -> Tensor:
    return module(batch[0])[:, 0]


def lost(module: Any, batch: Any) -> Tensor:
    return logit(module, batch).detach().requires_grad_()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a graph that begins after the module": (lost, ValueError, r"none of its 4 trainable parameters has a part .*zero"),
    "a copy of the module": (lambda module, batch: logit(COPY, batch), ValueError, "Use the module that .* is given"),
    "a mean over the batch": (
        lambda module, batch: logit(module, batch) - logit(module, batch).mean(),
        BatchDependenceError,
        r"another value beside others: 4 targets in one batch and one by one differ by up to .* over dimension 0",
    ),
    "one mean for all": (lambda module, batch: logit(module, batch).mean(), ValueError, r"\(4,\), but got \(\)"),
    "the mean, repeated": (
        lambda module, batch: logit(module, batch).mean().expand(len(batch[0])),
        BatchDependenceError,
        "beside others",
    ),
    "classes": (lambda module, batch: module(batch[0]).argmax(1), ValueError, r"floating-point .*got torch\.int64"),
    "hits": (lambda module, batch: module(batch[0]).argmax(1) == batch[1], ValueError, r"got torch\.bool"),
    "complex numbers": (lambda module, batch: logit(module, batch) * 1j, ValueError, r"got torch\.complex64"),
    "NaN": (
        lambda module, batch: (logit(module, batch) / (batch[0] - TARGETS[2][0]).abs().sum(1)).log(),
        NonFiniteGradientError,
        r"`target_function` returned NaN or Inf for targets \[.*Look at dataset\[",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", [TRAK(8), Influence(solver="explicit", damping=0.1)], ids=["features", "module"])
def test_what_cannot_be_attributed_is_named(name: str, method: Any) -> None:
    function, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        measure(function, method)


def test_a_gradient_of_zero_is_told(caplog: pytest.LogCaptureFixture) -> None:
    result = measure(lambda module, batch: logit(module, batch).round())
    assert not result.scores.values.any()
    assert "`target_function` has a gradient of exactly zero in all that BlobClassifier trains" in caplog.text
    assert "dataset[0], dataset[2], dataset[5], dataset[8]" in caplog.text


def test_a_single_target_and_a_good_function_pass(caplog: pytest.LogCaptureFixture) -> None:
    module = copy.deepcopy(COPY)
    scores = quiet_trainer().attribute(
        model=module,
        train_dataloaders=loader_of(blobs(24)),
        target_dataloaders=loader_of(torch.utils.data.Subset(TARGETS, [4])),
        method=TRAK(8),
        target_function=logit,
    )
    assert scores.scores.shape == (24, 1)
    assert "target_function" not in caplog.text
