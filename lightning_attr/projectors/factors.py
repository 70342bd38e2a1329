r"""Gradients in their shortest exact form, and inner products of them.

Where a sample's gradient of a weight is one outer product, :math:`G = \delta a^\top`, its two factors say all of it,
and :math:`\langle G, G' \rangle = (\delta \cdot \delta') (a \cdot a')` takes ``r + c`` multiplications in place of
``r c`` (the "ghost" products of differentially private training, Li et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients.factored import ParameterGradient, single_product
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, flat_rows


class GradientFactors(Projection):
    """Keeps gradients whole: features are the factors of outer products, and the entries of all other gradients.

    It is not linear: features have :meth:`products` and :meth:`squares`, and are good for nothing else.

    Args:
        layout: the parameters.
        outer: names whose gradient of a sample is one outer product, and of the biases of these layers; see
            :class:`lightning_attr.gradients.GradientPlan`.
        weights: parameter name -> weight of its gradients in products; None for ones.

    Attributes:
        weight: mean of the weights, over the entries of the parameters.

    Example:
        >>> from lightning_attr.gradients import OuterSum
        >>> factors = GradientFactors(ParameterLayout({"w": (3, 4)}), outer=["w"])
        >>> features = torch.empty(1, factors.dim)
        >>> with factors.filling(features) as add:
        ...     add({"w": OuterSum(torch.ones(1, 1, 3), 2 * torch.ones(1, 1, 4))})
        >>> factors.dim, factors.squares(features), factors.products(features, features)
        (7, tensor([48.]), tensor([[48.]]))
    """

    def __init__(
        self, layout: ParameterLayout, outer: Collection[str] = (), weights: Mapping[str, float] | None = None
    ) -> None:
        self.shapes = layout.shapes
        self.weights = {name: 1.0 if weights is None else weights.get(name, 0.0) for name in layout.shapes}
        self.pairs: dict[str, _Pair] = {}
        self.entries: dict[str, slice] = {}
        start = 0
        for name, shape in layout.shapes.items():
            if name in outer and len(shape) == 2 and sum(shape) < math.prod(shape):
                rows, columns = slice(start, start + shape[0]), slice(start + shape[0], start + sum(shape))
                bias = layout.bias_of(name)
                last = self.weights[bias] if bias is not None and bias in outer else None
                self.pairs[name] = _Pair(rows, columns, last)
                start = columns.stop
        columns_of_ones = {layout.bias_of(name) for name, pair in self.pairs.items() if pair.bias is not None}
        for name, shape in layout.shapes.items():
            if name not in self.pairs and name not in columns_of_ones:
                self.entries[name] = slice(start, start + math.prod(shape))
                start = self.entries[name].stop
        super().__init__(start)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        self._add(features, set(), {name: gradient})

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        """Fill the features of a batch; see :meth:`Projection.filling`.

        Args:
            features: ``(b, dim)``, changed in place.

        Yields:
            A function that adds the gradients from one use of a layer.

        Raises:
            UnsupportedLayerError: if one of the outer products is none, or the second of its parameter.
        """
        features.zero_()
        yield partial(self._add, features, set())

    def _add(self, features: Tensor, seen: set[str], gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            if name in self.entries:
                features[:, self.entries[name]] += self._scale(name, flat_rows(gradient, self.shapes[name]))
                continue
            weight = single_product(gradient)
            if name in seen or weight is None:
                raise UnsupportedLayerError(
                    f"The layer of `{name}` was called more than once, or at several positions of a sample, although "
                    "it was not when the module was checked on a few samples. Take "
                    "`projector=IdentityProjector()` in place of `exact=True`."
                )
            seen.add(name)
            if name in self.pairs:
                features[:, self.pairs[name].rows] = weight.rows[:, 0]
                features[:, self.pairs[name].columns] = self._scale(name, weight.columns[:, 0])

    def _scale(self, name: str, values: Tensor) -> Tensor:
        """Both sides of a product are scaled by the root of the weight."""
        weight = self.weights[name]
        return values if weight == 1 else values * math.sqrt(weight)

    @property
    def weight(self) -> float:
        """Mean of the weights."""
        sizes = {name: math.prod(self.shapes[name]) for name in self.weights}
        return sum(self.weights[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply each gradient of one batch with each of another.

        Args:
            left: features, ``(b, dim)``.
            right: features, ``(m, dim)``.

        Returns:
            ``(b, m)``.
        """
        entries = self._all_entries
        total = left[:, entries] @ right[:, entries].T
        for pair in self.pairs.values():
            pair.add_products(total, left, right)
        return total

    def squares(self, features: Tensor) -> Tensor:
        """Square the length of each gradient.

        Args:
            features: ``(b, dim)``.

        Returns:
            ``(b,)``.
        """
        parts = [features[:, self._all_entries].square().sum(1)]
        return torch.stack([*parts, *(pair.squares(features) for pair in self.pairs.values())]).sum(0)

    def of_layers(self) -> list[GradientFactors]:
        """Look at each layer apart.

        Returns:
            For each layer that owns parameters, products and squares of its gradients, from the same features.
        """
        layers: dict[str, GradientFactors] = {}
        for name in (*self.pairs, *self.entries):
            path = name.rpartition(".")[0]
            if path not in layers:
                shapes = {own: shape for own, shape in self.shapes.items() if own.rpartition(".")[0] == path}
                layer = layers[path] = GradientFactors(ParameterLayout(shapes), (), self.weights)
                layer.entries = {}
            layer = layers[path]
            if name in self.pairs:
                layer.pairs[name] = self.pairs[name]
            else:
                layer.entries[name] = self.entries[name]
        return list(layers.values())

    @property
    def _all_entries(self) -> slice:
        slots = list(self.entries.values())
        return slice(slots[0].start, slots[-1].stop) if slots else slice(0)


@dataclass(frozen=True)
class _Pair:
    """Where the factors of a weight's outer product are."""

    rows: slice
    columns: slice
    bias: float | None
    """Weight of the bias, the last column of ones; None without."""

    def add_products(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        columns = left[:, self.columns] @ right[:, self.columns].T
        columns = columns if self.bias is None else columns.add_(self.bias)
        total.addcmul_(left[:, self.rows] @ right[:, self.rows].T, columns)

    def squares(self, features: Tensor) -> Tensor:
        columns = features[:, self.columns].square().sum(1) + (self.bias or 0.0)
        return features[:, self.rows].square().sum(1) * columns
