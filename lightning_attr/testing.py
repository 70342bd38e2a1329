"""Checks that a user can call on a model output, or a gradient rule, of their own."""

from lightning_attr.gradients.check import check_gradient_rule
from lightning_attr.outputs.check import check_model_output

__all__ = ["check_gradient_rule", "check_model_output"]
