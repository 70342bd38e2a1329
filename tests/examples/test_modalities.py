"""The data of the examples of further modalities."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def example(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", repository / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_captions_name_the_digit_and_fit_the_model(repository: Path) -> None:
    pytest.importorskip("transformers", minversion="4.57", reason="needs transformers")
    clip = example(repository, "clip")
    pairs = clip.CaptionedDigits(torch.arange(128.0).view(2, 64) / 8, torch.tensor([7, 3]))
    assert pairs.captions == ["a seven", "the digit three"]
    batch = clip.collate([pairs[0], pairs[1]])
    assert batch["input_ids"][:, 0].tolist() == [1, 1]
    assert [[clip.WORDS[i] for i in row if i > 2] for row in batch["input_ids"].tolist()] == [
        caption.split() for caption in pairs.captions
    ]
    assert clip.LitCLIP().training_step(batch, 0).isfinite()


def test_a_tenth_of_the_masks_lie_off(repository: Path) -> None:
    segmentation = example(repository, "segmentation")
    train, test, wrong = segmentation.masked_digits()
    assert (len(train), len(test), int(wrong.sum())) == (200, 500, 20)
    x, mask = train.tensors
    agreement = ((x.squeeze(1) > 0.5) == mask.bool()).double().mean((1, 2))
    assert agreement[~wrong].min() > agreement[wrong].mean()
    assert segmentation.UNet()(x[:2]).shape == (2, 1, 8, 8)
