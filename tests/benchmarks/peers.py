"""How other libraries featurize the same batch: each makes all that it can beforehand, then only the pass is timed.

A maker takes a job and returns the pass. What a peer cannot do raises, and the table names the error. Each gets its
best settings for a CPU: float32, hooks where it has them, projection matrices kept where it can keep them.

bergson's requirements hold back torch, so that it is in no extra: `pip install --no-deps bergson==2.5.1` and `pip
install datasets jaxtyping natsort simple-parsing` give what is needed here.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import Job
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LARGEST_KEPT_MATRIX = 2**30  # bytes

Maker = Callable[[Job], Callable[[], Any]]


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-class margin of each sample, as traker writes it."""
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # not one_hot, for vmap
    return logits.masked_fill(~own, 0).sum(1) - logits.masked_fill(own, -torch.inf).logsumexp(1)


def _loader(job: Job) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*job.inputs, job.labels), job.batch_size)


def traker(proj_dim: int) -> Maker:
    """TRAKer.featurize: vmap(grad), then its BasicProjector, into its memory-mapped store."""

    def make(job: Job) -> Callable[[], Any]:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
        from trak.projectors import BasicProjector, ProjectionType

        class Margin(AbstractModelOutput):  # its own classes take one input per sample
            def __init__(self) -> None: ...

            @staticmethod
            def get_output(model: nn.Module, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
                *inputs, label = (x.unsqueeze(0) for x in sample)
                return _margin(functional_call(model, (weights, buffers), tuple(inputs)), label).sum()

            def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
                *inputs, labels = batch
                logits = functional_call(model, (weights, buffers), tuple(inputs))
                return (1 - logits.softmax(1).gather(1, labels[:, None])).detach()

        parameters = sum(p.numel() for p in job.network.parameters())
        keeps_all = 4 * parameters * proj_dim <= LARGEST_KEPT_MATRIX  # by default it draws anew every 100 rows
        projector = BasicProjector(
            grad_dim=parameters,
            proj_dim=proj_dim,
            seed=0,
            proj_type=ProjectionType.normal,
            device=job.device,
            block_size=proj_dim if keeps_all else 100,
        )
        traker = TRAKer(
            model=job.network,
            task=Margin(),
            train_set_size=job.batch_size,
            save_dir=tempfile.mkdtemp(),
            device=job.device,
            projector=projector,
            use_half_precision=False,  # float16 is 17 times slower on a CPU
            logging_level=40,
        )
        traker.load_checkpoint(job.network.state_dict(), model_id=0)
        batch = (*job.inputs, job.labels)

        def run() -> None:
            traker.saver.current_store["is_featurized"][:] = 0
            traker._last_ind = 0
            traker.featurize(batch=batch, num_samples=job.batch_size)

        return run

    return make


def dattri_trak(proj_dim: int) -> Maker:
    """TRAKAttributor.cache: vmap(grad), a projector made anew for each batch, and the solution of its kernel."""

    def make(job: Job) -> Callable[[], Any]:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        def probability(params: Any, sample: tuple[Tensor, ...]) -> Tensor:
            *inputs, label = (x.unsqueeze(0) for x in sample)
            return torch.exp(-F.cross_entropy(functional_call(job.network, params, tuple(inputs)), label))

        def logit(params: Any, sample: tuple[Tensor, ...]) -> Tensor:
            *inputs, label = (x.unsqueeze(0) for x in sample)
            return _margin(functional_call(job.network, params, tuple(inputs)), label).sum()

        attributor = TRAKAttributor(
            task=AttributionTask(loss_func=logit, model=job.network, checkpoints=job.network.state_dict()),
            correct_probability_func=probability,
            projector_kwargs={"proj_dim": proj_dim, "device": job.device},
            device=job.device,
            regularization=1e-3,
        )
        loader = _loader(job)
        return lambda: attributor.cache(loader)

    return make


def dattri_blocks(method: str, total: int) -> Maker:
    """LoGra or FactGraSS: hooks on the linear layers, `total` dimensions together."""

    def make(job: Job) -> Callable[[], Any]:
        from dattri.algorithm.factgrass import FactGraSSAttributor
        from dattri.algorithm.logra import LoGraAttributor
        from dattri.task import AttributionTask

        class WithBatch(nn.Module):  # its set-up takes the first sample without the batch's dimension
            def __init__(self) -> None:
                super().__init__()
                self.network = job.network

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x if x.ndim == job.inputs[0].ndim else x.unsqueeze(0), *job.inputs[1:])

        def loss(model: nn.Module, batch: tuple[Tensor, ...], device: str) -> Tensor:
            return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device), reduction="sum")

        model = WithBatch()
        attributor = {"LoGra": LoGraAttributor, "FactGraSS": FactGraSSAttributor}[method](
            task=AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
            hessian="Identity",  # gradients only
            device=job.device,
            proj_dim=math.isqrt(total // len(job.linears())) ** 2,
            cache_dir=tempfile.mkdtemp(),  # otherwise it reads what the last run left in the working directory
        )
        loader = DataLoader(TensorDataset(job.inputs[0], job.labels), job.batch_size)
        attributor.cache(loader)  # compiles
        return lambda: attributor.cache(loader)

    return make


def captum_tracin(job: Job) -> Callable[[], Any]:
    """TracInCP: per-sample gradients of Linear and Conv2d and their norms; nothing is kept."""
    from captum.influence import TracInCP

    batch = (*job.inputs, job.labels)
    tracin = TracInCP(
        job.network,
        TensorDataset(*batch),
        checkpoints=[""],
        checkpoints_load_func=lambda model, path: 1.0,
        layers=[name for name, layer in job.network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))],
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=job.batch_size,
        sample_wise_grads_per_batch=True,
    )
    return lambda: tracin.self_influence(batch, outer_loop_by_checkpoints=True)


