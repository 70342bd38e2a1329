"""Some layers only: the same features as those columns of the whole, and nothing computed for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import DoubledLinear
from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients import HookedGradients
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector, KroneckerProjector, LayerSubset, projector_from_config


class Network(AttributionMixin, nn.Module):
    """Layers by hooks, one without a rule, a tied weight, a parameter used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5, bias=False))
        self.body[4].weight = self.body[2].weight
        self.own = DoubledLinear(5, 5)
        self.gain = nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.own(self.body(x))) * self.gain)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["head"], ["head.weight", "head.bias"]),
        (["head.weight"], ["head.weight"]),
        (["body"], ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
        (["body.?", "gain"], ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "gain"]),
        (["*.bias"], ["body.0.bias", "body.2.bias", "own.bias", "head.bias"]),
        (["own", "gain"], ["own.weight", "own.bias", "gain"]),
        (["*"], None),
    ],
)
def test_features_are_the_columns_of_the_layers_wanted(patterns: list[str], names: Any) -> None:
    torch.manual_seed(0)
    module = Network().double().eval()
    batch, layout = (torch.randn(4, 3).double(), torch.randint(4, (4,))), ParameterLayout.of(module)
    checked = plan(module, batch, 4)
    whole = IdentityProjector().bind(layout, "s")
    some = LayerSubset(IdentityProjector(), patterns).bind(layout, "s")
    names = list(layout.shapes) if names is None else names
    assert some.names == frozenset(names)
    everything, found = (Featurizer(module, checked, p)(batch, range(4))["features"] for p in (whole, some))
    columns = torch.cat([
        torch.arange(everything.shape[1])[whole.slots[name]] for name in layout.shapes if name in names
    ])
    torch.testing.assert_close(found, everything[:, columns], rtol=1e-12, atol=1e-14)
    assert found.any(0).float().mean() > 0.9


def test_other_gradients_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = Network().eval(), (torch.randn(4, 3), torch.randint(4, (4,)))
    layout, checked = ParameterLayout.of(module), plan(module, batch, 4)
    assert checked.fallback or checked.hooked
    emitted: set[str] = set()
    original = HookedGradients.__call__

    def call(self: Any, forward: Any, batch_size: int, sink: Any, skipped: Any = None) -> Any:
        return original(self, forward, batch_size, lambda found: (emitted.update(found), sink(found))[1], skipped)

    monkeypatch.setattr(HookedGradients, "__call__", call)
    some = LayerSubset(IdentityProjector(), ["head"]).bind(layout, "s")
    featurizer = Featurizer(module, checked, some)
    assert not featurizer.fallback
    featurizer(batch, range(4))
    assert emitted == {"head.weight", "head.bias"}


def test_layers_of_layers() -> None:
    layout = ParameterLayout.of(Network())
    outer = LayerSubset(LayerSubset(IdentityProjector(), ["*.weight"]), ["body", "head"])
    assert outer.bind(layout, "s").names == {"body.0.weight", "body.2.weight", "head.weight"}


def test_config_round_trip() -> None:
    projector = LayerSubset(KroneckerProjector(64, seed=3), ["head", "body.*"])
    again = projector_from_config(projector.config)
    assert isinstance(again, LayerSubset)
    assert again.config == projector.config
    assert (again.proj_dim, again.seed) == (64, 3)


def test_a_pattern_that_matches_nothing_names_the_layers() -> None:
    layout = ParameterLayout.of(Network())
    message = r"but 'tail\*' matches none\. The layers are `body\.0`, `body\.2`, `gain`, `head`, `own`\."
    with pytest.raises(ValueError, match=message):
        LayerSubset(IdentityProjector(), ["head", "tail*"]).bind(layout, "s")


@pytest.mark.parametrize("layers", [[], "head"])
def test_patterns_are_a_list(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"`layers` of .+ a list of at least one pattern of layer names, but got"):
        LayerSubset(IdentityProjector(), layers)
