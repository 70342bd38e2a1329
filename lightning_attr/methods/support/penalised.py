"""Linear regression with a penalty, of many outputs at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.methods.support.lasso_path import follow

_GAP = 1e-10
"""Duality gap at which a lasso is solved, relative to the variance of its output."""
_SHORT = 512
"""Rows, or columns if they are fewer, up to which a solution is followed: it changes its course about as often."""
_MOST_SWEEPS, _LOOSE_GAP = 1000, 1e-3
"""Sweeps at most; with nearly as many weights as outputs the last digits close slowly, and do not matter."""


class Ridge:
    r"""Minimises :math:`\tfrac{1}{2m} \|y - Zw\|^2 + \tfrac{\lambda}{2} \|w\|^2` by a singular value decomposition.

    Args:
        inputs: :math:`Z`, ``(m, n)``, float64, with centred columns.

    Example:
        >>> z = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> Ridge(z).solve(torch.tensor([[3.0], [-3.0]]).double(), torch.tensor([0.5]))
        tensor([[2.0000]], dtype=torch.float64)
    """

    def __init__(self, inputs: Tensor) -> None:
        self.left, self.values, self.right = torch.linalg.svd(inputs, full_matrices=False)
        self.rows = len(inputs)
        self.unit = inputs.square().sum() / (self.rows * inputs.shape[1])

    def solve(self, outputs: Tensor, strengths: Tensor) -> Tensor:
        r"""Solve for each output.

        Shapes: outputs (m, q), strengths (q,). Returns weights ``(n, q)``.
        """
        penalty = self.rows * self.unit * strengths.to(outputs)
        values = self.values[:, None]
        rounding = self.values[0] * max(self.left.shape[0], self.right.shape[1]) * torch.finfo(values.dtype).eps
        filters = torch.where(values > rounding, values / (values.square() + penalty), 0)
        weights: Tensor = self.right.T @ (filters * (self.left.T @ outputs))
        return weights

    def path(self, outputs: Tensor, strengths: Tensor) -> Tensor:
        """Solve for each output with each strength.

        Shapes: strengths (k,). Returns weights ``(n, q, k)``.
        """
        count = outputs.shape[1]
        weights = self.solve(outputs.repeat_interleave(len(strengths), 1), strengths.repeat(count))
        return weights.view(-1, count, len(strengths))


class Lasso:
    r"""Minimises :math:`\tfrac{1}{2m} \|y - Zw\|^2 + \lambda \|w\|_1`.

    With few rows or few columns, the solution is followed from the strength that leaves no weight down to the one
    that is wanted, along the straight lines it is made of (Osborne et al., 2000; Efron et al., 2004). Elsewhere, and
    where that does not close the duality gap, it is found by coordinate descent (Friedman et al., 2010): a coordinate
    is moved for all outputs at once, and an output is left alone once its gap is closed.

    Args:
        inputs: :math:`Z`, ``(m, n)``, float64, with centred columns.

    Example:
        >>> z = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> Lasso(z).solve(torch.tensor([[3.0], [-3.0]]).double(), torch.tensor([0.25]))
        tensor([[2.2500]], dtype=torch.float64)
    """

    def __init__(self, inputs: Tensor) -> None:
        self.rows = len(inputs)
        # A square system has the same solutions as a tall one, and shorter columns.
        self.rotation: Tensor | None = None
        if self.rows > inputs.shape[1]:
            self.rotation, inputs = torch.linalg.qr(inputs)
        self.columns = inputs.T.contiguous()
        self.norms = (self.columns.square().sum(1) / self.rows).tolist()

    def solve(self, outputs: Tensor, strengths: Tensor) -> Tensor:
        r"""Solve for each output.

        Shapes: outputs (m, q), strengths (q,). Returns weights ``(n, q)``.
        """
        return self._solved(outputs, strengths[:, None])[..., 0]

    def path(self, outputs: Tensor, strengths: Tensor) -> Tensor:
        """Solve for each output with each strength, which takes hardly longer than with the smallest.

        Shapes: strengths (k,). Returns weights ``(n, q, k)``.
        """
        return self._solved(outputs, strengths.expand(outputs.shape[1], -1))

    def _solved(self, outputs: Tensor, strengths: Tensor) -> Tensor:
        y = outputs if self.rotation is None else self.rotation.T @ outputs
        penalty = strengths.to(y) * (self.columns @ y).abs().amax(0)[:, None] / self.rows
        start = y.new_zeros(len(self.columns), *penalty.shape)
        if self.columns.shape[1] <= _SHORT:
            columns = self.columns.numpy()
            for output in range(y.shape[1]):
                found = follow(columns, y[:, output].numpy() / self.rows, self.rows, penalty[output].numpy())
                start[:, output] = torch.from_numpy(found)
        repeated = y.repeat_interleave(penalty.shape[1], 1)
        return self._descended(repeated, penalty.flatten(), start.flatten(1)).view(start.shape)

    def _descended(self, y: Tensor, penalty: Tensor, start: Tensor) -> Tensor:
        """Close the gaps that are still open."""
        weights = start
        open_ = torch.arange(y.shape[1])
        w, residual, bound = start.clone(), y - self.columns.T @ start, penalty
        for _ in range(_MOST_SWEEPS):
            gap = self._gap(y[:, open_], w, residual, bound)
            closed = gap <= _GAP * y[:, open_].square().sum(0) / (2 * self.rows)
            weights[:, open_[closed]] = w[:, closed]
            if closed.all():
                return weights
            if closed.any():
                open_, bound = open_[~closed], bound[~closed]
                w, residual = w[:, ~closed].contiguous(), residual[:, ~closed].contiguous()
            self._sweep(w, residual, bound)
        gap = self._gap(y[:, open_], w, residual, bound)
        wide = int((gap > _LOOSE_GAP * y[:, open_].square().sum(0) / (2 * self.rows)).sum())
        if wide:
            raise ArithmeticError(
                f"{wide} of {y.shape[1]} outputs are not fitted after {_MOST_SWEEPS} sweeps. Use a larger `strength`, "
                'or `penalty="ridge"`.'
            )
        weights[:, open_] = w
        return weights

    def _sweep(self, w: Tensor, residual: Tensor, penalty: Tensor) -> None:
        """Move every coordinate once, in place."""
        for i, (column, norm) in enumerate(zip(self.columns, self.norms, strict=True)):
            if norm == 0:
                continue
            pull = (column @ residual) / self.rows + norm * w[i]
            moved = (pull.abs() - penalty).clamp(min=0) * pull.sign() / norm
            step = moved - w[i]
            if step.any():
                residual.addr_(column, step, alpha=-1)
                w[i] = moved

    def _gap(self, y: Tensor, w: Tensor, residual: Tensor, penalty: Tensor) -> Tensor:
        """Distance of each objective to a lower bound of its minimum, ``(q,)``."""
        steepest = (self.columns @ residual).abs().amax(0) / self.rows
        feasible = residual * (penalty / steepest.clamp(min=torch.finfo(y.dtype).tiny)).clamp(max=1)
        primal = residual.square().sum(0) / (2 * self.rows) + penalty * w.abs().sum(0)
        gap: Tensor = primal - (y.square() - (y - feasible).square()).sum(0) / (2 * self.rows)
        return gap
