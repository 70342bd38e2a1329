"""Data selection curves against sums written out, and the class against the function."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_attr.metrics import DataSelectionCurve, data_selection_curve

FRACTIONS = torch.tensor([0.05, 0.1, 0.5], dtype=torch.float64)


def _arms() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    repeats = {"method": 4, "random": 5, "opposite": 3}
    return {arm: torch.rand(r, 3, generator=generator, dtype=torch.float64) for arm, r in repeats.items()}


def _filled(arms: dict[str, Tensor]) -> DataSelectionCurve:
    metric = DataSelectionCurve()
    for arm, values in arms.items():
        for run in values:
            for fraction, value in zip(FRACTIONS.tolist(), run, strict=True):
                metric.update(fraction, value, arm)
    return metric


def test_means_and_deviations_match_numpy() -> None:
    arms = _arms()
    curve = data_selection_curve(FRACTIONS, **arms)
    assert torch.equal(curve.fractions, FRACTIONS)
    for arm, values in arms.items():
        np.testing.assert_allclose(curve.mean[arm], np.mean(values.numpy(), axis=0))
        np.testing.assert_allclose(curve.std[arm], np.std(values.numpy(), axis=0, ddof=1))


def test_area_is_the_trapezoid_over_the_range_of_fractions() -> None:
    arms = _arms()
    curve = data_selection_curve(FRACTIONS, **arms)
    gain = (arms["method"].mean(0) - arms["random"].mean(0)).numpy()
    assert curve.area.item() == pytest.approx(torch.trapezoid(torch.as_tensor(gain), FRACTIONS).item() / 0.45)


def test_area_of_a_constant_advantage_is_the_advantage() -> None:
    random = _arms()["random"]
    assert data_selection_curve(FRACTIONS, random + 0.25, random).area.item() == pytest.approx(0.25)
    one = data_selection_curve(FRACTIONS[:1], random[:, :1] + 0.25, random[:, :1])
    assert one.area.item() == pytest.approx(0.25)


def test_area_error_is_the_deviation_of_the_area_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    areas, errors = [], []
    for _ in range(400):
        method, random = (torch.randn(r, 3, generator=generator, dtype=torch.float64) for r in (4, 5))
        curve = data_selection_curve(FRACTIONS, method, random)
        areas.append(curve.area.item())
        errors.append(curve.area_error.item())
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(areas), rel=0.1)


def test_removal_turns_the_sign_so_that_a_positive_area_is_good() -> None:
    arms = _arms()
    keep, remove = (data_selection_curve(FRACTIONS, **arms, kind=kind) for kind in ("keep", "remove"))
    assert (keep.kind, remove.kind) == ("keep", "remove")
    assert remove.area == -keep.area
    assert remove.area_error == keep.area_error
    assert remove.opposite_area == -keep.opposite_area
    assert torch.equal(remove.mean["method"], keep.mean["method"])


def test_area_over_the_opposite_end() -> None:
    arms = _arms()
    curve = data_selection_curve(FRACTIONS, **arms)
    swapped = data_selection_curve(FRACTIONS, arms["method"], random=arms["opposite"])
    assert curve.opposite_area == swapped.area
    assert curve.opposite_area_error == swapped.area_error
    alone = data_selection_curve(FRACTIONS, arms["method"], arms["random"])
    assert alone.opposite_area.isnan()
    assert alone.opposite_area_error.isnan()


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"`kind` to be .+, but got 'drop'\."):
        data_selection_curve(FRACTIONS, **_arms(), kind="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`kind` to be .+, but got 'drop'\."):
        DataSelectionCurve(kind="drop")  # type: ignore[arg-type]


def test_class_of_removals() -> None:
    metric = DataSelectionCurve(kind="remove")
    metric.update(0.1, 0.5)
    metric.update(0.1, 0.8, "random")
    assert metric.compute()["area"].item() == pytest.approx(0.3)
    assert "opposite_area" not in metric.compute()
    _, ax = metric.plot()
    assert ax.get_xlabel() == "training samples removed"


def test_one_retraining_has_no_deviation() -> None:
    curve = data_selection_curve(FRACTIONS, torch.ones(1, 3), torch.zeros(1, 3))
    assert curve.area == 1
    assert curve.std["method"].isnan().all()
    assert curve.area_error.isnan()
    assert set(curve.mean) == {"method", "random"}


@pytest.mark.parametrize(
    ("fractions", "method", "message"),
    [
        (torch.tensor([0.5, 0.1]), torch.ones(1, 2), r"`fractions` to be ascending in \(0, 1\], but got \[0\.5, 0\.1"),
        (torch.tensor([0.5, 0.5]), torch.ones(1, 2), "`fractions` to be ascending"),
        (torch.tensor([0.0, 0.5]), torch.ones(1, 2), "`fractions` to be ascending"),
        (torch.tensor([0.5, 1.1]), torch.ones(1, 2), "`fractions` to be ascending"),
        (torch.ones(1, 1), torch.ones(1, 1), r"`fractions` to be a non-empty vector, but got shape \(1, 1\)\."),
        (torch.tensor([0.1, 0.5]), torch.ones(2), r"`method` to have shape \(r, k\) with k = 2 .* but got \(2,\)\."),
        (torch.tensor([0.1, 0.5]), torch.ones(0, 2), r"`method` to have shape .* but got \(0, 2\)\."),
        (torch.tensor([0.1, 0.5]), torch.tensor([[1.0, math.nan]]), "`method` to be finite, but got 1 NaN"),
    ],
)
def test_function_rejects_bad_input(fractions: Tensor, method: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_selection_curve(fractions, method, torch.ones(1, len(fractions)))


def test_class_equals_function() -> None:
    arms = _arms()
    result, curve = _filled(arms).compute(), data_selection_curve(FRACTIONS, **arms)
    assert list(result) == [
        "fractions", "method", "random", "opposite", "method_std", "random_std", "opposite_std", "area", "area_error",
        "opposite_area", "opposite_area_error",
    ]  # fmt: skip
    for arm in arms:
        np.testing.assert_allclose(result[arm], curve.mean[arm])
        np.testing.assert_allclose(result[f"{arm}_std"], curve.std[arm])
    assert result["area"].item() == pytest.approx(curve.area.item())
    assert result["area_error"].item() == pytest.approx(curve.area_error.item())


def test_order_of_updates_does_not_matter() -> None:
    arms = _arms()
    a, b = _filled(arms), _filled(dict(reversed(arms.items())))
    assert a.compute()["area"] == b.compute()["area"]


def test_area_runs_over_the_fractions_that_both_arms_share() -> None:
    metric = DataSelectionCurve()
    for fraction, value, arm in [
        (0.1, 1.0, "method"), (0.2, 3.0, "method"), (0.4, 9.0, "method"),
        (0.1, 0.0, "random"), (0.2, 1.0, "random"), (0.8, 5.0, "random"),
    ]:  # fmt: skip
        metric.update(fraction, value, arm)
    result = metric.compute()
    assert result["fractions"].tolist() == [0.1, 0.2, 0.4, 0.8]
    assert result["area"].item() == pytest.approx(1.5)
    np.testing.assert_array_equal(result["method"], [1, 3, 9, math.nan])


def test_compute_needs_method_and_random() -> None:
    metric = DataSelectionCurve()
    metric.update(0.1, 0.5)
    with pytest.raises(ValueError, match="Expected arms `method` and `random` to share at least one fraction"):
        metric.compute()
    metric.update(0.2, 0.5, "random")
    with pytest.raises(ValueError, match="Expected arms `method` and `random` to share at least one fraction"):
        metric.compute()


def test_update_rejects_bad_arguments() -> None:
    metric = DataSelectionCurve()
    with pytest.raises(ValueError, match=r"`fraction` to be a number in \(0, 1\], but got 10\."):
        metric.update(10, 0.5)
    with pytest.raises(ValueError, match=r"`arm` of .+ to be .+, but got 'loss'\."):
        metric.update(0.1, 0.5, "loss")
    with pytest.raises(ValueError, match="`value` to be a finite number, but got nan"):
        metric.update(0.1, math.nan)
    assert metric.fraction == metric.value == metric.arm == []


def test_reset_pickle_and_state_dict() -> None:
    metric = _filled(_arms())
    area = metric.compute()["area"]
    assert pickle.loads(pickle.dumps(metric)).compute()["area"] == area
    metric.persistent(True)
    assert set(metric.state_dict()) == {"fraction", "value", "arm"}
    metric.reset()
    assert metric.fraction == []


def test_processes_are_concatenated() -> None:
    arms = _arms()
    half = {arm: values[:2] for arm, values in arms.items()}
    other = _filled({arm: values[2:] for arm, values in arms.items()})
    gathered = iter([torch.cat(other.fraction), torch.cat(other.value), torch.cat(other.arm)])
    metric = _filled(half)
    metric.dist_sync_fn = lambda state, group: [state, next(gathered)]
    metric.distributed_available_fn = lambda: True
    assert metric.compute()["area"].item() == pytest.approx(_filled(arms).compute()["area"].item())


def test_plot_draws_every_arm() -> None:
    metric = _filled(_arms())
    fig, ax = metric.plot(metric="accuracy")
    assert ax.figure is fig
    assert ax.get_ylabel() == "accuracy"
    assert ax.get_legend_handles_labels()[1] == ["method", "random", "opposite"]
    _, again = metric.plot(metric.summary(), ax=ax)
    assert again is ax
