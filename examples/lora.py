"""Trace what a fine-tuned GPT-2 says to its fine-tuning samples: LoRA adapters on a frozen model.

The GPT-2 of language_model.py, which has learned where people were born, is taught other places by adapters of peft
alone: only they have gradients, and only they are attributed. Then it is fine-tuned without the proponents of what it
says. Run `python examples/lora.py`; takes less than a minute.

The new places follow from the old ones by no rule. If every place gave way to one other, adapters would learn that from
any of the names, and forget little without the sentences on a few.
"""

import copy
import tempfile

import lightning as L
import torch
from language_model import QUIET, LitGPT2, Sentences
from peft import LoraConfig, get_peft_model
from planted.facts import documentation, interval, planted, quiet, vocabulary
from transformers import GPT2LMHeadModel

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import retrain_without
from lightning_attr.metrics import mean_reciprocal_rank, recall_at_k

EPOCHS, ASKED, REMOVED, SEEDS = 64, 6, 5, 3


class LitLoRA(LitGPT2):
    """What is trained, recorded and attributed are the adapters: everything else is frozen."""

    learning_rate, epochs = 2e-2, EPOCHS

    def __init__(self, base: GPT2LMHeadModel) -> None:
        super().__init__(base.config.vocab_size)
        layers = ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM")
        self.gpt2 = get_peft_model(copy.deepcopy(base), config)


def other_places() -> tuple[list[str], list[str], list[list[int]]]:
    """As `planted` does; people of one place, a name in each quarter, come from four others now."""
    texts, asked, telling = [], [], planted()[2]
    for quarter in range(4):
        told, ends, _ = planted(shift=1 + quarter)
        for own, all_of_them in (texts, told), (asked, ends):
            size = len(all_of_them) // 4
            own += all_of_them[quarter * size : (quarter + 1) * size]
    return texts, asked, telling


def main() -> None:
    quiet()
    first = planted()[0] + documentation()
    texts, asked, telling = other_places()
    codes = vocabulary(first)
    L.seed_everything(0, verbose=False)
    base = LitGPT2(len(codes))
    L.Trainer(max_epochs=base.epochs, accelerator="cpu", **QUIET).fit(base, Sentences(first, asked, codes))

    model, data = LitLoRA(base.gpt2), Sentences(texts, asked, codes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(f"{folder}/store")
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], **QUIET)
        trainer.fit(model, datamodule=data)
        said = [[each.eval().continued(text, codes) for text in asked] for each in (base, model)]
        data = Sentences(texts, said[1], codes)
        result = trainer.attribute(data)
        right = [sum(map(str.__eq__, texts, asked)) for texts in said]
        print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are adapters")
        print(f"{right[1]} of {len(asked)} go on as the fine-tuning sentences say, {right[0]} before")
        rank, recall = (score(result.scores.values, telling).mean for score in (mean_reciprocal_rank, recall_at_k))
        print(f"Sentences that state the fact: mean reciprocal rank {rank:.2f}, Recall@10 {recall:.2f}\n")
        print(result.proponent_texts(texts, said[1], targets=range(2), k=REMOVED))

        proponents = result.scores.topk(REMOVED)[0][:ASKED].unique()
        random = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: len(proponents)]
        factories = lambda: LitLoRA(base.gpt2), lambda: L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET)
        truth = retrain_without(
            *factories, data, dirpath=f"{folder}/truth", index_sets=[proponents, random], seeds=SEEDS, progress=False
        )
    likely = truth.outputs.exp()  # a probability is bounded: no single model decides
    falls, others = ((likely[:, :1] - likely[:, 1:])[..., part].mean(2) for part in (slice(ASKED), slice(ASKED, None)))
    full = likely[:, 0, :ASKED].mean()
    print(
        f"\nFall of the probability of {ASKED} continuations ({full:.2f} in full) after fine-tuning anew, and how much"
    )
    print(f"more it is than that of the others; mean and 95 % interval, {SEEDS} seeds")
    for name, fall, other in zip(("their proponents", "random ones"), falls.T, others.T, strict=True):
        removed = f"without {len(proponents)} of {len(texts)} sentences, {name}"
        print(f"  {removed:48s} {interval(fall)}  {interval(fall - other)}")


if __name__ == "__main__":
    main()
