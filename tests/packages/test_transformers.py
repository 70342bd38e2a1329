"""transformers: its models, collators and schedules in a module as people write it, on a data set of `datasets`."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checks import QUIET, check_scores, train_both
from lightning_attr import AttributionMixin
from lightning_attr.outputs import LanguageModel

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
import transformers

ROWS = [0, 5, 11]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def texts(n: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 40, (4 + i % 5,), generator=generator).tolist() for i in range(n)]


class TextModule(L.LightningModule):
    """The loss is the model's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_with(module: Any, data: Any, collate: Any) -> Any:
    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(module(), DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate))
        return trainer

    return train_both(train)


def pad(key: str) -> Any:
    """A collator that pads as DataCollatorWithPadding does, which asks for a tokenizer."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = torch.tensor(row["input_ids"])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100) if key == "tokens" else torch.tensor([row["label"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_classifiers(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_labels=3)
    data = datasets.Dataset.from_dict({"input_ids": texts(), "label": [i % 3 for i in range(12)]})
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    collate = pad("classes")
    trainer = train_with(lambda: TextModule(model(config)), data, collate)
    targets = DataLoader(data.select(ROWS), batch_size=4, collate_fn=collate)
    check_scores(trainer, ROWS, DataLoader(data, collate_fn=collate), target_dataloaders=targets)


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, **sizes))


def test_language_model_of_equal_blocks() -> None:
    data = datasets.Dataset.from_dict({"input_ids": [(text * 3)[:8] for text in texts()]})
    collate = pad("tokens")
    trainer = train_with(lambda: TextModule(gpt2()), data, collate)
    targets = DataLoader(data.select(ROWS), batch_size=4, collate_fn=collate)
    check_scores(trainer, ROWS, DataLoader(data, collate_fn=collate), target_dataloaders=targets)


class CausalModule(AttributionMixin, TextModule):
    """The mean over the tokens of padded texts is no mean over texts: the mixin takes each text's own."""

    model_output = LanguageModel()

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.model(**batch).logits, batch["labels"]


def test_padded_language_model_with_the_mixin() -> None:
    data = datasets.Dataset.from_dict({"input_ids": texts()})
    collate = pad("tokens")
    trainer = train_with(lambda: CausalModule(gpt2()), data, collate)
    targets = DataLoader(data.select(ROWS), batch_size=4, collate_fn=collate)

    def loss(module: Any, batch: Any) -> Tensor:
        logits, labels = module.model(batch["input_ids"]).logits[0, :-1], batch["input_ids"][0, 1:]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    check_scores(trainer, ROWS, DataLoader(data, collate_fn=collate), target_dataloaders=targets, loss=loss)
