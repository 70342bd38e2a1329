"""Modules that `fully_shard` divides among processes, and the same in one: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.fsdp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import blobs
from lightning_attr import AttributionMixin
from lightning_attr.outputs import LanguageModel

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

__all__ = [
    "CASES",
    "ON_CPUS",
    "CPUOffloadPolicy",
    "Divided",
    "FSDPModule",
    "MixedPrecisionPolicy",
    "fully_shard",
    "sharding",
]

ON_CPUS = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="before torch 2.6 `fully_shard` needs CUDA"
)


class Block(nn.Module):
    """Of a GPT-2 shape: attention and an MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A language model with tied embeddings."""

    def __init__(self, vocabulary: int = 11, width: int = 8, positions: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Module):
    """A parameter that no layer owns, used in ways of its own."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.square().cumsum(0).sqrt()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def lora() -> nn.Module:
    network = GPT().requires_grad_(False)
    for block in network.blocks:
        block.qkv, block.up = Adapted(block.qkv), Adapted(block.up)
    return network


def convolutions() -> nn.Module:
    shaped = nn.Unflatten(1, (1, 4))
    return nn.Sequential(
        shaped, nn.Conv1d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


def checkpointed() -> nn.Module:
    network = GPT()
    apply_activation_checkpointing(network, check_fn=lambda layer: isinstance(layer, Block))
    return network


class Divided(AttributionMixin, L.LightningModule):
    """Makes a network, and has it divided where there is a mesh."""

    def __init__(self, network: Callable[[], nn.Module], double: bool = False, **settings: Any) -> None:
        super().__init__()
        self.make, self.double_precision, self.settings = network, double, settings
        self.network: Any = None

    def configure_model(self) -> None:
        if self.network is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make()
        if self.double_precision:
            network.double()
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            layers = network.blocks if isinstance(network, GPT) else network.children()
            for layer in layers:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh, **self.settings)
            fully_shard(network, mesh=mesh, **self.settings)
        self.network = network
        if self.of_text:
            self.model_output = LanguageModel()

    @property
    def of_text(self) -> bool:
        return isinstance(self.network, GPT)

    def attribution_step(self, batch: Any) -> Any:
        return (self(batch[0]), batch[0]) if self.of_text else (self(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        if self.of_text:
            return F.cross_entropy(outputs[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())
        return F.cross_entropy(outputs, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def data(self, n: int, seed: int = 0) -> TensorDataset:
        if self.make in {mlp, convolutions, scaled}:
            x, y = blobs(n, seed).tensors
            return TensorDataset(x.double() if self.double_precision else x, y)
        return TensorDataset(torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(seed)))


def scaled() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), Scaled(nn.Linear(7, 3), 3))


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

CASES: dict[str, Callable[[], Divided]] = {
    "MLP": lambda: Divided(mlp),
    "MLP, float64": lambda: Divided(mlp, double=True, reshard_after_forward=False),
    "convolutions": lambda: Divided(convolutions, reshard_after_forward=False),
    "direct use": lambda: Divided(scaled),
    "GPT": lambda: Divided(GPT),
    "GPT, bfloat16": lambda: Divided(GPT, mp_policy=HALF),
    "GPT, checkpointed": lambda: Divided(checkpointed),
    "GPT, LoRA": lambda: Divided(lora),
}


def sharding(count: int) -> ModelParallelStrategy:
    """Divides parameters among so many processes."""
    return ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1)
