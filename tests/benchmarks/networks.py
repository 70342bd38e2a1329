"""What the benchmarks featurize: networks of the kinds that people train, each with a batch of random samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits import cnn, mlp
from lightning_attr.outputs import LanguageModel, ModelOutput, MulticlassMargin

VOCABULARY, LENGTH, WIDTH, HEADS, CLASSES = 128, 64, 192, 6, 10
BERT_VOCABULARY, BERT_LENGTH = 2000, 32
GPT2_LENGTH, MT5_LENGTHS = 128, (64, 16)  # the encoder's and the decoder's
CAPTION_LENGTH, CAPTION_WIDTH = 8, 32


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(outputs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.norm3(self.shortcut(x)))


class ResNet9(nn.Module):
    """The ResNet-9 of dattri's CIFAR benchmark (Deng et al. 2024), without its dropout: 4.8M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(ResidualBlock(64, 128, 1), ResidualBlock(128, 256, 2), ResidualBlock(256, 512, 2))
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]  # as torch types calls


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Four causal blocks over 64 tokens, classifying by the last: 1.8M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.blocks(self.tokens(ids) + self.positions(positions))
        return self.head(self.norm(x[:, -1]))  # type: ignore[no-any-return]


class Bert(nn.Module):
    """BertForSequenceClassification of transformers, 2 layers of width 128, giving its logits: 0.7M parameters."""

    def __init__(self) -> None:
        super().__init__()
        # Imported here: it takes seconds, and only this needs it.
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=BERT_VOCABULARY,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=64,
            num_labels=CLASSES,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=mask).logits  # type: ignore[no-any-return]


class Gpt2(nn.Module):
    """GPT2LMHeadModel of transformers, 2 layers of width 128, giving its logits: 0.7M parameters."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"vocab_size": BERT_VOCABULARY, "n_positions": GPT2_LENGTH, "n_embd": 128, "n_layer": 2, "n_head": 2}
        config = GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0, use_cache=False)
        self.gpt2 = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt2(input_ids=ids).logits  # type: ignore[no-any-return]


class Mt5(nn.Module):
    """MT5ForConditionalGeneration of transformers, giving its logits: 1.0M parameters."""

    def __init__(self, width: int = 128, layers: int = 2, vocabulary: int = BERT_VOCABULARY) -> None:
        super().__init__()
        from transformers import MT5Config, MT5ForConditionalGeneration

        sizes = {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": 64,
            "d_ff": 2 * width,
            "num_layers": layers,
            "num_heads": width // 64,
        }
        config = MT5Config(**sizes, dropout_rate=0.0, tie_word_embeddings=False, use_cache=False)
        self.mt5 = MT5ForConditionalGeneration(config)

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        return self.mt5(input_ids=ids, decoder_input_ids=decoder_ids).logits  # type: ignore[no-any-return]


def _padded_text(n: int) -> tuple[Tensor, Tensor]:
    """Sequences of 8 to 32 tokens, padded to 32."""
    mask = (torch.arange(BERT_LENGTH) < torch.randint(8, BERT_LENGTH + 1, (n, 1))).long()
    return torch.randint(1, BERT_VOCABULARY, (n, BERT_LENGTH)) * mask, mask


def unet(size: int, channels: tuple[int, int], **changes: Any) -> nn.Module:
    """UNet2DModel of diffusers for `size` x `size` pixels of one channel, without attention unless it is asked for."""
    from diffusers import UNet2DModel

    options = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    sizes = {"sample_size": size, "in_channels": 1, "out_channels": 1, "block_out_channels": channels}
    return UNet2DModel(**(sizes | options | changes))  # type: ignore[no-any-return]


def conditioned_unet() -> nn.Module:
    """UNet2DConditionModel of diffusers for 16 x 16 latents of four channels, attending to a caption's states."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CAPTION_WIDTH,
    )


