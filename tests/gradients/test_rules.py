"""Every rule against autograd, one sample after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import (
    OuterSum,
    ParameterGradient,
    gradient_rule,
    hooked_gradients,
    hooked_layers,
    materialise,
    rule_for,
    supported_layers,
)
from lightning_attr.gradients.rules import check_layers

B = 3


def _score(outputs: Tensor) -> Tensor:
    """One value a sample, not linear in the outputs, different for every position."""
    flat = outputs.flatten(1)
    return (flat.sin() * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


def _hooked(layer: nn.Module, x: Tensor, b: int = B) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: ParameterGradient) -> None:
        found[name] = found.get(name, 0) + materialise(gradient, tuple(layer.get_parameter(name).shape))

    names = [name for own in hooked_layers(layer).values() for name in own.values()]
    output = hooked_gradients(layer, lambda: _score(layer(x)), b, names, add)
    assert output.shape == (b,)
    return found


def _loop(layer: nn.Module, x: Tensor, b: int = B) -> dict[str, Tensor]:
    trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    rows = []
    for i in range(b):
        one = x[i : i + 1] if len(x) == b else x
        rows.append(torch.autograd.grad(_score(layer(one))[0], list(trainable.values())))
    return {name: torch.stack(columns) for name, columns in zip(trainable, zip(*rows, strict=True), strict=True)}


def _check(layer: nn.Module, x: Tensor) -> None:
    layer = layer.double().eval()
    x = x.double() if x.dtype.is_floating_point else x
    found, expected = _hooked(layer, x), _loop(layer, x)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert rows.abs().sum() > 0
        torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [(), (4,), (2, 3)])
def test_linear(between: tuple[int, ...], bias: bool) -> None:
    _check(nn.Linear(5, 2, bias=bias), torch.randn(B, *between, 5))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution(dims: int, bias: bool, groups: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    sizes, kernel = (9, 8, 7)[:dims], (3, 2, 1)[:dims]
    module = layer(4, 8, kernel, stride=(2, 1, 3)[:dims], dilation=(2, 1, 1)[:dims], groups=groups, bias=bias)
    _check(module, torch.randn(B, 4, *sizes))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's word on its own speed
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_convolution_padding(dims: int, mode: str, padding: str | int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    padding = padding if isinstance(padding, str) else (2, 1, 0)[:dims]
    kernel = (4, 3, 2)[:dims]  # even: "same" pads one more after than before
    _check(layer(2, 4, kernel, padding=padding, padding_mode=mode, groups=2), torch.randn(B, 2, *(5, 6, 4)[:dims]))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolution_same_with_dilation(mode: str) -> None:
    _check(nn.Conv2d(2, 2, (2, 3), padding="same", dilation=(3, 2), padding_mode=mode), torch.randn(B, 2, 7, 8))


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("ids", [[0, 2, 2], [[0, 1, 1, 2], [3, 3, 3, 3], [1, 2, 0, 0]]])
def test_embedding(ids: list[int], padding_idx: int | None) -> None:
    _check(nn.Embedding(4, 5, padding_idx=padding_idx), torch.tensor(ids))


def test_embedding_of_ids_shared_by_the_batch() -> None:
    _check(nn.Embedding(4, 5), torch.tensor([[0, 2, 1]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "normalized"), [((6,), 6), ((4, 6), 6), ((4, 5, 6), (5, 6)), ((2, 3), (2, 3))])
def test_layer_norm(shape: tuple[int, ...], normalized: int | tuple[int, ...], bias: bool) -> None:
    layer = nn.LayerNorm(normalized, eps=0.1, bias=bias)
    nn.init.normal_(layer.weight)
    _check(layer, torch.randn(B, *shape))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 4)])
def test_group_norm(shape: tuple[int, ...]) -> None:
    layer = nn.GroupNorm(2 if shape != (6,) else 3, 6, eps=0.1)
    nn.init.normal_(layer.weight)
    _check(layer, torch.randn(B, *shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (3, 4)), (nn.BatchNorm3d, (2, 3, 2))],
)
def test_batch_norm_in_eval_mode(layer: type[nn.BatchNorm1d], shape: tuple[int, ...]) -> None:
    norm = layer(4, eps=0.1)
    norm(3 * torch.randn(8, 4, *shape) + 1)  # running statistics that are not the initial ones
    nn.init.normal_(norm.weight)
    _check(norm, torch.randn(B, 4, *shape))


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False), nn.BatchNorm1d(4, affine=False)],
)
def test_a_layer_without_parameters_has_nothing_to_hook(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))
    assert list(hooked_layers(module)) == [module[0], module[2]]
    _check(module, torch.randn(B, 4))


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
    _check(layer, x)
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
    _check(Scale(), torch.randn(B, 5))

    def another(layer: Scale, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        return {"weight": OuterSum(backprops, activations)}

    with pytest.raises(ValueError, match="Scale already has the gradient rule `scale`; registering `another`"):
        gradient_rule(Scale)(another)
