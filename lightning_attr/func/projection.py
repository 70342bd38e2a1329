"""Random projections of tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, check_projector
from lightning_attr.projectors.learned import check_not_learned

Feature: TypeAlias = Tensor | Mapping[str, Tensor]
_TENSOR = "feature"  # the name of what has none


def random_project(feature: Feature, projector: Projector) -> Callable[..., Tensor]:
    r"""Make a function that projects rows, so that :math:`E\langle Px, Py\rangle = \langle x, y\rangle`.

    Underneath: the projectors of :mod:`lightning_attr.projectors`, which depend on their seed and nothing else.

    Args:
        feature: an example, for its names and shapes: a tensor ``(b, ...)``, or name -> tensor ``(b, *shape)`` such as
            the per-sample gradients of parameters.
        projector: the family, its dimension and its seed, such as ``RademacherProjector(512, seed=0)``.

    Returns:
        A function ``(feature, ensemble_id=0) -> (b, proj_dim)``, float64 for float64 and else float32, for any ``b``.
        Each ``ensemble_id`` has a projection of its own.

    Raises:
        ValueError: if an example has no dimension for samples, or (when called) names or shapes are not the example's.

    Example:
        >>> from lightning_attr.projectors import RademacherProjector
        >>> project = random_project(torch.ones(1, 1000), RademacherProjector(64))
        >>> project(torch.ones(3, 1000)).shape
        torch.Size([3, 64])
        >>> gradients = {"weight": torch.ones(2, 4, 5), "bias": torch.ones(2, 4)}
        >>> random_project(gradients, RademacherProjector(8))(gradients, ensemble_id=1).shape
        torch.Size([2, 8])
    """
    check_projector("random_project", projector)
    check_instance("random_project", "feature", feature, (Tensor, Mapping), "a tensor (b, ...) or a dict of them")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in _named(feature).items()}
    if any(not tensor.ndim for tensor in _named(feature).values()) or not any(map(math.prod, shapes.values())):
        raise ValueError(
            "Expected argument `feature` to be a tensor (b, ...) or a dict of them, with something in it, but got the "
            f"shapes { {name: tuple(tensor.shape) for name, tensor in _named(feature).items()} }."
        )
    layout = ParameterLayout(shapes)

    check_not_learned(projector.bind(layout, ""), "random_project")

    @lru_cache(maxsize=1)
    def projection(ensemble_id: int) -> Projection:
        return projector.bind(layout, f"ensemble={ensemble_id}")

    def project(feature: Feature, ensemble_id: int = 0) -> Tensor:
        given = _named(feature)
        found = {name: tuple(tensor.shape[1:]) for name, tensor in given.items()}
        lengths = {len(tensor) for tensor in given.values()}
        if found != shapes or len(lengths) != 1:
            raise ValueError(
                f"Expected argument `feature` to have the entries {shapes}, each with the same number of samples in "
                f"front, but got {found} with {sorted(lengths)} samples."
            )
        first = next(iter(given.values()))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        bound = projection(ensemble_id)
        features = torch.zeros(lengths.pop(), bound.dim, dtype=dtype, device=first.device)
        for name, tensor in given.items():
            bound.accumulate(features, name, tensor.detach())
        return features

    return project


def _named(feature: Feature) -> Mapping[str, Tensor]:
    return {_TENSOR: feature} if isinstance(feature, Tensor) else feature
