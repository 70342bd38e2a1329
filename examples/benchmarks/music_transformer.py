"""MAESTRO Music Transformer: events of piano performances, with attention that knows how far apart two events are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
import torch
from midi import PAD, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin


class MusicTransformer(AttributionMixin, L.LightningModule):
    """Post-norm, with sinusoidal and relative positions (Huang et al., 2019): 13.1M parameters.

    Training predicts every event of a sequence. What is attributed is the margin of its last event, as in dattri's
    benchmark.

    Args:
        length: events of the longest sequence.
        layers: transformer blocks.
        heads: of each attention.
        width: of the residual stream.
        hidden: of the perceptrons.
        dropout: of embeddings, attention weights, hidden units and residual branches.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        length: int = 256,
        layers: int = 6,
        heads: int = 8,
        width: int = 512,
        hidden: int = 1024,
        dropout: float = 0.1,
        learning_rate: float = 1e-4,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.events = nn.Embedding(VOCABULARY, width)
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(length, heads, width, hidden, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, events: Tensor) -> Tensor:
        x = self.dropout(self.events(events) + self.positions[: events.shape[1]])
        return self.head(self.norm(self.blocks(x)))

    def attribution_step(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        events, following = batch
        return self(events)[:, -1], following[:, -1]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        events, following = batch
        return F.cross_entropy(self(events).flatten(0, 1), following.flatten(), ignore_index=PAD)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate, betas=(0.9, 0.98), eps=1e-8)


class Block(nn.Module):
    """Attention and a perceptron, each added to its input and then normalised."""

    def __init__(self, length: int, heads: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = RelativeAttention(length, heads, width, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class RelativeAttention(nn.Module):
    r"""Causal attention with :math:`q_i \cdot (k_j + e_{i-j})`, the rows :math:`e` shared by the heads of a layer.

    Memory is that of plain attention: all products with the rows come from one matrix product, and are then shifted
    into place (the skewing of Huang et al., 2019, section 3.4.1).
    """

    def __init__(self, length: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.length, self.heads = length, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distances = nn.Embedding(length, width // heads)  # its last row is distance 0
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.distances.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Looked up for each sample: every use of a parameter then belongs to one sample.
        farthest_first = torch.arange(self.length - length, self.length, device=x.device).expand(b, length)
        relative = skew(q @ self.distances(farthest_first).unsqueeze(1).transpose(2, 3))
        logits = (q @ k.transpose(2, 3) + relative) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(logits.masked_fill(future, float("-inf")).softmax(-1))
        attended = (weights @ v).transpose(1, 2).flatten(2)
        return self.dropout(self.out(attended))


def skew(products: Tensor) -> Tensor:
    """Shift ``(..., L, L)`` from columns by distance, farthest first, to columns by position; the future is garbage."""
    *lead, length, _ = products.shape
    return F.pad(products, (1, 0)).view(*lead, length + 1, length)[..., 1:, :]


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines of wavelengths from 2 pi to 10,000 times as much (Vaswani et al., 2017)."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
