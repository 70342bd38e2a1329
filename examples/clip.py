"""Find wrong captions in the training pairs of a CLIP, and retrain without the suspicious.

scikit-learn's digits with captions ("the digit seven"), a tenth of them of another digit, and a tiny CLIPModel of
transformers that is trained on them from scratch. Run `python examples/clip.py`; takes about a minute.
"""

import logging
import math
import tempfile
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import CLIPConfig, CLIPModel

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.modalities import ContrastiveMixin

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ("a {}", "the digit {}")
WORDS = ["<pad>", "<start>", "<end>", "a", "the", "digit", *NAMES]
EPOCHS, SEEDS = 30, (1, 2, 3)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def tokens(captions: list[str]) -> dict[str, Tensor]:
    """Word numbers, padded to five."""
    ids = torch.zeros(len(captions), 5, dtype=torch.int64)
    for row, caption in zip(ids, captions, strict=True):
        found = [1, *(WORDS.index(word) for word in caption.split()), 2]
        row[: len(found)] = torch.tensor(found)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class CaptionedDigits(Dataset):
    """Images of 8 x 8 pixels, enlarged to 16 x 16, each with a caption of one of the digits given."""

    def __init__(self, images: Tensor, digits: Tensor) -> None:
        self.images = images.float().view(-1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3) / 8 - 1
        self.captions = [TEMPLATES[i % len(TEMPLATES)].format(NAMES[digit]) for i, digit in enumerate(digits.tolist())]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return self.images[i], self.captions[i]


def collate(pairs: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
    images, captions = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(images), **tokens(list(captions))}


def loader(pairs: Dataset) -> DataLoader:
    return DataLoader(pairs, batch_size=32, shuffle=True, collate_fn=collate)


class LitCLIP(ContrastiveMixin, L.LightningModule):
    """For a CLIPModel as `self.model` the mixin needs nothing else."""

    attribution_negatives = 100

    def __init__(self) -> None:
        super().__init__()
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        text = {**tower, **ends, "vocab_size": len(WORDS), "max_position_embeddings": 5}
        vision = {**tower, "image_size": 16, "patch_size": 8, "num_channels": 1}
        self.model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, return_loss=True).loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def zero_shot(module: LitCLIP, images: Tensor, digits: Tensor) -> float:
    """Share of images that are nearest to the captions of their digit."""
    captions = [template.format(name) for template in TEMPLATES for name in NAMES]
    texts = module.eval().embed({"pixel_values": images[: len(captions)], **tokens(captions)})[1]
    found = module.embed({"pixel_values": images, **tokens(["a one"] * len(images))})[0]
    nearest = (found @ texts.view(len(TEMPLATES), 10, -1).mean(0).T).argmax(1)
    return (nearest == digits).double().mean().item()


def accuracy_of(pairs: Dataset, test: CaptionedDigits, digits: Tensor, seed: int) -> float:
    """Train from scratch, and test."""
    L.seed_everything(seed, verbose=False)
    module = LitCLIP()
    L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET).fit(module, loader(pairs))
    return zero_shot(module, test.images, digits)


def main() -> None:
    torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images, test_images, digits, test_digits = train_test_split(x, y, train_size=480, random_state=0)
    n, generator = len(digits), torch.Generator().manual_seed(0)
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: n // 10]] = True
    captioned = torch.where(wrong, (digits + torch.randint(1, 10, (n,), generator=generator)) % 10, digits)
    train, test = CaptionedDigits(images, captioned), CaptionedDigits(test_images, test_digits)

    L.seed_everything(0, verbose=False)
    module = LitCLIP()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [AttributionCallback(folder, noise_mask=wrong)]
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, **QUIET)
        trainer.fit(module, loader(train))
        print(f"Zero-shot accuracy of the model that is attributed: {zero_shot(module, test.images, test_digits):.3f}")
        targets = DataLoader(Subset(test, range(20)), batch_size=20, collate_fn=collate)
        result = trainer.attribute(target_dataloaders=targets)

    print("Which captions are wrong?      self-influence   loss of the simulated batch")
    for name, key in {"AUROC": "noisy_label_auroc", "Found in the top 10 %": "noisy_label_recall@10%"}.items():
        print(f"  {name:28s} {result.metrics[key]:13.3f}   {result.metrics['loss_' + key]:27.3f}")
    for j, proponents in enumerate(result.scores.topk(3)[0][:3].tolist()):
        print(f"“{test.captions[j]}” is made by {', '.join(f'“{train.captions[i]}”' for i in proponents)}")

    kept = result.select(0.9, by="self_influence").tolist()
    accuracies = []
    for seed in SEEDS:
        random = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: len(kept)].tolist()
        arms = (Subset(train, kept), Subset(train, random))
        accuracies.append([accuracy_of(arm, test, test_digits, seed) for arm in arms])
    without, at_random = (values := torch.tensor(accuracies)).mean(0).tolist()
    gain = values[:, 0] - values[:, 1]
    half = 4.303 * gain.std().item() / math.sqrt(len(SEEDS))  # Student's t with two degrees of freedom
    print(f"Zero-shot accuracy after retraining, {len(SEEDS)} seeds: {without:.3f} without the most suspicious 10 %,")
    print(f"{at_random:.3f} without a random 10 %; gain {gain.mean():+.3f}, 95 % interval ± {half:.3f}")


if __name__ == "__main__":
    main()
