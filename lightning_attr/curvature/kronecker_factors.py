r"""Kronecker factors of the Fisher information, layer by layer: K-FAC, and EK-FAC, which corrects its eigenvalues.

A layer's block is approximated by :math:`S \otimes A`, the second moments of the gradients at its output and of its
activations (Martens and Grosse, 2015; Grosse and Martens, 2016, for convolutions). EK-FAC keeps the eigenvectors and
measures the second moment of the gradient along each of them (George et al., 2018), which is what influence functions
use (Grosse et al., 2023).

A position whose gradient at the output is exactly zero, such as one that a mask takes out of the loss, counts nowhere:
neither its activations nor the one appended to them for the bias enter, and it is no position of the mean.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from lightning_attr.curvature.eigen import eigendecomposition
from lightning_attr.curvature.fisher import GradientBatch
from lightning_attr.curvature.kronecker_layout import KroneckerBlock, KroneckerLayout, WeightGradient, some
from lightning_attr.curvature.kronecker_rotation import BatchUses, chunks, squared_gradients
from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.gradients import ParameterGradient

KroneckerMethod: TypeAlias = Literal["ekfac", "kfac"]
log = logging.getLogger(__name__)

Passes: TypeAlias = Callable[[int], Iterable[GradientBatch]]
"""Runs over the training set: number 0 for the covariances, number 1 for the eigenvalues; sampled labels are fresh."""


@dataclass(frozen=True)
class BlockFactors:
    r"""Eigenvectors and eigenvalues of one block, a matrix a group.

    Args:
        rows_basis: :math:`Q_S`, eigenvectors in columns, ``(groups, d_o, d_o)``.
        rows_eigenvalues: of :math:`S`, float64, ``(groups, d_o)``.
        columns_basis: :math:`Q_A`, ``(groups, d_i, d_i)``.
        columns_eigenvalues: of :math:`A`, float64, ``(groups, d_i)``.
        second_moments: :math:`\Lambda = \frac1n \sum_i (Q_S^\top G_i Q_A)^2`, float64, ``(groups, d_o, d_i)``.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> factors = BlockFactors(one[None], 2 * one, one[None], 3 * one, 5 * one[None])
        >>> factors.eigenvalues("ekfac").item(), factors.eigenvalues("kfac").item()
        (5.0, 6.0)
    """

    rows_basis: Tensor
    rows_eigenvalues: Tensor
    columns_basis: Tensor
    columns_eigenvalues: Tensor
    second_moments: Tensor

    def eigenvalues(self, method: KroneckerMethod) -> Tensor:
        """Eigenvalues of the curvature: measured ("ekfac"), or products of those of both sides ("kfac").

        Returns float64, ``(groups, d_o, d_i)``.
        """
        if method not in get_args(KroneckerMethod):
            raise ValueError(f'Expected argument `method` to be "ekfac" or "kfac", but got {method!r}.')
        if method == "ekfac":
            return self.second_moments
        return self.rows_eigenvalues.unsqueeze(2) * self.columns_eigenvalues.unsqueeze(1)


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of all blocks.

    Args:
        layout: the blocks that have factors.
        blocks: factors by the name of the block's weight.
        samples: number of samples they come from.

    Example:
        >>> from torch import nn
        >>> from lightning_attr.gradients import OuterSum
        >>> layer, x, delta = nn.Linear(2, 1, bias=False), torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 1)
        >>> batch = GradientBatch([lambda sink: sink({"weight": OuterSum(delta, x)})], samples=1)
        >>> factors = KroneckerFactors.fit(KroneckerLayout.of(layer), lambda number: [batch])
        >>> factors.blocks["weight"].eigenvalues("kfac")
        tensor([[[0., 5.]]], dtype=torch.float64)
    """

    layout: KroneckerLayout
    blocks: Mapping[str, BlockFactors]
    samples: int

    @classmethod
    def fit(
        cls,
        layout: KroneckerLayout,
        passes: Passes,
        *,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> KroneckerFactors:
        """Fit the factors in two passes over the training set.

        Returns the factors. Blocks that no gradient has reached are left out of their layout.
        """
        covariances = {block.weight: _Covariances(block, device) for block in layout.blocks}
        samples = _samples_of(passes(0), _CovarianceSink(covariances), reduce, device)
        for covariance in covariances.values():
            covariance.reduce(reduce)
        reached = tuple(block for block in layout.blocks if covariances[block.weight].positions.any())
        if not reached:
            raise ValueError(
                f"Expected gradients to reach the layers with Kronecker factors, but those of {samples} samples are "
                "zero or missing in all. Look at the loss, and at what the output of the module depends on."
            )
        layout = dataclasses.replace(layout, blocks=reached)
        if layout.uncovered:
            _say_uncovered(layout.share, some(layout.uncovered))
        bases = {block.weight: covariances.pop(block.weight).decompose(samples, dtype) for block in reached}
        moments = {name: torch.zeros_like(factors.second_moments) for name, factors in bases.items()}
        again = _samples_of(passes(1), _MomentSink(reached, bases, moments), reduce, device)
        if again != samples:
            raise ValueError(f"Expected both passes to have the same samples, but got {samples} and then {again}.")
        blocks = {}
        for name, factors in bases.items():
            moment = reduce(moments[name]) / samples
            _check_finite(name, moment)
            blocks[name] = dataclasses.replace(factors, second_moments=moment)
        return cls(layout, blocks, samples)

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor, for a file.

        Returns ``<weight>/<field of BlockFactors>`` -> tensor, and ``samples``.
        """
        named = {
            f"{name}/{field.name}": getattr(factors, field.name).contiguous()
            for name, factors in self.blocks.items()
            for field in dataclasses.fields(BlockFactors)
        }
        return {**named, "samples": torch.tensor(self.samples)}

    @staticmethod
    def shapes(layout: KroneckerLayout) -> dict[str, tuple[int, ...]]:
        """Give the shapes of what :meth:`tensors` names; blocks that no sample reaches are missing there."""
        found: dict[str, tuple[int, ...]] = {"samples": ()}
        for block in layout.blocks:
            own = (
                (block.rows, block.rows),
                (block.rows,),
                (block.columns, block.columns),
                (block.columns,),
                (block.rows, block.columns),
            )
            for field, shape in zip(dataclasses.fields(BlockFactors), own, strict=True):
                found[f"{block.weight}/{field.name}"] = (block.groups, *shape)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: KroneckerLayout) -> KroneckerFactors:
        """Put back what :meth:`tensors` has named."""
        blocks = {}
        for block in layout.blocks:
            fields = {field.name: f"{block.weight}/{field.name}" for field in dataclasses.fields(BlockFactors)}
            if fields["second_moments"] in tensors:
                blocks[block.weight] = BlockFactors(**{field: tensors[name] for field, name in fields.items()})
        found = {name: tuple(factors.second_moments.shape) for name, factors in blocks.items()}
        reached = tuple(block for block in layout.blocks if block.weight in blocks)
        expected = {block.weight: (block.groups, block.rows, block.columns) for block in reached}
        unknown = {name.split("/")[0] for name in tensors} - {"samples"} - blocks.keys()
        if found != expected or unknown or not blocks:
            raise ValueError(
                f"Expected argument `tensors` to hold factors of the shapes {expected}, but got {found} and the "
                f"unknown names {sorted(unknown)}. They belong to another module, or to other frozen parameters."
            )
        return cls(dataclasses.replace(layout, blocks=reached), blocks, int(tensors["samples"]))


class _Covariances:
    """Sums of a block's outer products, in float64."""

    def __init__(self, block: KroneckerBlock, device: torch.device | str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(block.groups, *shape, dtype=torch.float64, device=device)

        self.block = block
        self.rows = zeros(block.rows, block.rows)
        self.columns = zeros(block.columns, block.columns)
        self.positions = zeros()
        self.vectors = torch.zeros(2, dtype=torch.float64, device=device)  # that rows and columns are sums over

    def add(self, gradient: WeightGradient, labels: int) -> None:
        for samples in chunks(self.block, [gradient], labels=labels):
            rows, columns = self.block.factors(gradient, samples, labels)
            alive = (rows != 0).any(-1, keepdim=True)
            self.rows += _gram(rows.unflatten(3, (labels, -1)).flatten(2, 3))
            self.columns += _gram(columns if alive.all() else columns * alive)
            self.positions += alive.sum((0, 2, 3))
            count = rows.shape[0] * rows.shape[2]
            self.vectors += self.vectors.new_tensor([count * labels, count])

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.rows, self.columns, self.positions = reduce(self.rows), reduce(self.columns), reduce(self.positions)
        self.vectors = reduce(self.vectors)

    def decompose(self, samples: int, dtype: torch.dtype) -> BlockFactors:
        """Scaled so that their product estimates the second moment of the gradient of a sample."""
        row_vectors, column_vectors = (int(count) for count in self.vectors.tolist())
        rows_eigenvalues, rows_basis = _eigh(self.block.weight, self.rows / samples, row_vectors, dtype)
        mean = self.columns / self.positions.clamp(min=1)[:, None, None]  # a group that no gradient reaches has none
        columns_eigenvalues, columns_basis = _eigh(self.block.weight, mean, column_vectors, dtype)
        empty = self.rows.new_zeros(self.block.groups, self.block.rows, self.block.columns)
        return BlockFactors(rows_basis, rows_eigenvalues, columns_basis, columns_eigenvalues, empty)


class _CovarianceSink:
    def __init__(self, covariances: Mapping[str, _Covariances]) -> None:
        self.covariances = covariances
        self.labels = 1

    def __call__(self, gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            if name in self.covariances:
                self.covariances[name].add(cast(WeightGradient, gradient), self.labels)

    def finish(self) -> None:
        """Nothing waits for the end of a batch."""


class _MomentSink:
    """Adds the squares of rotated gradients once all uses of a batch are known."""

    def __init__(
        self, blocks: Iterable[KroneckerBlock], bases: Mapping[str, BlockFactors], moments: Mapping[str, Tensor]
    ) -> None:
        self.bases = bases
        self.moments = moments
        self.labels = 1
        self.uses = BatchUses({block.weight: block for block in blocks})

    def __call__(self, gradients: Mapping[str, ParameterGradient]) -> None:
        self.uses(gradients)

    def finish(self) -> None:
        for block, uses in self.uses:
            factors = self.bases[block.weight]
            bases = factors.rows_basis, factors.columns_basis
            for _, squares in squared_gradients(block, uses, *bases, self.labels):
                self.moments[block.weight].add_(squares.summed())


@cache  # the snapshots of a run have the same layers: once is enough
def _say_uncovered(share: float, names: str) -> None:
    log.warning(
        "Kronecker factors cover %.1f%% of the parameters; %s have none and add nothing to influences.",
        100 * share,
        names,
    )


def _samples_of(
    batches: Iterable[GradientBatch],
    sink: _CovarianceSink | _MomentSink,
    reduce: Callable[[Tensor], Tensor],
    device: torch.device | str,
) -> int:
    """Run a pass and count its samples."""
    samples = 0
    for batch in batches:
        sink.labels = batch.labels
        for stream in batch.streams:
            stream(sink)
            sink.finish()
        samples += batch.samples
    total = int(reduce(torch.tensor(float(samples), dtype=torch.float64, device=device)))
    if total == 0:
        raise ValueError("Expected argument `passes` to give at least one sample, but got none.")
    return total


def _gram(factors: Tensor) -> Tensor:
    """Sum the outer products over samples and positions, ``(b, g, s, d) -> (g, d, d)``."""
    flat = factors.transpose(0, 1).flatten(1, 2)
    return flat.mT @ flat


def _eigh(name: str, covariance: Tensor, vectors: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; what rounding has left of eigenvalues that are zero becomes zero."""
    _check_finite(name, covariance)
    eigenvalues, basis = eigendecomposition(name, (covariance + covariance.mT) / 2, vectors)
    noise = eigenvalues.shape[-1] * torch.finfo(dtype).eps * eigenvalues[..., -1:]
    return torch.where(eigenvalues > noise, eigenvalues, 0.0), basis.to(dtype)


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise NonFiniteGradientError(
            f"The Kronecker factors of `{name}` are NaN or Inf: some sample's loss has such a gradient. Featurize the "
            "training set to find which, and look for diverged weights or an infinite slope in the loss."
        )
