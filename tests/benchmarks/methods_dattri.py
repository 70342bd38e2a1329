"""dattri 0.3.0's attributors on a run's network: gradients of the training loss, and of the targets' margins.

Its scores are inner products of a loss's gradient with a margin's: minus what we call a score, so they are negated,
except where a row says otherwise. The 1/n is missing, which no figure of the table sees. It solves batch by batch and
adds the solutions up, so it gets all training samples in one batch.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from methods_runs import Run
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def task(run: Run, snapshots: bool = False, train: str = "loss", target: str = "margin") -> Any:
    """An attribution task at the trained network, or at all snapshots."""
    from dattri.task import AttributionTask

    network = run.network()

    def forward(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch  # one sample without the dimension of the batch, or a batch; LiSSA makes labels float
        alone = x.ndim == len(run.setting.input_shape)
        return functional_call(network, params, (x.unsqueeze(0) if alone else x,)), y.long().reshape(-1)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(*forward(params, batch))

    def margin(params: Any, batch: Any) -> Tensor:
        logits, y = forward(params, batch)
        own = y[:, None] == torch.arange(logits.shape[1])
        return (logits.masked_fill(~own, 0).sum(1) - logits.masked_fill(own, -torch.inf).logsumexp(1)).mean()

    functions = {"loss": loss, "margin": margin}
    states = run.states if snapshots else [network.state_dict()]
    return AttributionTask(functions[train], network, states, target_func=functions[target])


def attributed(attributor: Any, run: Run, own: bool, sign: float = -1.0, chunk: int | None = None) -> Tensor:
    """Scores of all targets, or of every training sample for itself; `chunk` targets at a time, to save memory.

    Its own `self_attribute` fails with more than one batch.
    """
    data = run.data
    if not own:
        train, targets = run.loaders()
        loader = DataLoader(targets.dataset, chunk or len(data.x_target))
        return attributor.attribute(train, loader).detach() * sign
    found = []
    for rows in torch.arange(len(data.x)).split(chunk or len(data.x)):
        loader = DataLoader(TensorDataset(data.x[rows], data.y[rows]), len(rows))
        found.append(attributor.attribute(loader, loader).detach().diagonal() * sign)
    return torch.cat(found)


def influence(name: str, chunk: int | None = None) -> Callable[..., Tensor]:
    """Explicit, CG, LiSSA, Arnoldi or DataInf; settings are its own: absolute `regularization`, `max_iter`, ..."""

    def call(run: Run, own: bool, **settings: Any) -> Tensor:
        from dattri.algorithm import influence_function

        attributor = getattr(influence_function, f"IFAttributor{name}")(task(run), **settings)
        attributor.cache(run.loaders()[0])
        return attributed(attributor, run, own, chunk=chunk)

    return call


def ekfac(run: Run, own: bool, damping: float) -> Tensor:
    """Linear layers only, empirical Fisher, cached on the loss: it takes the factors from the target's function."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    attributor = IFAttributorEKFAC(task(run, target="loss"), damping=damping)
    attributor.cache(run.loaders()[0])
    attributor.task = task(run)
    return attributed(attributor, run, own)


def tracin(run: Run, own: bool, snapshots: bool, normalized: bool = False) -> Tensor:
    """TracIn with the recorded learning rates, or Grad-Dot and Grad-Cos at the end; not projected."""
    from dattri.algorithm.tracin import TracInAttributor

    weights = [s.learning_rate for s in run.store.snapshots] if snapshots else [1.0]
    attributor = TracInAttributor(task(run, snapshots), weights, normalized)
    attributor.projector_kwargs = None  # otherwise it projects to 512 dimensions, whatever its argument says
    return attributed(attributor, run, own)


def rps(run: Run, own: bool, l2: float) -> Tensor:
    """Its own sign: positive excites the logit of the target's label. Self-influence: the diagonal; it has none."""
    from dattri.algorithm.rps import RPSAttributor
    from dattri.task import AttributionTask

    network = run.network()
    head = str(len(network) - 1)
    attribution = AttributionTask(lambda logits, labels: F.cross_entropy(logits, labels), network, network.state_dict())
    attributor = RPSAttributor(attribution, head, l2_strength=l2)
    train, targets = run.loaders()
    attributor.cache(train)
    scores = attributor.attribute(train, train if own else targets).detach()
    return scores.diagonal() if own else scores


def trak(run: Run, own: bool, snapshots: bool, regularization: float) -> Tensor:
    """Gradients of margins on both sides, so that its sign is ours."""
    from dattri.algorithm.trak import TRAKAttributor

    attribution = task(run, snapshots, train="margin")
    attributor = TRAKAttributor(
        attribution,
        lambda params, sample: attribution.original_target_func(params, sample).sigmoid(),
        projector_kwargs={"proj_dim": 512},
        regularization=regularization,
    )
    train, targets = run.loaders()
    attributor.cache(train)
    if own:  # its own `self_attribute` fails with a cache, and gives no vector without
        return attributor.attribute(train).detach().diagonal()
    return attributor.attribute(targets).detach()


def blocks(name: str) -> Callable[..., Tensor]:
    """LoGra or FactGraSS, on linear layers; self-influence: the diagonal; it has none on this path."""

    def call(run: Run, own: bool, damping: float, proj_dim: int = 1024) -> Tensor:
        from dattri.algorithm.factgrass import FactGraSSAttributor
        from dattri.algorithm.logra import LoGraAttributor
        from dattri.task import AttributionTask

        network = run.network()

        class WithBatch(nn.Module):  # its set-up takes the first sample without the batch's dimension
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x if x.ndim > len(run.setting.input_shape) else x.unsqueeze(0))

        def loss(model: nn.Module, batch: tuple[Tensor, ...], device: str) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        model = WithBatch()
        attributor = {"LoGra": LoGraAttributor, "FactGraSS": FactGraSSAttributor}[name](
            task=AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
            damping=damping,
            proj_dim=proj_dim,
            cache_dir=tempfile.mkdtemp(),
        )
        train, targets = run.loaders()
        attributor.cache(train)
        scores = attributor.attribute(train, train if own else targets).detach()
        return scores.diagonal() if own else scores

    return call


def knn_shapley(run: Run, own: bool, neighbors: int) -> Tensor:
    """On the inputs of the last layer; scores come as (targets, training samples), positive helps."""
    from dattri.algorithm.data_shapley import KNNShapleyAttributor

    features = run.network()[:-1]

    @torch.no_grad()
    def distances(targets: list[Tensor], samples: list[Tensor]) -> Tensor:
        return torch.cdist(features(targets[0]), features(samples[0]))

    train, targets = run.loaders()
    attributor = KNNShapleyAttributor(neighbors, distance_func=distances)
    return attributor.attribute(train, targets).T.contiguous()


warnings.filterwarnings("ignore", module="dattri")
