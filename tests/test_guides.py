"""The code of the guides runs as it stands, with a module and loaders in place of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cases import QUIET, loader_of


class LibraryModule(L.LightningModule):
    """The loss weighs a batch as a whole, so that the mixin is needed; a dict batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch["x"]) - batch["y"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_your_module(repository: Path) -> None:
    text = (repository / "examples" / "guides" / "your_module.md").read_text()
    two_lines, mixin, mode, rehearsal = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    data = [{"x": torch.randn(3), "y": torch.randn(2)} for _ in range(8)]
    names: dict[str, Any] = {
        "Trainer": lambda **settings: L.Trainer(**{**QUIET, **settings}),
        "LibraryModule": LibraryModule,
        "module": LibraryModule(),
        "train_loader": loader_of(data, 4, shuffle=True),
        "target_loader": loader_of(data[:3]),
    }
    exec(two_lines, names)
    assert names["result"].scores.shape == (8, 3)

    exec(mixin, names)
    names["module"] = names["Mine"]()
    exec(two_lines.replace('"attribution"', '"of the mixin"'), names)
    assert names["result"].scores.shape == (8, 3)

    exec(f"callback = {mode}", names)
    assert names["callback"].mode == "train"
    exec(rehearsal, names)
    assert len(text.splitlines()) < 200
