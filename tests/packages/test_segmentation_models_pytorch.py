"""segmentation-models-pytorch: the module of its own notebook.

With a loss that is a mean over samples two lines are enough. The notebook's Dice loss is one quotient of sums over the
whole batch: the mixin says what it is for one sample.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from checks import QUIET, check_scores, train_both
from lightning_attr import AttributionMixin
from lightning_attr.outputs import NegativeLoss

pytest.importorskip("segmentation_models_pytorch")
import segmentation_models_pytorch as smp

ROWS = [0, 5, 11]


def pets(n: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(256, (3, 64, 64), generator=generator).float(),
            "mask": (torch.rand(1, 64, 64, generator=generator) > 0.2 + 0.5 * i / n).float(),
        }
        for i in range(n)
    ]


class PetModel(L.LightningModule):
    """examples/binary_segmentation_intro.ipynb."""

    def __init__(self, loss: Any, arch: str = "Unet") -> None:
        super().__init__()
        self.model = smp.create_model(
            arch, encoder_name="timm-mobilenetv3_small_minimal_100", encoder_weights=None, in_channels=3, classes=1
        )
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.loss_fn = loss
        self.training_step_outputs: list[Any] = []

    def forward(self, image: Tensor) -> Tensor:
        return self.model((image / 255 - self.mean) / self.std)

    def shared_step(self, batch: Any) -> dict[str, Tensor]:
        image, mask = batch["image"], batch["mask"]
        assert image.ndim == 4
        assert mask.max() <= 1.0
        logits_mask = self.forward(image)
        loss = self.loss_fn(logits_mask, mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).float()
        tp, fp, fn, tn = smp.metrics.get_stats(pred_mask.long(), mask.long(), mode="binary")
        return {"loss": loss, "tp": tp, "fp": fp, "fn": fn, "tn": tn}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        train_loss_info = self.shared_step(batch)
        self.training_step_outputs.append(train_loss_info)
        return train_loss_info

    def on_train_epoch_end(self) -> None:
        stats = [torch.cat([x[key] for x in self.training_step_outputs]) for key in ("tp", "fp", "fn", "tn")]
        self.log("train_iou", smp.metrics.iou_score(*stats, reduction="micro-imagewise"))
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


dice = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)


class DicePetModel(AttributionMixin, PetModel):
    model_output = NegativeLoss(lambda outputs, masks: torch.stack([*map(dice, outputs, masks)]))

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch["image"]), batch["mask"]


def train_with(module: Any, data: Any) -> Any:
    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(module(), DataLoader(data, batch_size=4, shuffle=True))
        return trainer

    return train_both(train)


def test_loss_of_means() -> None:
    data = pets()
    trainer = train_with(lambda: PetModel(smp.losses.SoftBCEWithLogitsLoss()), data)
    check_scores(trainer, ROWS, DataLoader(data), target_dataloaders=DataLoader(Subset(data, ROWS)))


def test_dice_loss_with_the_mixin() -> None:
    data = pets()
    trainer = train_with(lambda: DicePetModel(dice), data)
    check_scores(trainer, ROWS, DataLoader(data), target_dataloaders=DataLoader(Subset(data, ROWS)))
