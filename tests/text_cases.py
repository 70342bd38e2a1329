"""Tiny language models of transformers with random weights, in Lightning modules as people write them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.outputs import LanguageModel, ModelOutput, MulticlassMargin

transformers = pytest.importorskip("transformers", minversion="4.57", reason="needs transformers")

# The names of parameters that need a fallback end with one of these: the decoder of T5 in transformers 4 adds its
# distances to the scores together with a mask.
FALLBACK = ("relative_attention_bias.weight",) if int(transformers.__version__.split(".")[0]) < 5 else ()

VOCABULARY, WIDTH, CLASSES, PAD = 23, 16, 3, 0


class LitText(AttributionMixin, L.LightningModule):
    """What Lightning's own tutorial for transformers looks like."""

    def __init__(self, model: nn.Module, model_output: ModelOutput | None = None) -> None:
        super().__init__()
        self.model = model
        if model_output is not None:
            self.model_output = model_output

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def bert(attention: str = "eager") -> LitText:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
        num_labels=CLASSES,
        attn_implementation=attention,
    )
    return LitText(transformers.BertForSequenceClassification(config), MulticlassMargin())


def gpt2(attention: str = "eager", model_output: ModelOutput | None = None, length: int = 32) -> LitText:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        bos_token_id=PAD,
        eos_token_id=PAD,
        use_cache=False,
        attn_implementation=attention,
    )
    return LitText(transformers.GPT2LMHeadModel(config), model_output or LanguageModel())


def t5(kind: str = "MT5", attention: str = "eager", model_output: ModelOutput | None = None) -> LitText:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        initializer_factor=0.2,  # at 1 two layers of this width amplify rounding errors a hundredfold
        decoder_start_token_id=PAD,
        use_cache=False,
        attn_implementation=attention,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return LitText(model, model_output or LanguageModel(shift=False))


MODELS = {
    "BERT": bert,
    "GPT-2": gpt2,
    "T5": lambda attention="eager": t5("T5", attention),
    "MT5": lambda attention="eager": t5("MT5", attention),
}


def settled(module: LitText, scale: float = 0.2) -> LitText:
    """In float64 and eval mode, with no weight at a special value: zero biases, unit norms."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module.double().eval()


def samples(name: str, lengths: tuple[int, ...] = (4, 7, 3, 6, 5)) -> list[dict[str, Any]]:
    """Samples of a data set as tokenizers leave them: lists of different lengths."""
    generator = torch.Generator().manual_seed(7)

    def words(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    found = []
    for i, length in enumerate(lengths):
        ids = words(length)
        sample: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if name == "BERT":
            sample["labels"] = i % CLASSES
        elif name == "GPT-2":
            sample["labels"] = [-100, *ids[1:]]
        else:
            sample["labels"] = words(length - 1)
        found.append(sample)
    return found


def padded(found: list[dict[str, Any]], more: int = 0) -> dict[str, Tensor]:
    """What a padding collator of transformers makes of them, with further padding if asked for."""
    fill = {"input_ids": PAD, "decoder_input_ids": PAD, "attention_mask": 0, "labels": -100}
    batch = {}
    for key, first in found[0].items():
        if not isinstance(first, (list, Tensor)):
            batch[key] = torch.tensor([sample[key] for sample in found])
            continue
        size = max(len(sample[key]) for sample in found) + more
        rows = [[*sample[key], *[fill[key]] * (size - len(sample[key]))] for sample in found]
        batch[key] = torch.tensor(rows)
    return batch
