"""MNIST-10 MLP: two hidden layers with dropout."""

from __future__ import annotations

from classifier import Classifier
from torch import nn


class MLP(Classifier):
    """784-128-64-10: 109,386 parameters."""

    def __init__(self, dropout: float = 0.1) -> None:
        network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, 10),
        )
        super().__init__(network, learning_rate=0.01, momentum=0.9)
