"""The two ResNet-9 of the field: of dattri's benchmark, made of basic blocks, and of TRAK's, made for fast training."""

from __future__ import annotations

from classifier import Classifier
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlockResNet9(Classifier):
    """dattri's (Deng et al., 2024), trained without dropout: 4,825,154 parameters for two classes.

    Args:
        classes: number of classes.
        width: channels of the first layer; the last block has eight times as many.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            BasicBlock(width, 2 * width, stride=1),
            BasicBlock(2 * width, 4 * width, stride=2),
            BasicBlock(4 * width, 8 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )
        super().__init__(network, learning_rate=0.01, momentum=0.9)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut of one (He et al., 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),  # of the benchmark; He et al. add the shortcut first
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class FastResNet9(Classifier):
    """TRAK's (Park et al., 2023): 2,273,856 parameters for two classes; learning rate 0.4 at its peak.

    Args:
        classes: number of classes.
        width: channels of the first layer; the widest have four times as many.
        learning_rate: at the peak.
    """

    def __init__(self, classes: int, width: int = 64, learning_rate: float = 0.4) -> None:
        network = nn.Sequential(
            convolution(3, width, 3, padding=1),
            convolution(width, 2 * width, 5, stride=2, padding=2),
            Residual(2 * width),
            convolution(2 * width, 4 * width, 3, padding=1),
            nn.MaxPool2d(2),
            Residual(4 * width),
            convolution(4 * width, 2 * width, 3),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, classes, bias=False),
            Scale(0.2),
        )
        super().__init__(network, learning_rate, momentum=0.9, weight_decay=5e-4, schedule=triangle)


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*(convolution(channels, channels, 3, padding=1) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class Scale(nn.Module):
    """A constant factor: small logits at the start."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def convolution(channels: int, out: int, size: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def triangle(progress: float) -> float:
    """Up until epoch 5 of 24, then down to zero."""
    peak = 5 / 24
    return min(progress / peak, (1 - progress) / (1 - peak))
