"""Shakespeare nanoGPT: a GPT of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from classifier import with_schedule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin, ModelOutput

WARM_UP = 100 / 5000  # share of the run
LEAST = 0.1  # of the learning rate, at the end


class MeanTokenMargin(ModelOutput):
    r"""Margin of a sequence, :math:`f = \log\frac{p}{1-p}` with ``p`` the geometric mean of its tokens' probabilities.

    It is what dattri's benchmark attributes; the training loss of a sequence is :math:`-\log p = \log(1 + e^{-f})`.
    """

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """From logits ``(b, L, v)`` and tokens ``(b, L)``, ``(b,)``."""
        loss = self.loss(outputs, targets)
        return -loss - torch.log(-torch.expm1(-loss))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        right = logits.gather(2, targets.unsqueeze(2)).squeeze(2)
        # Cross-entropy, from margins: log-softmax rounds that of a fitted token to 0, and its margin is infinite.
        others = logits.scatter(2, targets.unsqueeze(2), float("-inf")).logsumexp(2)
        return F.softplus(others - right).mean(1)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -torch.expm1(-self.loss(outputs, targets))

    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(outputs, targets)
        return -torch.expm1(-loss) * torch.exp(-loss)


class NanoGPT(AttributionMixin, L.LightningModule):
    """Pre-norm, no biases, the output layer tied to the embedding: 10.65M parameters without the positions'.

    Args:
        vocabulary: number of characters.
        block: characters of a sequence.
        layers: transformer blocks.
        heads: of each attention.
        width: of the residual stream.
        dropout: of embeddings, attention weights and residual branches.
        learning_rate: at the end of the warm-up.
    """

    model_output = MeanTokenMargin()

    def __init__(
        self,
        vocabulary: int,
        block: int = 256,
        layers: int = 6,
        heads: int = 6,
        width: int = 384,
        dropout: float = 0.2,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                end_of_branch = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if end_of_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # Positions are looked up for each sample: every use of a parameter then belongs to one sample.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return with_schedule(self, torch.optim.AdamW(groups, self.learning_rate, betas=(0.9, 0.99)), warm_cosine)


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Every position attends to itself and those before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))


def warm_cosine(progress: float) -> float:
    """Linear up, then a half cosine down to a tenth."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
