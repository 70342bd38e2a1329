"""Per-sample gradients: by hooks with a rule a layer type, by ``vmap(grad)``, or by a loop."""

from lightning_attr.gradients import attention, convolution, embedding, linear, normalisation  # noqa: F401 - rules
from lightning_attr.gradients.factored import (
    ConvSum,
    FactoredGradient,
    GatherSum,
    OuterSum,
    ParameterGradient,
    RowSum,
    materialise,
)
from lightning_attr.gradients.functional import loop_gradients, vmap_gradients
from lightning_attr.gradients.hooks import HookedGradients, hooked_gradients, hooked_layers
from lightning_attr.gradients.path_check import GradientPlan, check_batch_independence, plan_gradients
from lightning_attr.gradients.rules import gradient_rule, rule_for, supported_layers

__all__ = [
    "ConvSum",
    "FactoredGradient",
    "GatherSum",
    "GradientPlan",
    "HookedGradients",
    "OuterSum",
    "ParameterGradient",
    "RowSum",
    "check_batch_independence",
    "gradient_rule",
    "hooked_gradients",
    "hooked_layers",
    "loop_gradients",
    "materialise",
    "plan_gradients",
    "rule_for",
    "supported_layers",
    "vmap_gradients",
]