@dataclass(frozen=True)
class Job:
    """A network in eval mode and one batch for it, on one device; `model_output` is None if it removes noise."""

    network: nn.Module
    inputs: tuple[Tensor, ...]
    labels: Tensor
    model_output: ModelOutput | None

    @property
    def batch_size(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> str:
        return self.labels.device.type

    def linears(self) -> list[str]:
        """The names of its linear layers; the last is the output layer."""
        return [name for name, layer in self.network.named_modules() if isinstance(layer, nn.Linear)]


@dataclass(frozen=True)
class Work:
    """A network, its inputs, the batch size, and how many passes over the batch are timed together.

    A language model has a label for each of the `length` tokens that it predicts. A diffusion model `denoises` its
    first input and has no use for labels: its pass is one draw of a timestep and a noise a sample.
    """

    title: str
    network: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batch_size: int
    passes: int
    length: int | None = None
    denoises: bool = False

    def job(self, device: str) -> Job:
        """Make the network and its batch, the same each time."""
        torch.manual_seed(0)
        network = self.network().to(device).eval()
        inputs = tuple(x.to(device) for x in self.inputs(self.batch_size))
        shape = (self.batch_size,) if self.length is None else (self.batch_size, self.length)
        labels = torch.randint(CLASSES, shape, device=device)
        output = MulticlassMargin() if self.length is None else LanguageModel(shift=False)
        return Job(network, inputs, labels, None if self.denoises else output)


WORKS = {
    "resnet9": Work("ResNet-9, 4.8M parameters, 32x32", ResNet9, lambda n: (torch.randn(n, 3, 32, 32),), 32, 1),
    "transformer": Work(
        "transformer, 1.8M parameters, 64 tokens",
        Transformer,
        lambda n: (torch.randint(VOCABULARY, (n, LENGTH)),),
        32,
        1,
    ),
    "bert": Work("BERT of transformers, 0.7M parameters, padded to 32", Bert, _padded_text, 32, 2),
    "gpt2": Work(
        "GPT-2 of transformers, 0.7M parameters, 128 tokens",
        Gpt2,
        lambda n: (torch.randint(BERT_VOCABULARY, (n, GPT2_LENGTH)),),
        8,
        1,
        GPT2_LENGTH,
    ),
    "mt5": Work(
        "MT5 of transformers, 1.0M parameters, 64 and 16 tokens",
        Mt5,
        lambda n: tuple(torch.randint(1, BERT_VOCABULARY, (n, length)) for length in MT5_LENGTHS),
        16,
        1,
        MT5_LENGTHS[1],
    ),
    "mt5-wide": Work(
        "MT5 of transformers, 7.3M parameters, 128 and 32 tokens",
        lambda: Mt5(256, 4, 4000),
        lambda n: tuple(torch.randint(1, 4000, (n, 2 * length)) for length in MT5_LENGTHS),
        16,
        1,
        2 * MT5_LENGTHS[1],
    ),
    "unet": Work(
        "UNet2DModel of diffusers, 1.0M parameters, 16x16",
        lambda: unet(
            16,
            (32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda n: (torch.randn(n, 1, 16, 16),),
        16,
        1,
        denoises=True,
    ),
    "unet-captions": Work(
        "UNet2DConditionModel of diffusers, 1.1M parameters, 16x16",
        conditioned_unet,
        lambda n: (torch.randn(n, 4, 16, 16), torch.randn(n, CAPTION_LENGTH, CAPTION_WIDTH)),
        16,
        1,
        denoises=True,
    ),
    "unet-8x8": Work(
        "UNet2DModel of diffusers, 40k parameters, 8x8",
        lambda: unet(8, (8, 16), layers_per_block=1, norm_num_groups=4),
        lambda n: (torch.randn(n, 1, 8, 8),),
        32,
        2,
        denoises=True,
    ),
    "mlp": Work("MLP 64-128-64-10, 17k parameters", mlp, lambda n: (torch.rand(n, 64),), 256, 16),
    "cnn": Work("digits CNN, 10k parameters", cnn, lambda n: (torch.rand(n, 1, 8, 8),), 64, 4),
}
