"""The lasso of one output, followed along its strengths: the solution is made of straight lines."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

_DEPENDENT = 1e-9
"""Share of a column that the active ones have to leave, or it is taken for one of their combinations."""
_MOST_TURNS = 20
"""Turns at most, as a multiple of the shorter side; four are usual."""


def follow(columns: Array, slope: Array, rows: int, penalties: Array) -> Array:
    r"""Minimise :math:`\tfrac{1}{2m} \|y - Zw\|^2 + \lambda \|w\|_1` for falling :math:`\lambda`.

    As :math:`\lambda` falls by :math:`\gamma`, the active weights move by :math:`\gamma (Z_A^\top Z_A / m)^{-1} s_A`
    with their signs s, until another column is as correlated with what is left as these are, or one of their weights
    is zero (Osborne et al., 2000). Where rounding ends that early, the last weights are given: look at the duality gap.

    Shapes: columns (n, r), slope (r,), penalties (k,). Returns weights ``(n, k)``.
    """
    found = np.zeros((len(columns), len(penalties)))
    path = _Path(columns, slope, rows)
    for number, penalty in enumerate(penalties):
        path.descend(float(penalty))
        found[:, number] = path.weights
    return found


class _Path:
    """Where the solution is."""

    def __init__(self, columns: Array, slope: Array, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self.pull = columns @ slope  # correlations with what is left
        self.level = float(np.abs(self.pull).max(initial=0.0))  # the penalty
        self.weights = np.zeros(len(columns))
        self.active: list[int] = []
        self.inverse = np.zeros((0, 0))  # of the active columns' Gram matrix
        self.free = np.ones(len(columns), dtype=bool)  # neither active nor a combination of those that are
        self.turns = _MOST_TURNS * min(columns.shape)
        self.left = -1  # the column that has just become inactive
        self.ended = self.level == 0
        if not self.ended:
            self._join(int(np.abs(self.pull).argmax()))

    def descend(self, penalty: float) -> None:
        """Go down to a penalty."""
        while not self.ended and self.level > penalty and self.active:
            signs = np.sign(self.pull[self.active])
            direction = self.inverse @ signs
            change = self.columns @ (direction @ self.columns[self.active]) / self.rows
            step, column, joins = self._turn(direction, change)
            step, arrives = (self.level - penalty, True) if step >= self.level - penalty else (step, False)
            self.weights[self.active] += step * direction
            self.pull -= step * change
            self.level -= step
            self.left = -1
            if arrives:
                return
            self.turns -= 1
            self.ended = self.turns < 0
            if joins:
                self._join(column)
            else:
                self._leave(column)

    def _turn(self, direction: Array, change: Array) -> tuple[float, int, bool]:
        """How far it is to the next turn, at which column, and whether that becomes active."""
        with np.errstate(divide="ignore", invalid="ignore"):
            above = (self.level - self.pull) / (1 - change)
            below = (self.level + self.pull) / (1 + change)
            zero = -self.weights[self.active] / direction
        if self.left >= 0:  # it is still on the edge that it came from
            (above if self.pull[self.left] > 0 else below)[self.left] = np.inf
        above[~(above >= 0) | ~self.free | (change >= 1)] = np.inf
        below[~(below >= 0) | ~self.free | (change <= -1)] = np.inf
        zero[~(zero > 0)] = np.inf
        towards = np.minimum(above, below)
        joining, leaving = int(towards.argmin()), int(zero.argmin())
        if towards[joining] <= zero[leaving]:
            return float(towards[joining]), joining, True
        return float(zero[leaving]), leaving, False

    def _join(self, column: int) -> None:
        """Make a column active: the inverse grows by a row (bordering)."""
        self.free[column] = False
        own = self.columns[column]
        beside = self.columns[self.active] @ own / self.rows
        solved = self.inverse @ beside
        norm = own @ own / self.rows
        rest = norm - beside @ solved
        if rest <= _DEPENDENT * norm:
            return  # as long as the others are active, its weight can stay zero
        size = len(self.active)
        inverse = np.empty((size + 1, size + 1))
        inverse[:size, :size] = self.inverse + np.outer(solved, solved) / rest
        inverse[size, :size] = inverse[:size, size] = -solved / rest
        inverse[size, size] = 1 / rest
        self.inverse = inverse
        self.active.append(column)

    def _leave(self, position: int) -> None:
        """Make an active column inactive."""
        column = self.active.pop(position)
        self.weights[column] = 0.0
        kept: Any = np.arange(len(self.inverse)) != position
        row = self.inverse[position, kept]
        self.inverse = self.inverse[np.ix_(kept, kept)] - np.outer(row, row) / self.inverse[position, position]
        self.free[:] = True  # what was a combination of all may be none of the others
        self.free[self.active] = False
        self.left = column
