"""The gradient of the validation loss where training is, and its products with those of training samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.callbacks.beside import beside_training
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.data.sources import target_source
from lightning_attr.errors import AttributionError
from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.features.snapshot_model import Replay
from lightning_attr.features.transfer import placed
from lightning_attr.objectives.objective import completed, draws_of
from lightning_attr.parameters.whole import divided_parameters
from lightning_attr.projectors.inner_product import InnerProduct
from lightning_attr.randomness.draws import Draw
from lightning_attr.verification.gradient_paths import Plans

_KEY = "in-run value"


class ValidationGradient:
    """Multiplies gradients of training samples with that of the mean validation loss.

    Args:
        trainer: the trainer.
        module: the user's module.
        train: the training data.
        loaders: of validation samples; None for the trainer's.
        samples: the first so many; None for all.
        mode: of the module, "eval" or "train"; None to choose.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        train: DataSource,
        loaders: Any,
        samples: int | None,
        mode: str | None,
    ) -> None:
        self.trainer, self.module, self.train = trainer, module, train
        self.datamodule = getattr(trainer, "datamodule", None)
        found = target_source(trainer, module, self.datamodule, loaders, "val")
        assert found is not None  # only targets="train" or "auto" give none
        self.validation = found.wrapped_as(train)
        self.count = len(self.validation) if samples is None else min(samples, len(self.validation))
        self._batches = Replay(self._read)
        self._vector: dict[str, Tensor] = {}
        self._plans = Plans(trainer, module, self.datamodule, train, mode)
        with beside_training(trainer, module, train, "eval", None, dict):
            self._check(self._plans.probe()[0])

    def _check(self, plan: AttributionPlan) -> None:
        """Refuse modules whose loss on whole batches is not that of their samples."""
        name = type(self.module).__name__
        if divided_parameters(self.module):
            raise AttributionError(
                f"Expected the parameters of {name} whole in each process, but they are divided among processes, of "
                "which InRunDataValue knows nothing. Do without it, or train with `strategy='ddp'`."
            )
        if self.train.form.apart:
            raise AttributionError(
                f"Expected samples of {name} that can be taken from a batch, because InRunDataValue looks at the "
                "batches of training, but its samples are batches of their own. Take `trainer.attribute` with TracIn."
            )
        if plan.seeded or draws_of(self.module) > 1:
            raise AttributionError(
                f"Expected {name} to have nothing random where InRunDataValue looks at it, but it has, in "
                f'{plan.mode} mode. Pass AttributionCallback(mode="eval").'
            )

    def products(self, batch: Any, rows: Sequence[int], fresh: bool) -> Tensor:
        """Multiply the gradients of the samples of a batch, which is on the device, with that of validation.

        Returns ``(b,)``, weighed by the learning rates of the optimizers; with ``fresh``, validation is looked at anew.
        """
        trainer, module = self.trainer, self.module
        size = self.train.form.wrong_size(batch, len(rows))
        if size is not None:
            raise AttributionError(
                f"Expected the batch of this step to hold the {len(rows)} samples that its sampler drew, but it holds "
                f"{size or 'none'}: its collate function or transfer hooks change how many there are."
            )
        mode = self._plans.mode or "eval"
        with beside_training(trainer, module, self.train, mode, None, dict), trainer.precision_plugin.forward_context():
            plan = self._plans.current()[1]
            if fresh:
                self._vector = self._weighed(plan)
            marked = self.train.form.marked(batch, len(rows))
            columns = Featurizer(module, plan, InnerProduct(self._vector), snapshot=_KEY)(marked, rows)
        return -columns["out_to_loss"] * columns["features"][:, 0]  # the loss falls where the output rises

    def _weighed(self, plan: AttributionPlan) -> dict[str, Tensor]:
        """Differentiate the mean validation loss, each parameter times its learning rate."""
        params = {name: p.detach().requires_grad_() for name, p in self.module.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for rows, batch in self._batches():
            if isinstance(batch, SamplesApart):
                raise AttributionError("Expected validation samples that can be batched, but they are apart.")
            given = completed(self.module, batch, Draw(rows, _KEY, 0, next(iter(params.values())).device))
            with torch.enable_grad():
                loss = plan.objective.total_loss(params, given, len(rows))
            found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for name, gradient in zip(params, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        rates = learning_rates(self.trainer.optimizers, self.module)
        return {name: rates.get(name, 0.0) / self.count * gradient for name, gradient in total.items()}

    def _read(self) -> Iterator[tuple[Sequence[int], Any]]:
        source, device = self.validation, self.trainer.strategy.root_device
        for rows, batch in OrderedLoader(source, source.batches(range(self.count))):
            converted = self.trainer.precision_plugin.convert_input(batch)
            yield rows, placed(converted, rows, self.module, self.datamodule, device, source)


def learning_rates(optimizers: Sequence[torch.optim.Optimizer], module: torch.nn.Module) -> Mapping[str, float]:
    """Give each parameter the learning rate of its group; parameters of no optimizer are left out.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> learning_rates([torch.optim.SGD([layer.weight], lr=0.5)], layer)
        {'weight': 0.5}
    """
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: float(group.get("lr") or 0.0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names
    }
