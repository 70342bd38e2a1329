"""Low-level functions for plain tensors and parameter dicts, without Lightning.

Those that end in ``vp`` take ``(func, argnums)`` and return a function ``(x, v)`` of the arguments ``x`` of ``func``
and one or several vectors ``v``; those with ``at_x`` prepare one place and return a function of ``v``.
The ``damping`` of these is absolute, in the units of the curvature.
"""

from lightning_attr.features.dropout_masks import dropout_ensemble
from lightning_attr.func.ekfac import ekfac
from lightning_attr.func.groups import group_influence
from lightning_attr.func.hessian import hvp, hvp_at_x
from lightning_attr.func.inverse_fisher import ifvp_at_x_datainf, ifvp_at_x_explicit, ifvp_datainf, ifvp_explicit
from lightning_attr.func.inverse_hessian import (
    ihvp_arnoldi,
    ihvp_at_x_arnoldi,
    ihvp_at_x_cg,
    ihvp_at_x_explicit,
    ihvp_at_x_lissa,
    ihvp_cg,
    ihvp_explicit,
    ihvp_lissa,
)
from lightning_attr.func.projection import random_project

__all__ = [
    "dropout_ensemble",
    "ekfac",
    "group_influence",
    "hvp",
    "hvp_at_x",
    "ifvp_at_x_datainf",
    "ifvp_at_x_explicit",
    "ifvp_datainf",
    "ifvp_explicit",
    "ihvp_arnoldi",
    "ihvp_at_x_arnoldi",
    "ihvp_at_x_cg",
    "ihvp_at_x_explicit",
    "ihvp_at_x_lissa",
    "ihvp_cg",
    "ihvp_explicit",
    "ihvp_lissa",
    "random_project",
]
