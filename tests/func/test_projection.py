from __future__ import annotations

import pytest
import torch

from lightning_attr.func import random_project
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector, KroneckerProjector, RademacherProjector, SJLTProjector

GRADIENTS = {"weight": torch.randn(6, 4, 5), "bias": torch.randn(6, 4)}


@pytest.mark.parametrize("projector", [RademacherProjector(8), SJLTProjector(8), KroneckerProjector(8)])
def test_it_is_the_package_s_projection(projector: RademacherProjector) -> None:
    projection = projector.bind(ParameterLayout({"weight": (4, 5), "bias": (4,)}), "ensemble=3")
    expected = torch.zeros(6, projection.dim)
    for name, gradient in GRADIENTS.items():
        projection.accumulate(expected, name, gradient)
    project = random_project(GRADIENTS, projector)
    assert torch.equal(project(GRADIENTS, 3), expected)
    part = {name: gradient[:2] for name, gradient in GRADIENTS.items()}
    torch.testing.assert_close(project(part, ensemble_id=3), expected[:2])
    assert not torch.equal(project(GRADIENTS), expected)


def test_inner_products_are_kept() -> None:
    x = torch.randn(2, 500, dtype=torch.float64)
    projected = random_project(x, RademacherProjector(4096))(x)
    assert projected.dtype == torch.float64
    torch.testing.assert_close(projected @ projected.T, x @ x.T, rtol=0.1, atol=50)


def test_a_tensor_is_flattened() -> None:
    x = torch.randn(3, 2, 2)
    assert torch.equal(random_project(x[:1], IdentityProjector())(x), x.flatten(1))


def test_bad_features() -> None:
    for bad in (torch.tensor(1.0), torch.ones(2, 0), {}):
        with pytest.raises(ValueError, match=r"`feature` to be a tensor \(b, ...\) or a dict of them"):
            random_project(bad, RademacherProjector(8))
    project = random_project(GRADIENTS, RademacherProjector(8))
    for wrong in (torch.ones(6, 24), {"bias": GRADIENTS["bias"]}, {**GRADIENTS, "bias": torch.ones(5, 4)}):
        with pytest.raises(ValueError, match="`feature` to have the entries"):
            project(wrong)
