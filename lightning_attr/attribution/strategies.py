"""Which strategies attribution works under: each process must be able to run whole samples through whole layers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.lightning_names import both


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which no process can have whole layers and whole samples."""
    name = type(strategy).__name__
    if isinstance(strategy, both(DeepSpeedStrategy, FSDPStrategy)):
        raise AttributionError(
            f"Expected a strategy that keeps whole parameters on each rank, or that can gather them, but {name} shards "
            "them in a form of its own. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with "
            '`fully_shard` in `configure_model`, or strategy="ddp"; or attribute on one device from the stored '
            "snapshots."
        )
    if divides(strategy) and (size := _tensor_parallel_size(strategy)) != 1:
        raise AttributionError(
            f"Expected {name} to have tensor_parallel_size=1, but it is {size}: then no process has the whole "
            'activations of a sample ("auto" is the number of devices). Use '
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)."
        )


def divides(strategy: Strategy) -> bool:
    """Say whether a strategy lets modules divide their parameters among its processes."""
    return isinstance(strategy, both(ModelParallelStrategy))


def _tensor_parallel_size(strategy: Any) -> int:
    size = strategy._tensor_parallel_size
    return int(strategy.num_processes) if size == "auto" else int(size)


def check_one_process(strategy: Strategy) -> None:
    """Refuse what divides modules, where one process alone is to look at one."""
    if divides(strategy):
        raise AttributionError(
            f"Expected a strategy under which one process can have the module, but {type(strategy).__name__} divides "
            "it among all. Check it with a Trainer of one device; `fit` itself looks at it as well, before the first "
            "step."
        )
