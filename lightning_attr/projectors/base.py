r"""Projections of gradients, :math:`\phi = P \nabla f` with :math:`E\langle Px, Py\rangle = \langle x, y\rangle`.

A :class:`Projector` says which family and how many dimensions; bound to a layout and a snapshot it is a
:class:`Projection`, one linear map that is the same for training and target rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int, check_seed
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.parameters.layout import ParameterLayout


class Projection(ABC):
    """The linear map of one snapshot: gradients of a batch of ``b`` samples to features ``(b, dim)``.

    Args:
        dim: number of features.

    Attributes:
        layers: module path of each layer -> the columns of its features; None where a feature mixes layers.
        names: parameters whose gradients it takes; None for all. Those of the others are not computed.

    Example:
        >>> class Sum(Projection):                         # a map of your own: all entries of the gradient, added up
        ...     def accumulate(self, features, name, gradient):
        ...         features[:, 0] += materialise(gradient, (2,)).sum(1)
        >>> features = torch.zeros(1, 1)
        >>> Sum(dim=1).accumulate(features, "w", torch.tensor([[3.0, 4.0]]))
        >>> features
        tensor([[7.]])
    """

    layers: Mapping[str, slice] | None = None
    names: frozenset[str] | None = None

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @abstractmethod
    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        """Add the projection of one parameter's gradients.

        Args:
            features: ``(b, dim)``, float32 or float64, changed in place.
            name: the parameter.
            gradient: its per-sample gradients, ``(b, *shape)`` or factored.
        """

    def accumulate_layer(self, features: Tensor, gradients: Mapping[str, ParameterGradient]) -> None:
        """Add the projection of the gradients from one use of a layer; they may share work.

        Args:
            features: ``(b, dim)``, float32 or float64, changed in place.
            gradients: parameter name -> per-sample gradients.
        """
        for name, gradient in gradients.items():
            self.accumulate(features, name, gradient)

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        """Fill the features of a batch, whatever they hold before.

        Args:
            features: ``(b, dim)``, float32 or float64, changed in place; complete when this ends.

        Yields:
            A function that adds the gradients from one use of a layer, as :meth:`accumulate_layer` does.
        """
        features.zero_()
        yield partial(self.accumulate_layer, features)

    def finish(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Do what is to be done when all gradients of a batch have come; a linear map does nothing.

        Args:
            columns: ``features`` ``(b, dim)``, all gradients added up, and the values beside them, ``(b,)``.

        Returns:
            The columns to keep.
        """
        return columns


class Projector(ABC):
    """A family of projections.

    Args:
        proj_dim: projection dimension, at most this many features per sample.
        seed: projections of equal seed, layout and snapshot are equal everywhere.

    Raises:
        ValueError: if ``proj_dim`` is not a positive integer.

    Example:
        >>> class Sum(Projector):                          # a family of your own: kind, and the map of a snapshot
        ...     kind = "sum"
        ...     def bind(self, layout, snapshot):
        ...         return MatrixProjection(layout, torch.ones(1, layout.numel))
        >>> Sum().bind(ParameterLayout({"a": (2, 3), "b": (4,)}), "final").dim
        1
        >>> Sum().config
        {'kind': 'sum', 'proj_dim': 2048, 'seed': 0}
    """

    kind: ClassVar[str]

    def __init__(self, proj_dim: int = 2048, seed: int = 0) -> None:
        self.proj_dim = check_int(self, "proj_dim", proj_dim, minimum=1)
        self.seed = check_seed(self, seed)

    @abstractmethod
    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the projection of a snapshot.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot; each has a projection of its own.

        Returns:
            The linear map.
        """

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {"kind": self.kind, "proj_dim": self.proj_dim, "seed": self.seed}


def check_projector(owner: object, value: Any, name: str = "projector") -> None:
    """Check that a value is a projector.

    Example:
        >>> check_projector("TRAK", 512)
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `projector` of TRAK to be a Projector, but got 512. Pass an object, such as
        `lightning_attr.projectors.KroneckerProjector(2048)`.
    """
    remedy = "Pass an object, such as `lightning_attr.projectors.KroneckerProjector(2048)`."
    check_instance(owner, name, value, Projector, "a Projector", remedy)


class IdentityProjector(Projector):
    """No projection: the features are the flattened gradients. For small models and tests.

    Example:
        >>> import torch
        >>> projection = IdentityProjector().bind(ParameterLayout({"a": (1, 2), "b": (2,)}), "final")
        >>> features = torch.zeros(1, projection.dim)
        >>> projection.accumulate(features, "b", torch.tensor([[3.0, 4.0]]))
        >>> features
        tensor([[0., 0., 3., 4.]])
    """

    kind = "identity"

    def __init__(self) -> None:
        super().__init__(proj_dim=1)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Give every parameter its interval of the flattened gradient.

        Args:
            layout: the parameters.
            snapshot: not used; the identity is the same for all.

        Returns:
            The identity map.
        """
        return _Flattening(layout)

    @property
    def config(self) -> dict[str, Any]:
        """Only the kind: nothing else matters."""
        return {"kind": self.kind}


