"""MNIST-10 LR: one linear layer."""

from __future__ import annotations

from classifier import Classifier
from torch import nn


class LogisticRegression(Classifier):
    """784 pixels to 10 classes, with bias: 7,850 parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), learning_rate=0.01)
