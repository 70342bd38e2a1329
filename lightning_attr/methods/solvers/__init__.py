"""The curvature of the training objective, and the ways to apply its inverse."""

from lightning_attr.methods.solvers.base import Inverse, Solver

__all__ = ["Inverse", "Solver"]
