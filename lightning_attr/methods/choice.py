r"""What a method that was left to choose does: how many features, by the sizes of model and data.

A kernel of ``k`` features costs ``n k ** 2`` multiplications, a pass over ``n`` samples through ``p`` parameters ``3 n
p`` or more. With ``k`` near the twelfth of ``p`` little is lost: digits, `tune` subsets, LDS with 512, 1,024 and 2,048
features 0.669, 0.703 and 0.706 on the MLP (17,000 parameters), 0.527, 0.566 and 0.579 on the CNN (10,000), where 1,024
took half the time of 2,048. Beyond a few features per sample there is nothing left to tell apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning_attr.methods.base import AttributionMethod
from lightning_attr.projectors import Projector

MOST_FEATURES = 2048
_FEWEST = 256
_ENOUGH = 1024
"""Features of models however small, where there are samples enough: 512 lose .03 to .04 on both digits' models."""
_PARAMETERS_A_FEATURE = 12
_FEATURES_A_SAMPLE = 4
_SMALL = 2**30
"""Parameters times samples up to which features are quickly computed when they are wanted."""


@dataclass(frozen=True)
class FeatureChoice:
    """How many features, and whether they can wait until somebody reads them.

    Args:
        proj_dim: features per sample.
        late: whether they are left to the attribution: training stores the weights only.
        reason: in words.

    Example:
        >>> choose_features(1_000_000, 10_090).late
        False
    """

    proj_dim: int
    late: bool
    reason: str


def choose_features(n_train: int, numel: int, most: int = MOST_FEATURES) -> FeatureChoice:
    """Choose how many features a sample has, from what does not change in a run: a resumed one chooses the same.

    Returns the power of two nearest to a twelfth of the parameters, but at least 1,024, and at most ``most`` and four
    per sample (or 256). Features are late where samples times parameters are at most ``2 ** 30``.
    """
    wanted = min(max(numel / _PARAMETERS_A_FEATURE, _ENOUGH), _FEATURES_A_SAMPLE * n_train)
    nearest = 2 ** round(math.log2(max(1.0, wanted)))
    proj_dim = min(most, max(min(_FEWEST, most), nearest))
    late = n_train * numel <= _SMALL
    when = "computed when they are wanted" if late else "computed while training"
    reason = f"{proj_dim:,} features for {numel:,} parameters and {n_train:,} training samples, {when}"
    return FeatureChoice(proj_dim, late, reason)


@runtime_checkable
class ChoosesFeatures(Protocol):
    """A method that may be left to choose how many features there are."""

    choice: FeatureChoice | None

    def settled(self, n_train: int, numel: int) -> AttributionMethod:
        """Choose, if that was left open.

        Returns the method, with nothing left to choose.
        """

    def given(self, projector: Projector) -> AttributionMethod:
        """Take a projector, if nobody chose one.

        Returns the method, with nothing left to choose; as it is, where somebody chose.
        """


def settled(method: AttributionMethod, n_train: int, numel: int) -> AttributionMethod:
    """Let a method choose what was left to it, now that model and data are known.

    Returns the method, with nothing left to choose.
    """
    return method.settled(n_train, numel) if isinstance(method, ChoosesFeatures) else method


def choice_of(method: AttributionMethod) -> FeatureChoice | None:
    """Give what a method chose.

    Returns the choice; None where there was none.
    """
    return method.choice if isinstance(method, ChoosesFeatures) else None
