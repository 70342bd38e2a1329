"""Pilots: short runs from other weights, whose ends score together with the recorded run.

One run cannot say what its own initialisation and order of samples have to do with its scores; two short ones say most
of it. A pilot trains a fresh module on all training samples for a sixth of the epochs or somewhat more, with a learning
rate that falls to zero, and only its end is kept, as a snapshot of the store.

``request`` is what a user asks for, ``again`` makes module and Trainer once more, ``decay`` is the learning rate,
``training`` trains what is missing.
"""

from lightning_attr.pilots.again import run_settings
from lightning_attr.pilots.request import Pilots, check_pilots
from lightning_attr.pilots.training import train_pilots

__all__ = ["Pilots", "check_pilots", "run_settings", "train_pilots"]
