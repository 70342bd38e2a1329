"""The functional forms of layers: `F.linear(x, weight)` has the gradients of `nn.Linear`, by the same rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F

from lightning_attr.gradients.convolution import convolution, transposed_convolution
from lightning_attr.gradients.direct_use.use import Handler, Use, handles
from lightning_attr.gradients.embedding import embedding
from lightning_attr.gradients.linear import linear, prelu
from lightning_attr.gradients.normalisation import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from lightning_attr.gradients.rules import GradientRule

_CONVOLUTION = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_ONE = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


def by_rule(rule: GradientRule, names: str, **constants: Any) -> Handler:
    """Make the handler of the functional form of a layer, by the rule of the layer."""

    def handle(use: Use) -> Any:
        given = {**constants, **dict(zip(names.split(), use.args, strict=False)), **use.kwargs}
        x = given["input"]
        values = {local: given[local] for local in ("weight", "bias") if use.is_derived(given.get(local))}
        known = use.is_batch(x) and x.ndim >= 2 and len(use.rows) == 1 and len(values) == len(use.derived)
        if not known or given.get("training") or given.get("max_norm") or given.get("scale_grad_by_freq"):
            return NotImplemented
        weight = given.get("weight")
        if weight is not None:
            layer = {"kernel_size": weight.shape[2:], "num_embeddings": len(weight), "num_parameters": weight.numel()}
            dims = len(layer["kernel_size"])
            if "stride" in given and x.ndim != dims + 2:
                return NotImplemented  # a single sample
            for key in ("stride", "padding", "dilation"):
                if isinstance(given.get(key), int):
                    given[key] = (given[key],) * dims
            given |= layer
        if given.get("padding_idx") is not None:
            given["padding_idx"] %= len(given["weight"])
        given["training"] = given.get("use_input_stats", False)
        return use.mode.attach(values, rule, SimpleNamespace(**given), x, use.run_detached())

    return handle


handles(F.linear)(by_rule(linear, "input weight bias"))
handles(F.embedding)(
    by_rule(embedding, "input weight padding_idx max_norm norm_type scale_grad_by_freq", padding_idx=None)
)
handles(F.conv1d, F.conv2d, F.conv3d)(by_rule(convolution, _CONVOLUTION, **_ONE))
handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)(
    by_rule(transposed_convolution, _TRANSPOSED, **_ONE)
)
handles(F.layer_norm)(by_rule(layer_norm, "input normalized_shape weight bias eps", eps=1e-5))
handles(F.rms_norm)(by_rule(rms_norm, "input normalized_shape weight eps", eps=None))
handles(F.group_norm)(by_rule(group_norm, "input num_groups weight bias eps", eps=1e-5))
handles(F.batch_norm)(
    by_rule(batch_norm, "input running_mean running_var weight bias training momentum eps", training=False, eps=1e-5)
)
handles(F.instance_norm)(
    by_rule(
        instance_norm,
        "input running_mean running_var weight bias use_input_stats momentum eps",
        running_mean=None,
        running_var=None,
        use_input_stats=True,
        eps=1e-5,
    )
)
handles(F.prelu)(by_rule(prelu, "input weight"))
