"""The registry of rules, and what holds for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import check_gradients
from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import (
    OuterSum,
    ParameterGradient,
    gradient_rule,
    hooked_gradients,
    hooked_layers,
    rule_for,
    supported_layers,
)
from lightning_attr.gradients.rules import check_layers, forward_for

B = 3


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False), nn.BatchNorm1d(4, affine=False)],
)
def test_a_layer_without_parameters_has_nothing_to_hook(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))
    assert list(hooked_layers(module)) == [module[0], module[2]]
    check_gradients(module, torch.randn(B, 4))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 2), torch.ones(B, 4)),
        (nn.Conv1d(2, 2, 3), torch.ones(B, 2, 5)),
        (nn.LayerNorm(4), torch.arange(12.0).reshape(B, 4).sin()),
        (nn.GroupNorm(2, 4), torch.arange(12.0).reshape(B, 4).sin()),
        (nn.BatchNorm1d(4), torch.ones(B, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_partly_frozen(layer: nn.Module, x: Tensor, frozen: str) -> None:
    layer.get_parameter(frozen).requires_grad_(False)
    check_gradients(layer, x)
    layer.get_parameter(frozen).requires_grad_(True)


@pytest.mark.parametrize("train_mode", [True, False])
def test_batch_norm_that_mixes_samples_is_refused_by_name(train_mode: bool) -> None:
    module = nn.Sequential(
        nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=train_mode))
    )
    module.train(train_mode)
    state = "is in train mode" if train_mode else r"has no running statistics \(track_running_stats=False\)"
    with pytest.raises(UnsupportedLayerError, match=rf"`1\.0` \(BatchNorm1d\) {state}.*module\.eval\(\)"):
        check_layers(module)
    with pytest.raises(UnsupportedLayerError, match=r"`1\.0` \(BatchNorm1d\)"):
        hooked_gradients(module, lambda: module(torch.randn(B, 2)).sum(1), B, ["0.weight"], lambda name, g: None)


@pytest.mark.parametrize("argument", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_without_per_sample_gradient_is_refused_by_name(argument: dict[str, float]) -> None:
    module = nn.Sequential(nn.Embedding(3, 2, **argument))
    with pytest.raises(UnsupportedLayerError, match=r"`0` \(Embedding\).*`max_norm` or `scale_grad_by_freq`"):
        check_layers(module)
    module[0].weight.requires_grad_(False)
    check_layers(module)  # a frozen table is only looked up


def test_a_layer_in_a_good_state_passes() -> None:
    check_layers(nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.Embedding(3, 2)).eval())


def test_subclasses_share_the_rule_unless_they_override_forward() -> None:
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Named(1, 1)) is rule_for(nn.Linear(1, 1))
    assert rule_for(Doubled(1, 1)) is None


def test_register_a_rule() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    def scale(layer: Scale, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        return {"weight": activations * backprops}

    assert gradient_rule(Scale)(scale) is scale
    assert gradient_rule(Scale)(scale) is scale  # the same rule twice is no conflict
    assert Scale in supported_layers()
    check_gradients(Scale(), torch.randn(B, 5))

    def another(layer: Scale, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        return {"weight": OuterSum(backprops, activations)}

    with pytest.raises(ValueError, match="Scale already has the gradient rule `scale`; registering `another`"):
        gradient_rule(Scale)(another)
    assert gradient_rule(Scale, replace=True)(another) is another
    assert rule_for(Scale()) is another
    assert gradient_rule(Scale, replace=True)(scale) is scale
    assert rule_for(Scale()) is scale


def test_a_conflict_leaves_every_rule_as_it_was() -> None:
    class New(nn.Linear):
        pass

    linear = rule_for(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"Linear already has the gradient rule `linear`.*Pass `replace=True`"):
        gradient_rule(New, nn.Linear)(lambda layer, activations, backprops: {})
    assert New not in supported_layers()
    assert rule_for(nn.Linear(1, 1)) is linear


def test_register_a_rule_by_qualified_name() -> None:
    class Elsewhere(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    name = f"{Elsewhere.__module__}.{Elsewhere.__qualname__}"
    assert rule_for(Elsewhere(2, 1)) is None
    linear = rule_for(nn.Linear(1, 1))
    gradient_rule(name)(linear)
    assert rule_for(Elsewhere(2, 1)) is linear
    assert name in supported_layers()
    check_gradients(Elsewhere(4, 2), torch.randn(B, 4))
    with pytest.raises(ValueError, match="Elsewhere already has the gradient rule `linear`"):
        gradient_rule(name)(lambda layer, activations, backprops: {})


def test_explicit_forwards_are_shared_by_subclasses_unless_they_override_forward() -> None:
    class Named(nn.MultiheadAttention):
        pass

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor) -> Tensor:
            return super().forward(*args)

    assert forward_for(Named(2, 1)) is forward_for(nn.MultiheadAttention(2, 1))
    assert forward_for(Own(2, 1)) is None
    assert {nn.MultiheadAttention, nn.EmbeddingBag} <= set(supported_layers())
