"""Steps of optimizers as functions: torch's own, to the last bit, and differentiable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.replay.optimizer_forms import Clipping, GroupForm, updated
from lightning_attr.replay.state import RunState

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "betas": (0.5, 0.8)}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "eps": 1e-3, "maximize": True}),
]
CLIPPINGS = [None, Clipping(0.5, "norm"), Clipping(0.1, "value"), Clipping(1e3, "norm")]


def form_of(optimizer: torch.optim.Optimizer, number: int, names: tuple[str, ...]) -> GroupForm:
    group = optimizer.param_groups[number]
    return GroupForm(type(optimizer).__name__, names, group["lr"], group["weight_decay"], group)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_is_torchs_own_step(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, clipping: Clipping | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    own = {name: torch.randn(4, 3, dtype=dtype, generator=draw).requires_grad_() for name in "abc"}
    groups = [{"params": [own["a"]], "lr": 0.3}, {"params": [own["b"], own["c"]]}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.1, foreach=False, **settings)
    state = RunState.begin({name: p.detach().clone() for name, p in own.items()}, {})
    for step in range(6):
        optimizer.param_groups[1]["lr"] = 0.1 / (step + 1)
        gradients = {name: torch.randn(4, 3, dtype=dtype, generator=draw) for name in "abc"}
        if step % 2:
            del gradients["c"]  # not used in this step
        forms = [form_of(optimizer, 0, ("a",)), form_of(optimizer, 1, ("b", "c"))]
        state = updated(state, gradients, forms, clipping)
        for name, p in own.items():
            p.grad = gradients[name].clone() if name in gradients else None
        if clipping is not None:
            clip = torch.nn.utils.clip_grad_norm_ if clipping.algorithm == "norm" else torch.nn.utils.clip_grad_value_
            clip(own.values(), clipping.value)
        optimizer.step()
    for name, p in own.items():
        assert torch.equal(state.parameters[name], p.detach())


@pytest.mark.parametrize("clipping", CLIPPINGS[:2], ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_the_derivative_of_two_steps_is_that_of_differences(
    kind: str, settings: dict[str, Any], clipping: Clipping | None
) -> None:
    draw = torch.Generator().manual_seed(1)
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, **settings}
    form = GroupForm(kind, ("p",), 0.1, settings.get("weight_decay", 0.0), settings)

    def after(p: Tensor, gradients: Tensor) -> Tensor:
        state = RunState.begin({"p": p}, {})
        for gradient in gradients:
            state = updated(state, {"p": gradient}, [form], clipping)
        return state.parameters["p"]

    p, gradients = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in [(3,), (2, 3)])
    assert torch.autograd.gradcheck(after, (p.requires_grad_(), gradients.requires_grad_()))


def test_adam_has_finite_derivatives_where_the_gradient_was_always_zero() -> None:
    form = GroupForm("Adam", ("p",), 0.1, 0.0, {"betas": (0.9, 0.99), "eps": 1e-3})
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    after = updated(RunState.begin({"p": torch.zeros(2, dtype=torch.float64)}, {}), {"p": gradient}, [form])
    (slope,) = torch.autograd.grad(after.parameters["p"].sum(), gradient)
    torch.testing.assert_close(slope[0].item(), -0.1 / 1e-3)  # lr / eps: the step is g / (|g| + eps)
    assert slope.isfinite().all()
