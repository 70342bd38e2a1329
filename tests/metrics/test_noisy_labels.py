"""Noisy-label metrics as torchmetrics: state, merging, plots."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_attr.metrics import (
    NoisyLabelAUROC,
    NoisyLabelPrecision,
    NoisyLabelRecall,
    noisy_label_auroc,
    noisy_label_precision,
    noisy_label_recall,
)


def _samples(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator), torch.rand(n, generator=generator) < 0.3


METRICS = [NoisyLabelAUROC, NoisyLabelPrecision, NoisyLabelRecall]


def test_classes_equal_functions() -> None:
    samples = _samples()
    auroc, recall, precision = NoisyLabelAUROC(), NoisyLabelRecall(fraction=0.3), NoisyLabelPrecision(fraction=0.3)
    for metric in (auroc, recall, precision):
        metric.update(*samples)
    assert auroc.compute() == noisy_label_auroc(*samples)
    assert recall.compute() == noisy_label_recall(*samples, fraction=0.3)
    assert precision.compute() == noisy_label_precision(*samples, fraction=0.3)


@pytest.mark.parametrize("cls", METRICS)
def test_two_updates_equal_one(cls: type[Metric]) -> None:
    values, mask = _samples()
    once, twice = cls(), cls()
    once.update(values, mask)
    twice.update(values[:9], mask[:9].int())
    twice.update(values[9:], mask[9:])
    assert once.compute() == twice.compute()


@pytest.mark.parametrize("cls", METRICS)
def test_forward_returns_the_batch_value_and_accumulates(cls: type[Metric]) -> None:
    values, mask = _samples()
    metric, batch, whole = cls(), cls(), cls()
    metric(values[:20], mask[:20])
    batch.update(values[20:], mask[20:])
    assert metric(values[20:], mask[20:]) == batch.compute()
    whole.update(values, mask)
    assert metric.compute() == whole.compute()


@pytest.mark.parametrize("cls", METRICS)
def test_a_batch_may_lack_noisy_samples_but_the_whole_may_not(cls: type[Metric]) -> None:
    metric = cls()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match="to mark some samples and leave others clean, but got 0 marked out of 2"):
        metric.compute()
    metric.update(torch.tensor([3.0]), torch.tensor([True]))
    assert metric.compute() == 1


@pytest.mark.parametrize("cls", METRICS)
def test_bad_update_leaves_the_state_alone(cls: type[Metric]) -> None:
    metric = cls()
    with pytest.raises(ValueError, match="to have the same length, but got 3 and 2"):
        metric.update(torch.ones(3), torch.ones(2))
    assert metric.self_influence == []


@pytest.mark.parametrize("cls", METRICS)
def test_reset_forgets(cls: type[Metric]) -> None:
    values, mask = _samples()
    metric, fresh = cls(), cls()
    metric.update(-values, mask)
    metric.reset()
    metric.update(values, mask)
    fresh.update(values, mask)
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize("cls", METRICS)
def test_pickle_and_state_dict_keep_the_state(cls: type[Metric]) -> None:
    metric = cls()
    metric.update(*_samples())
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    metric.persistent(True)
    state = metric.state_dict()
    assert set(state) == {"self_influence", "noise_mask"}
    assert torch.equal(state["self_influence"][0], _samples()[0])


@pytest.mark.parametrize("cls", METRICS)
def test_processes_are_concatenated(cls: type[Metric]) -> None:
    values, mask = _samples()
    other = iter([values[30:], mask[30:]])  # what a second process would hold, in the order of the states
    metric = cls(dist_sync_fn=lambda state, group: [state, next(other)], distributed_available_fn=lambda: True)
    metric.update(values[:30], mask[:30])
    whole = cls()
    whole.update(values, mask)
    assert metric.compute() == whole.compute()


@pytest.mark.parametrize("cls", [NoisyLabelPrecision, NoisyLabelRecall])
def test_bad_fraction(cls: type[Metric]) -> None:
    with pytest.raises(ValueError, match=r"Expected argument `fraction` to be a number in \(0, 1\], but got 0\."):
        cls(fraction=0)


def test_auroc_plots_one_value_and_a_history() -> None:
    metric = NoisyLabelAUROC()
    metric.update(*_samples())
    fig, ax = metric.plot()
    assert ax.figure is fig
    assert ax.get_ylabel() == "NoisyLabelAUROC"
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_xlabel() == "Step"


@pytest.mark.parametrize("cls", [NoisyLabelPrecision, NoisyLabelRecall])
def test_precision_and_recall_plot_their_curve_or_a_history(cls: type[Metric]) -> None:
    metric = cls(fraction=0.2)
    metric.update(*_samples())
    _, ax = metric.plot()
    labels = ax.get_legend_handles_labels()[1]
    assert labels == [f"self-influence ({float(metric.compute()):.0%} at 20%)", "ideal", "random"]
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_ylabel() == cls.__name__