def captum_tracin_fast(job: Job) -> Callable[[], Any]:
    """TracInCPFast: the output layer only; nothing is kept."""
    from captum.influence import TracInCPFast

    batch = (*job.inputs, job.labels)
    tracin = TracInCPFast(
        job.network,
        job.network.get_submodule(job.linears()[-1]),
        TensorDataset(*batch),
        checkpoints=[""],
        checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=job.batch_size,
    )
    return lambda: tracin.self_influence(batch, outer_loop_by_checkpoints=True)


def opacus(job: Job) -> Callable[[], Any]:
    """GradSampleModule by hooks, faster here than its functorch mode: exact per-sample gradients, not projected."""
    from opacus.grad_sample.utils import wrap_model

    network = copy.deepcopy(job.network).train()  # it looks at layers in train mode only
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.Dropout)):
            layer.eval().requires_grad_(False)
    module = wrap_model(network, grad_sample_mode="hooks", strict=False)  # strict refuses BatchNorm's buffers

    def run() -> None:
        module.zero_grad()
        F.cross_entropy(module(*job.inputs), job.labels).backward()

    run()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, p in trainable.items() if getattr(p, "grad_sample", None) is None]
    if missing:
        raise NotImplementedError(f"no per-sample gradients of {missing[0]} and {len(missing) - 1} more")
    return run


def bergson(total: int) -> Maker:
    """Its in-memory collector: hooks on the linear layers, both sides projected."""

    def make(job: Job) -> Callable[[], Any]:
        from bergson.collector.in_memory_collector import InMemoryCollector
        from bergson.config import IndexConfig
        from bergson.gradients import GradientProcessor
        from datasets import Dataset

        network = copy.deepcopy(job.network).requires_grad_(False)
        for layer in network.modules():
            if isinstance(layer, nn.Embedding):
                layer.requires_grad_(True)  # as its own loop does, so that the hooks are called
        network.device = torch.device(job.device)
        folder = Path(tempfile.mkdtemp()) / "index"
        outputs = {
            job.linears()[-1],
            *(name for name in job.linears() if "pooler" in name),
        }  # one row per sample: refused
        side = math.isqrt(total // max(1, len(job.linears()) - len(outputs)))
        collector = InMemoryCollector(
            model=network,
            data=Dataset.from_dict({"length": [job.inputs[0].shape[1]] * job.batch_size}),
            cfg=IndexConfig(run_path=str(folder), projection_dim=side),
            processor=GradientProcessor(projection_dim=side),
            target_modules=set(job.linears()) - outputs,
        )
        rows = list(range(job.batch_size))

        def run() -> None:
            with collector.with_batch(None):
                losses = F.cross_entropy(network(*job.inputs), job.labels, reduction="none")
                losses.sum().backward()
                network.zero_grad()
                collector.process_batch(rows, losses=losses)

        return run

    return make


PEERS: dict[str, Maker] = {
    "bergson, both sides, 2048 in all (Linear, no head)": bergson(2048),
    "dattri LoGra, 2048 in all (Linear only)": dattri_blocks("LoGra", 2048),
    "dattri FactGraSS, 2048 in all (Linear only)": dattri_blocks("FactGraSS", 2048),
    "captum TracInCP (Linear, Conv2d; keeps nothing)": captum_tracin,
    "captum TracInCPFast (last layer; keeps nothing)": captum_tracin_fast,
    "opacus, gradients only (no BatchNorm)": opacus,
    "traker, proj_dim 512": traker(512),
    "traker, proj_dim 2048": traker(2048),
    "dattri TRAK, proj_dim 512": dattri_trak(512),
}
