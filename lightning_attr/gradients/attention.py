"""The explicit forward of attention, whose in-projections share parameters that no layer of their own holds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr.gradients.factored import OuterSum, ParameterGradient
from lightning_attr.gradients.rules import Attach, GradientRule, explicit_forward


@explicit_forward(nn.MultiheadAttention)
def multihead_attention(
    layer: nn.MultiheadAttention,
    attach: Attach,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention between batches of sequences; dropout, extra keys (``bias_k``) and single sequences are left alone."""
    dropout = layer.training and layer.dropout > 0
    if query.ndim != 3 or query.is_nested or dropout or layer.bias_k is not None or layer.add_zero_attn:
        return type(layer).forward(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    q, k, v = (_heads(x, layer.num_heads) for x in _in_projections(layer, attach, query, key, value))
    # `is_causal` only says what `attn_mask` is.
    context, weights = _attend(q, k, v, key_padding_mask, attn_mask, need_weights)
    output: Tensor = layer.out_proj(context.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return output if layer.batch_first else output.transpose(0, 1), weights


def _in_projections(
    layer: nn.MultiheadAttention, attach: Attach, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Project to queries, keys and values, each ``(b, s, embed_dim)``: at once for self-attention, else one by one."""
    itself = query is key and key is value
    inputs = [x if layer.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    if weight is not None and itself:
        rule = _projection_rule("in_proj_weight", 0, 0)
        return attach(rule, inputs[0], F.linear(inputs[0], weight, bias)).chunk(3, dim=-1)
    if weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [layer.get_parameter(name) for name in names]
    else:
        names, weights = ("in_proj_weight",) * 3, list(weight.chunk(3))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    size = layer.embed_dim
    return tuple(
        attach(_projection_rule(name, i * size, (2 - i) * size), x, F.linear(x, w, b))
        for i, (name, x, w, b) in enumerate(zip(names, inputs, weights, biases, strict=True))
    )


def _projection_rule(name: str, before: int, after: int) -> GradientRule:
    """Make the rule of a projection that owns the rows of a packed weight between ``before`` and ``after`` others."""

    def rule(_: nn.MultiheadAttention, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        delta = F.pad(backprops, (before, after))
        rows = delta if name == "in_proj_weight" else backprops
        return {name: OuterSum(rows, activations), "in_proj_bias": delta.sum(1)}

    return rule


def _heads(values: Tensor, num_heads: int) -> Tensor:
    """Split ``(b, s, heads * d)`` into ``(b, heads, s, d)``."""
    split: Tensor = values.unflatten(-1, (num_heads, -1))
    return split.transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend, ``(b, heads, s, d)``; the weights ``(b, heads, s, s_keys)`` only where they are needed."""
    mask = None
    if key_padding_mask is not None:
        mask = _additive(key_padding_mask, q.dtype)[:, None, None]
    if attn_mask is not None:
        bias = _additive(attn_mask, q.dtype)
        bias = bias.unflatten(0, (-1, q.shape[1])) if bias.ndim == 3 else bias
        mask = bias if mask is None else mask + bias
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask), None
    logits = (q / math.sqrt(q.shape[-1])) @ k.mT
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask that is true where attention is forbidden into one to add; a float mask is one already."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