class NoProjection(Projection):
    """No features at all: only the values beside them are wanted.

    Example:
        >>> NoProjection().dim
        0
    """

    def __init__(self) -> None:
        super().__init__(0)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        return


class MatrixProjection(Projection):
    r"""Inner products with given vectors, :math:`\phi_r = v_r \cdot g`.

    A sample's gradient of a layer is formed once for all vectors, which no order of the factors would undercut.

    Args:
        layout: the parameters.
        vectors: ``(r, p)``, flattened in the order of the layout, in the dtype and on the device of the features.

    Raises:
        ValueError: if the vectors do not fit the layout.

    Example:
        >>> projection = MatrixProjection(ParameterLayout({"w": (2,)}), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> features = torch.zeros(1, 2)
        >>> projection.accumulate(features, "w", torch.tensor([[3.0, 4.0]]))
        >>> features
        tensor([[3., 7.]])
    """

    def __init__(self, layout: ParameterLayout, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != layout.numel:
            raise ValueError(
                f"Expected argument `vectors` to have the shape (r, {layout.numel}), one row a vector, but got "
                f"{tuple(vectors.shape)}."
            )
        super().__init__(len(vectors))
        self.layout = layout
        self.vectors = vectors
        self.slots = flat_slots(layout)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        rows = flat_rows(gradient, self.layout.shapes[name]).to(features.dtype)
        features.addmm_(rows, self.vectors[:, self.slots[name]].T)


class _Flattening(Projection):
    def __init__(self, layout: ParameterLayout) -> None:
        super().__init__(layout.numel)
        self.layout = layout
        self.slots = flat_slots(layout)
        self.layers = by_layer(self.slots)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        features[:, self.slots[name]] += flat_rows(gradient, self.layout.shapes[name])


def flat_rows(gradient: ParameterGradient, shape: tuple[int, ...]) -> Tensor:
    """Form a parameter's gradients as one row per sample.

    Shapes: gradient (b, *shape). Returns ``(b, size)``.

    Example:
        >>> import torch
        >>> flat_rows(torch.ones(5), ()).shape
        torch.Size([5, 1])
    """
    tensor = materialise(gradient, shape)
    return tensor.reshape(tensor.shape[0], -1)


def flat_slots(layout: ParameterLayout) -> dict[str, slice]:
    """Give each parameter its interval of the flattened gradient.

    Returns parameter name -> interval.
    """
    slots, start = {}, 0
    for name, shape in layout.shapes.items():
        stop = start + torch.Size(shape).numel()
        slots[name] = slice(start, stop)
        start = stop
    return slots


def by_layer(slots: Mapping[str, slice]) -> dict[str, slice]:
    """Join the intervals of each layer's own parameters.

    Returns module path -> interval.

    Example:
        >>> by_layer({"0.weight": slice(0, 6), "0.bias": slice(6, 8), "2.weight": slice(8, 10)})
        {'0': slice(0, 8, None), '2': slice(8, 10, None)}
    """
    layers: dict[str, slice] = {}
    for name, slot in slots.items():
        layer = name.rpartition(".")[0]
        layers[layer] = slice(layers.get(layer, slot).start, slot.stop)
    return layers
