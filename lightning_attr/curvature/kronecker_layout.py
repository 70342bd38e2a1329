"""Which parameters have Kronecker factors, and each layer's gradient as a matrix with the bias as its last column."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import ConvSum, OuterSum, hooked_layers, rule_for
from lightning_attr.gradients.attention import multihead_attention
from lightning_attr.gradients.convolution import convolution
from lightning_attr.gradients.linear import linear, transposed_linear
from lightning_attr.gradients.rules import forward_for
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import flat_slots

WeightGradient: TypeAlias = OuterSum | ConvSum


@dataclass(frozen=True)
class KroneckerBlock:
    r"""A weight and its bias as one matrix per group, :math:`(d_o, d_i + 1)`, the bias as last column.

    Args:
        weight: name of the weight.
        bias: name of the bias, or None.
        shape: of the weight.
        groups: groups of a convolution; each is a matrix of its own.
        transposed: whether the weight is ``(d_i, d_o)``.

    Example:
        >>> block = KroneckerBlock("weight", "bias", (8, 2, 3, 3), groups=2)
        >>> block.groups, block.rows, block.columns
        (2, 4, 19)
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Outputs of a group, ``d_o``."""
        return (self.shape[1] if self.transposed else self.shape[0]) // self.groups

    @property
    def columns(self) -> int:
        """Inputs of a group and one for the bias if there is one, ``d_i`` or ``d_i + 1``."""
        inputs = self.shape[0] if self.transposed else math.prod(self.shape[1:])
        return inputs + (self.bias is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrices(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Put parts of flat vectors together.

        Shapes: vectors (r, size). Returns ``(r, groups, d_o, d_i + 1)``.
        """
        weight = vectors[self.weight]
        if self.transposed:
            weight = weight.unflatten(1, self.shape).mT
        weight = weight.reshape(len(weight), self.groups, self.rows, -1)
        if self.bias is None:
            return weight
        bias = vectors[self.bias].reshape(len(weight), self.groups, self.rows, 1)
        return torch.cat([weight, bias], -1)

    def vectors(self, matrices: Tensor) -> dict[str, Tensor]:
        """Take matrices apart again.

        Shapes: matrices (r, groups, d_o, d_i + 1). Returns parameter name -> ``(r, size)``.
        """
        inputs = self.columns - (self.bias is not None)
        weight = matrices[..., :inputs]
        weight = weight.mT if self.transposed else weight
        parts = {self.weight: weight.reshape(len(matrices), -1)}
        if self.bias is not None:
            parts[self.bias] = matrices[..., -1].reshape(len(matrices), -1)
        return parts

    def factors(self, gradient: WeightGradient, samples: slice, labels: int = 1) -> tuple[Tensor, Tensor]:
        """Read both sides of the outer products from the gradients of one use.

        Returns gradients at the output ``(b, groups, s, labels * d_o)``, label beside label, and activations ``(b,
        groups, s, d_i + 1)``, whose last column is one for the bias; do not change them in place.
        """
        if isinstance(gradient, ConvSum):
            rows = gradient.backprops.unflatten(0, (labels, -1))[:, samples]
            rows = rows.reshape(*rows.shape[:2], self.groups, self.rows, -1).permute(1, 2, 4, 0, 3)
            return rows.flatten(3), self._windows(gradient.part(samples))
        sides = (gradient.columns, gradient.rows) if self.transposed else (gradient.rows, gradient.columns)
        rows = sides[0].unflatten(0, (labels, -1))[:, samples].permute(1, 2, 0, 3)
        columns = sides[1][samples].unsqueeze(1)
        return rows.flatten(2).unsqueeze(1), columns if self.bias is None else F.pad(columns, (0, 1), value=1.0)

    def _windows(self, gradient: ConvSum) -> Tensor:
        """Unfold with a single copy, ones included, for that takes as long as the products."""
        windows = gradient.windows()
        dims = len(gradient.kernel_size)
        positions = range(3, 3 + dims)
        windows = windows.permute(0, 1, *positions, 2, *range(3 + dims, windows.ndim))
        columns = windows.new_ones(*windows.shape[:2], math.prod(windows.shape[2 : 2 + dims]), self.columns)
        inputs = columns[..., : self.columns - (self.bias is not None)]
        inputs.unflatten(3, windows.shape[2 + dims :]).unflatten(2, windows.shape[2 : 2 + dims]).copy_(windows)
        return columns


@dataclass(frozen=True)
class KroneckerLayout:
    """The blocks of a module, among all of its attributed parameters.

    Args:
        parameters: all attributed parameters.
        blocks: those that have Kronecker factors.

    Example:
        >>> layout = KroneckerLayout.of(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
        >>> layout.names, layout.uncovered, layout.share
        (('0.weight', '0.bias'), ('1.weight', '1.bias'), 0.6666666666666666)
    """

    parameters: ParameterLayout
    blocks: tuple[KroneckerBlock, ...]

    @classmethod
    def of(
        cls, module: nn.Module, hooked: Collection[str] | None = None, direct: Collection[str] = ()
    ) -> KroneckerLayout:
        """Find the blocks of a module: Linear, convolutions, ``Conv1D`` of transformers, and projections of attention.

        A weight that two layers share, or that other code uses as well, has no block: its curvature is no Kronecker
        product, and a tied head would count the embedding twice.
        """
        parameters = ParameterLayout.of(module)
        layers = hooked_layers(module)
        uses = Counter(name for own in layers.values() for name in own.values())
        allowed = {
            name for name in uses if uses[name] == 1 and name not in direct and (hooked is None or name in hooked)
        }
        blocks = []
        for layer, own in layers.items():
            kept = {local: name for local, name in own.items() if name in allowed}
            blocks += _blocks_of(layer, kept, parameters)
        if not blocks:
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no layer with Kronecker factors: no Linear, Conv1d to Conv3d, "
                "MultiheadAttention or Conv1D of transformers with a trainable weight of its own. Its trainable "
                f"parameters are {some(list(parameters.shapes))}. Use another curvature."
            )
        return cls(parameters, tuple(blocks))

    @property
    def names(self) -> tuple[str, ...]:
        """Covered parameters."""
        return tuple(name for block in self.blocks for name in block.names)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Attributed parameters without factors, in order: they add nothing."""
        covered = set(self.names)
        return tuple(name for name in self.parameters.shapes if name not in covered)

    @property
    def share(self) -> float:
        """Share of the attributed parameters that is covered, in ``(0, 1]``."""
        shapes = self.parameters.shapes
        return sum(math.prod(shapes[name]) for name in self.names) / self.parameters.numel

    @property
    def slots(self) -> dict[str, slice]:
        """Interval of each parameter in a flat vector."""
        return flat_slots(self.parameters)


def _blocks_of(layer: nn.Module, own: Mapping[str, str], parameters: ParameterLayout) -> list[KroneckerBlock]:
    rule = rule_for(layer)
    if forward_for(layer) is multihead_attention:
        weights = [name for name in own if name.endswith("proj_weight")]
        bias = own.get("in_proj_bias") if "in_proj_weight" in own else None  # of separate weights, none owns it all
        return [KroneckerBlock(own[name], bias, parameters.shapes[own[name]]) for name in weights]
    if rule not in {linear, transposed_linear, convolution} or "weight" not in own:
        return []
    groups = int(getattr(layer, "groups", 1))
    shape = parameters.shapes[own["weight"]]
    return [KroneckerBlock(own["weight"], own.get("bias"), shape, groups, transposed=rule is transposed_linear)]


def some(names: Sequence[str]) -> str:
    """Name the first of many parameters, for messages."""
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
