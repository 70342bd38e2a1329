"""The curvature of the training objective at a snapshot: products over all training samples, of all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.data.memory import peak_bytes
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.solvers.batch_curvature import BatchCurvature, Curvature, batches_of, joined_batches
from lightning_attr.projectors import IdentityProjector, NoProjection
from lightning_attr.randomness.streams import rademacher, random_words

_AT_ONCE = 2**28
"""Bytes that the vectors multiplied together may take, and graphs kept from one product to the next."""
_MOST_ROWS = 256
_EXACT_TRACE, _PROBES = 1024, 128
"""Up to so many parameters the trace is exact; above, it is estimated with so many random vectors."""


class TrainingCurvature:
    r"""Products with the mean curvature of the training loss, :math:`C = \frac1n \sum_i C_i`, and with gradients.

    "hessian": :math:`\nabla^2 \ell_i`. "ggn": :math:`J_i^\top (\nabla^2_z \ell_i) J_i` with the Jacobian of the
    module's outputs ``z``: never negative, and the true Fisher matrix of a softmax cross entropy or a squared error
    (Martens, 2020). "empirical_fisher": :math:`g_i g_i^\top`. Products are in float32, or float64 for a float64
    module, also where the module runs in half precision; sums over samples are in float64.

    Args:
        model: the module at a snapshot, with its weights loaded.
        curvature: which.
        weight_decay: :math:`\rho` of an L2 term :math:`\frac\rho2 |\theta|^2` of the objective, whose Hessian is added.

    Raises:
        TypeError: if the GGN is wanted of a module that does not show its outputs.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.outputs import Regression
        >>> class Line(AttributionMixin, nn.Linear):
        ...     model_output = Regression()
        >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2))
        >>> model = SnapshotModel.of(Line(1, 1, bias=False).eval(), [batch], [batch])
        >>> TrainingCurvature(model, "ggn").product(torch.ones(1, 1))       # (1 + 9) / 2
        tensor([[5.]])
    """

    def __init__(self, model: SnapshotModel, curvature: str, weight_decay: float = 0.0) -> None:
        check_choice(self, "curvature", curvature, get_args(Curvature))
        self.model = model
        self.curvature = curvature
        self.weight_decay = weight_decay
        self.of_batch = BatchCurvature(model, curvature)
        self._written: Tensor | None = None
        self._kept: list[Product] | None = None
        self._bytes_a_row = 0
        self._mean_eigenvalue: float | None = None

    @property
    def size(self) -> int:
        """Number of parameters ``p``."""
        return self.model.layout.numel

    def product(self, rows: Tensor) -> Tensor:
        """Multiply with the curvature of the whole objective, weight decay included; all processes call it together.

        Shapes: rows (r, p). Returns ``(r, p)``, in the same dtype.
        """
        if self._written is not None:
            return rows @ self._written
        return self._mean(rows, self._products(), self.model.n_train)

    def write(self, matrix: Tensor) -> None:
        """Take the curvature as it was written out, with which products are cheap.

        Shapes: matrix (p, p).
        """
        self._written = matrix
        self.release()

    def sampled_product(self, rows: Tensor, batch_size: int, *key: object) -> Tensor:
        """Multiply with the curvature of some training samples, drawn by a key; all processes call it together.

        Shapes: rows (r, p). Returns ``(r, p)``, whose expectation over keys is :meth:`product`.
        """
        return self.batch_product(batch_size, *key)(rows)

    def batch_product(self, batch_size: int, *key: object) -> Product:
        """Prepare products with the curvature of some training samples, drawn by a key: their graphs are kept.

        Returns a function that all processes call together, from rows ``(r, p)`` to rows ``(r, p)``; its expectation
        over keys is :meth:`product`.
        """
        if batch_size >= self.model.n_train:
            return self.product
        drawn = random_words(self.model.n_train, *key, "curvature").argsort()[:batch_size]
        products = list(self._products(set(drawn.tolist())))
        return lambda rows: self._mean(rows, iter(products), len(drawn))

    def group_product(self, rows: Tensor, group: Sequence[int]) -> Tensor:
        """Multiply with the sum of the curvatures of some training samples, without weight decay.

        Shapes: rows (r, p). Returns ``(r, p)``.
        """
        return self._sum(rows, self._products(set(group)))

    def mean_eigenvalue(self) -> float:
        """Compute the trace over ``p``, without weight decay: what damping is relative to.

        Exact up to 1024 parameters; above, from 128 random signs a parameter (Hutchinson, 1989), the same for every
        solver, batch size and number of processes.

        Returns the mean of the eigenvalues.
        """
        if self._mean_eigenvalue is None:
            exact = self.size <= _EXACT_TRACE
            probes = torch.eye(self.size) if exact else rademacher((_PROBES, self.size), "trace")
            probes = probes.to(device=self.model.device, dtype=self.model.dtype)
            if self._written is None:
                images = self._sum(probes, self._products()) / self.model.n_train
            else:
                images = (probes @ self._written).sub_(probes, alpha=self.weight_decay)
            total = (probes.double() * images.double()).sum().item()
            self._mean_eigenvalue = total / self.size if exact else total / probes.numel()
        return self._mean_eigenvalue

    def gradients(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Go through the gradients of this process's training samples.

        Yields rows, the gradients of the model outputs ``(b, p)``, and ``q`` ``(b,)``; that of the loss is ``-q``
        times.
        """
        identity = IdentityProjector().bind(self.model.layout, self.model.key)
        for rows, columns in self.model.train(identity):
            yield rows, columns["features"], columns["out_to_loss"]

    def output_slopes(self) -> Iterator[tuple[range, Tensor]]:
        """Go through ``q`` of this process's training samples: rows, and ``(b,)``."""
        for rows, columns in self.model.train(NoProjection()):
            yield rows, columns["out_to_loss"]

    def release(self) -> None:
        """Let the graphs go that are kept from one product to the next."""
        self._kept = None

    # Products ---------------------------------------------------------------------------------------------------

    def _mean(self, rows: Tensor, products: Iterator[Product], count: int) -> Tensor:
        return (self._sum(rows, products) / count).add_(rows, alpha=self.weight_decay).to(rows.dtype)

    def _sum(self, rows: Tensor, products: Iterator[Product]) -> Tensor:
        """Sum over batches and processes, in float64."""
        total = torch.zeros_like(rows, dtype=torch.float64)
        for product in products:
            if not self._bytes_a_row and len(rows):
                self._bytes_a_row = max(1, peak_bytes(lambda product=product: product(rows[:1])))  # type: ignore[misc]
            at_once = min(_MOST_ROWS, max(1, _AT_ONCE // max(1, self._bytes_a_row)))
            for start in range(0, len(rows), at_once):
                part = slice(start, start + at_once)
                total[part] += product(rows[part])
        return self.model.reduce(total)

    def _products(self, wanted: set[int] | None = None) -> Iterator[Product]:
        """Give the products of all batches, or of the samples wanted; while small, those of all are kept, as one."""
        if self._kept is not None and wanted is None:
            yield from self._kept
            return
        kept: list[tuple[Product, list[int], Any]] = []
        count, size = 0, 0
        for rows, batch in batches_of(self.model, wanted):
            product = self.of_batch.product(self.model.completed(rows, batch), len(rows))
            yield product
            count, size = count + 1, size + 2 * self._bytes_a_row
            if size <= _AT_ONCE:
                kept.append((product, rows, batch))
        if wanted is None and len(kept) == count:
            self._keep(kept)

    def _keep(self, found: list[tuple[Product, list[int], Any]]) -> None:
        """Keep the products of all batches: as one, which takes the time of one call, if the batches can be joined."""
        joined = joined_batches([(rows, batch) for _, rows, batch in found])
        if len(joined) == len(found):
            self._kept = [product for product, _, _ in found]
            return
        ((rows, batch),) = joined
        self._bytes_a_row = self._bytes_a_row * len(rows) // len(found[0][1])  # measured with the first
        self._kept = [self.of_batch.product(self.model.completed(rows, batch), len(rows))]
