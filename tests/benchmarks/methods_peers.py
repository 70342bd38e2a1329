"""kronfluence 1.0.1, captum 0.9.0 and traker 0.3.2 on a run's network, as the table of methods calls them.

captum's scores are positive for proponents, as ours; kronfluence's too, with minus the margin as its measurement.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from methods_runs import Run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from digits import margin


def kronfluence(strategy: str) -> Callable[..., Tensor]:
    """Linear and Conv2d, Fisher with sampled labels; damping is absolute, None a tenth of the mean eigenvalue."""

    def call(run: Run, own: bool, damping: float | None) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Margin(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits, labels = model(batch[0]), batch[1]
                if sample:
                    labels = logits.detach().softmax(1).multinomial(1).flatten()
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return -margin(model(batch[0]), batch[1]).sum()

        torch.manual_seed(0)
        train, targets = (loader.dataset for loader in run.loaders())
        with tempfile.TemporaryDirectory() as folder:
            attribution = Margin()
            analyzer = Analyzer(
                "run",
                prepare_model(run.network(), attribution),
                attribution,
                cpu=True,
                disable_tqdm=True,
                log_level=logging.ERROR,
                output_dir=folder,
            )
            analyzer.fit_all_factors("factors", train, len(train), factor_args=FactorArguments(strategy=strategy))
            score_args = ScoreArguments(damping_factor=damping, use_measurement_for_self_influence=True)
            if own:
                analyzer.compute_self_scores("own", "factors", train, len(train), score_args=score_args)
                return analyzer.load_self_scores("own")["all_modules"]
            analyzer.compute_pairwise_scores(
                *("scores", "factors", targets, train),
                per_device_query_batch_size=len(targets),
                per_device_train_batch_size=len(train),
                score_args=score_args,
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"].T.contiguous()

    return call


def captum_tracin(run: Run, own: bool, fast: bool) -> Tensor:
    """TracInCP on Linear and Conv2d, or TracInCPFast on the last layer, at our snapshots, with their learning rates."""
    from captum.influence import TracInCP, TracInCPFast

    network, rates = run.network(), [s.learning_rate for s in run.store.snapshots]

    def load(model: nn.Module, index: int) -> float:
        model.load_state_dict(run.states[index])
        return rates[index]

    data = run.data
    settings = {
        "checkpoints": list(range(len(rates))),
        "checkpoints_load_func": load,
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        "batch_size": len(data.x),
    }
    if fast:
        tracin = TracInCPFast(network, network[-1], TensorDataset(data.x, data.y), **settings)
    else:
        layers = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        tracin = TracInCP(
            *(network, TensorDataset(data.x, data.y)), layers=layers, sample_wise_grads_per_batch=True, **settings
        )
    if own:
        return tracin.self_influence((data.x, data.y), outer_loop_by_checkpoints=True).detach()
    return tracin.influence((data.x_target, data.y_target)).T.contiguous().detach()


def captum_influence(name: str) -> Callable[..., Tensor]:
    """Its explicit inverse, or Arnoldi of one batch of all samples; of the loss, since it has no margins."""

    def call(run: Run, own: bool, **settings: Any) -> Tensor:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
        from captum.influence._core.influence_function import NaiveInfluenceFunction

        data, network = run.data, run.network()
        kind = {"naive": NaiveInfluenceFunction, "arnoldi": ArnoldiInfluenceFunction}[name]
        influence = kind(
            *(network, TensorDataset(data.x, data.y), ""),
            checkpoints_load_func=lambda model, path: 1.0,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=len(data.x),
            sample_wise_grads_per_batch=True,
            **settings,
        )
        if own:
            return influence.self_influence((data.x, data.y)).detach()
        return influence.influence((data.x_target, data.y_target)).T.contiguous().detach()

    return call


def captum_similarity(run: Run, own: bool, similarity: str) -> Tensor:
    """SimilarityInfluence on the inputs of the last layer; it returns them sorted, and here they are put back."""
    from captum.influence import SimilarityInfluence
    from captum.influence._core.similarity_influence import cosine_similarity, euclidean_distance

    network, data = run.network(), run.data
    layer = str(len(network) - 2)
    plain = {"cos": cosine_similarity, "l2": lambda a, b: -euclidean_distance(a, b)}[similarity]

    def metric(targets: Tensor | list[Tensor], samples: Tensor) -> Tensor:
        return plain(targets[0] if isinstance(targets, list) else targets, samples)  # of one layer it is a list

    with tempfile.TemporaryDirectory() as folder:
        search = SimilarityInfluence(
            *(network, layer, _Inputs(data.x), folder), similarity_metric=metric, batch_size=len(data.x)
        )
        indices, values = search.influence(data.x_target, top_k=len(data.x))[layer]
    return torch.zeros(len(data.x_target), len(data.x)).scatter_(1, indices, values.detach()).T.contiguous()


class _Inputs(torch.utils.data.Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


def traker(run: Run, own: bool, proj_dim: int = 512) -> Tensor:
    """TRAK's own code at the trained network; without a ridge, as released. It has no self-influence."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    data, network = run.data, run.network()
    targets = (data.x, data.y) if own else (data.x_target, data.y_target)
    projector = BasicProjector(
        grad_dim=sum(parameter.numel() for parameter in network.parameters()),
        proj_dim=proj_dim,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(
            model=network,
            task="image_classification",
            train_set_size=len(data.x),
            save_dir=folder,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        trak.load_checkpoint(network.state_dict(), 0)
        trak.featurize((data.x, data.y), num_samples=len(data.x))
        trak.finalize_features()
        trak.start_scoring_checkpoint("targets", network.state_dict(), 0, num_targets=len(targets[0]))
        trak.score(targets, num_samples=len(targets[0]))
        scores = torch.tensor(trak.finalize_scores("targets"))
    return scores.diagonal() if own else scores
