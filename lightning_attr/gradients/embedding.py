"""Gradient rules of tables of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_attr.gradients.factored import GatherSum, ParameterGradient
from lightning_attr.gradients.linear import positions
from lightning_attr.gradients.rules import Attach, explicit_forward, gradient_rule


@gradient_rule(nn.Embedding)
def embedding(layer: nn.Embedding, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Rows of a table; the padding row has no gradient."""
    ids, delta = activations.flatten(1) if activations.ndim > 1 else activations.unsqueeze(1), positions(backprops)
    if layer.padding_idx is not None:
        delta = delta.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0)
    return {"weight": GatherSum(ids, delta, layer.num_embeddings)}


def _weighted_sum(layer: nn.EmbeddingBag, ids: Tensor, weights: Tensor) -> Tensor:
    """What the layer gives; torch 2.5's own function fails where the weights have a gradient and the table has none."""
    if layer.padding_idx is not None:
        weights = weights.masked_fill(ids == layer.padding_idx, 0)
    return (weights.unsqueeze(2) * functional.embedding(ids, layer.weight)).sum(1)


@explicit_forward(nn.EmbeddingBag)
def embedding_bag(
    layer: nn.EmbeddingBag,
    attach: Attach,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Sums and means over one bag of ids a sample, ``(b, s)``; bags given by offsets and maxima are left to others."""
    plain = input.ndim == 2 and layer.max_norm is None
    if plain and per_sample_weights is not None and per_sample_weights.requires_grad:
        output = _weighted_sum(layer, input, per_sample_weights)
    else:
        output = type(layer).forward(layer, input, offsets, per_sample_weights)
    if input.ndim != 2 or layer.mode == "max":
        return output
    weights = None if per_sample_weights is None else per_sample_weights.detach()

    def rule(_: nn.EmbeddingBag, ids: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        scale = torch.ones_like(ids, dtype=backprops.dtype) if weights is None else weights.to(backprops.dtype)
        if layer.padding_idx is not None:
            scale = scale.masked_fill(ids == layer.padding_idx, 0)
        if layer.mode == "mean":
            scale = scale / scale.sum(1, keepdim=True).clamp(min=1)
        return {"weight": GatherSum(ids, scale.unsqueeze(2) * backprops.unsqueeze(1), layer.num_embeddings)}

    return attach(rule, input, output)
