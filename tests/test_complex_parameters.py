"""Complex parameters beside the same network with pairs of real ones: gradients multiply as pairs."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.methods import (
    GAS,
    LESS,
    TRAK,
    AttributionMethod,
    GradCos,
    GradDot,
    Influence,
    ProjectedInfluence,
    TracIn,
)
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector, KroneckerProjector

N = 12
X, Y = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


class Spectral(AttributionMixin, L.LightningModule):
    """A filter in Fourier space and a complex linear layer; ``real`` keeps both as pairs."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            spectral, mixed = torch.randn(3, 4, dtype=torch.cfloat), torch.randn(4, 4, dtype=torch.cfloat)
            self.head = nn.Linear(6, 3)
        if real:
            self.spectral = nn.Parameter(torch.view_as_real(spectral).clone())
            self.mix = nn.ParameterDict({"weight": nn.Parameter(torch.view_as_real(mixed).clone())})
        else:
            self.spectral = nn.Parameter(spectral)
            self.mix = nn.Linear(4, 4, bias=False, dtype=torch.cfloat)
            self.mix.weight.data.copy_(mixed)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.mix, nn.Linear):
            h = self.mix(torch.fft.rfft(x, dim=1) @ self.spectral)
        else:
            spectral, mixed = torch.view_as_complex(self.spectral), torch.view_as_complex(self.mix["weight"])
            h = F.linear(torch.fft.rfft(x, dim=1) @ spectral, mixed)
        return self.head(torch.fft.irfft(h, n=6, dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def _attributed(real: bool, method: AttributionMethod, folder: Any) -> Any:
    loader = DataLoader(TensorDataset(X, Y), 4)
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(folder / f"{real}", method=method, log=False)])
    trainer.fit(Spectral(real), loader)
    return trainer.attribute(targets="train")


@pytest.mark.parametrize(
    "method",
    [
        GradDot(exact=True),
        GradCos(exact=True),
        TRAK(exact=True),
        TracIn(projector=IdentityProjector()),
        GAS(projector=IdentityProjector()),
        LESS(projector=IdentityProjector()),
        ProjectedInfluence(IdentityProjector()),
        TRAK(projector=KroneckerProjector(4096)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_scores_are_those_of_the_real_twin(method: AttributionMethod, tmp_path: Any) -> None:
    found, expected = (_attributed(real, method, tmp_path) for real in (False, True))
    scale = expected.scores.values.abs().max().item()
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=0, atol=2e-3 * scale)
    torch.testing.assert_close(found.self_influence, expected.self_influence, rtol=5e-3, atol=2e-3 * scale)


def test_a_layout_counts_pairs() -> None:
    assert ParameterLayout.of(Spectral(real=False)).shapes == {
        "spectral": (3, 4, 2),
        "head.weight": (3, 6),
        "head.bias": (3,),
        "mix.weight": (4, 4, 2),
    }


def test_curvatures_name_the_complex_parameter() -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)
    with pytest.raises(AttributionError, match="`spectral` of Spectral is a complex parameter"):
        quiet_trainer().attribute(
            model=Spectral(real=False), train_dataloaders=loader, targets="train", method=Influence()
        )
