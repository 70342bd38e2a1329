"""Strategies: which are refused, by name, and what is said to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.attribution.strategies import check_one_process, check_strategy, divides
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_shards_that_nobody_gathers(kind: type) -> None:
    strategy = kind.__new__(kind)  # their constructors want their packages, or devices
    with pytest.raises(AttributionError, match=rf"{kind.__name__} shards them.*ModelParallelStrategy\(data_parallel"):
        check_strategy(strategy)


def test_tensor_parallelism() -> None:
    check_strategy(ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    with pytest.raises(AttributionError, match=r"tensor_parallel_size=1, but it is 2: .*whole activations of a sample"):
        check_strategy(ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))
    trainer = quiet_trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy())  # "auto" is all devices
    with pytest.raises(AttributionError, match=r'but it is 2: .*"auto" is the number of devices'):
        trainer.attribute(model=BlobClassifier(), train_dataloaders=loader_of(blobs(4)))
    with pytest.raises(AttributionError, match="tensor_parallel_size=1, but it is 2"):
        AttributionCallback().setup(trainer, BlobClassifier(), "fit")


def test_one_process_alone(tmp_path: Path) -> None:
    single = SingleDeviceStrategy("cpu")
    check_strategy(single)
    check_one_process(single)
    dividing = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert divides(dividing)
    assert not divides(single)
    trainer = quiet_trainer(accelerator="cpu", devices=2, strategy=dividing)
    check = AttributionCallback(tmp_path).check(
        BlobClassifier(), train_dataloaders=loader_of(blobs(4)), trainer=trainer
    )
    assert "ModelParallelStrategy divides it among all. Check it with a Trainer of one device" in str(check.refused)
