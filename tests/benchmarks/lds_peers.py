"""Other libraries' scores for a setting of `lds.py`: traker, dattri's TRAK, kronfluence's EK-FAC; classifiers only."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from lds_settings import LdsSetting
from methods_peers import kronfluence as influence_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr.interop import dattri_task


def traker(setting: LdsSetting, n_models: int, proj_dim: int = 512) -> Tensor:
    """TRAK as released (traker 0.3.2, no ridge), over models trained on all samples from different seeds."""
    from trak import TRAKer  # type: ignore[import-untyped]  # ships no types
    from trak.projectors import BasicProjector, ProjectionType  # type: ignore[import-untyped]  # ships no types

    models = [setting.trained(setting.train, seed).network for seed in range(n_models)]
    # Its half precision, the default, takes 25 times as long on a CPU and scores no better: 0.191 for one MLP.
    projector = BasicProjector(
        grad_dim=sum(parameter.numel() for parameter in models[0].parameters()),
        proj_dim=proj_dim,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
    )
    n, m = len(setting.train), len(setting.targets)
    with tempfile.TemporaryDirectory() as save_dir:
        trak = TRAKer(
            model=setting.module().network.eval(),
            task="image_classification",
            train_set_size=n,
            save_dir=save_dir,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        # One batch: its projector draws the whole matrix again for every batch.
        for model_id, model in enumerate(models):
            trak.load_checkpoint(model.state_dict(), model_id)
            trak.featurize(setting.train.tensors, num_samples=n)
        trak.finalize_features()
        for model_id, model in enumerate(models):
            trak.start_scoring_checkpoint("targets", model.state_dict(), model_id, num_targets=m)
            trak.score(setting.targets.tensors, num_samples=m)
        return torch.tensor(trak.finalize_scores("targets"))


def dattri_trak(setting: LdsSetting) -> Tensor:
    """dattri 0.3.0's TRAK at the snapshots of our run."""
    from dattri.algorithm.trak import TRAKAttributor
    from lds import fit

    from lightning_attr import FeatureStore
    from lightning_attr.callbacks import AttributionCallback

    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(setting, AttributionCallback(folder, featurize=False), seed=0)
        task = dattri_task(FeatureStore.open(Path(folder)), trainer.lightning_module.eval(), train="output")
        attributor = TRAKAttributor(
            task,
            lambda params, sample: task.original_target_func(params, sample).sigmoid(),
            projector_kwargs={"proj_dim": 512},
            regularization=1e-3,
        )
        loaders = [DataLoader(data, len(data)) for data in (setting.train, setting.targets)]
        attributor.cache(loaders[0])
        return attributor.attribute(loaders[1]).detach()


class _Trained:
    """A trained network and its data, as `methods_peers` wants them."""

    def __init__(self, setting: LdsSetting) -> None:
        self.setting, self.module = setting, setting.trained(setting.train, seed=0)

    def network(self) -> nn.Module:
        network: nn.Module = self.module.network
        return network

    def loaders(self) -> list[DataLoader[Any]]:
        return [DataLoader(TensorDataset(*data.tensors)) for data in (self.setting.train, self.setting.targets)]


def kronfluence(setting: LdsSetting) -> Tensor:
    """kronfluence 1.0.1's EK-FAC at the end of one training, with its own damping."""
    return influence_of("ekfac")(_Trained(setting), own=False, damping=None)  # type: ignore[arg-type]  # all it reads
