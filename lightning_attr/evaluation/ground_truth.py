"""Where results live: a directory with one file for each finished retraining, that several processes fill together."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_path
from lightning_attr.data.memory import free_bytes
from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreMismatchError
from lightning_attr.evaluation.subsets import Retraining, RetrainingPlan
from lightning_attr.files.claims import STALE_AFTER, Claim, Claims, create_once
from lightning_attr.files.fields import checked, integer, one_of, sha256, text
from lightning_attr.files.io import RESTORE, digest, read_tensors, remains, write_tensors
from lightning_attr.files.paths import inside, is_there, names_in
from lightning_attr.files.sealed_records import read_record, seal

FORMAT = 2
_MANIFEST = "manifest.json"


class Records:
    """The directory of a ground truth, as those who fill it see it.

    ``manifest.json`` says what is trained, ``masks.safetensors`` on which samples; ``runs/`` holds the outputs of each
    finished retraining, ``claims/`` who is at which one, ``checkpoints/`` the models that are kept.

    Args:
        dirpath: a directory with a manifest; :meth:`prepare` makes one.

    Raises:
        CorruptedStoreError: if manifest or masks are missing or damaged.

    Example:
        >>> import tempfile
        >>> from lightning_attr.evaluation.subsets import leave_one_out
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = Records.prepare(Path(folder), leave_one_out(4, [2], repeats=1, seed=0), {"n_target": 2})
        ...     for retraining in records.unfinished():
        ...         with records.claim(retraining):
        ...             records.write(retraining, torch.tensor([1.0, float(retraining.subset)]))
        ...     GroundTruth.open(folder).outputs
        tensor([[[1., 0.],
                 [1., 1.]]])
    """

    def __init__(self, dirpath: Path) -> None:
        self.dirpath = dirpath.absolute()  # what trains may change the working directory
        self.manifest = _read_manifest(self.dirpath)
        self.plan = _read_plan(self.dirpath, self.manifest)
        self.claims = Claims(inside(self.dirpath, "claims"))

    @classmethod
    def prepare(cls, dirpath: Path, plan: RetrainingPlan, recipe: Mapping[str, Any]) -> Records:
        """Open a directory for a plan, or make it."""
        masks = {"masks": plan.masks}
        record = {"kind": plan.kind, "repeats": plan.repeats, "seed": plan.seed, "masks": digest(masks)}
        manifest = {"format": FORMAT, "id": uuid.uuid4().hex, "plan": record, "recipe": dict(recipe)}
        dirpath = dirpath.absolute()
        path = dirpath / _MANIFEST
        if not is_there(path):
            if any(not name.startswith(".") for name in names_in(dirpath)) and not is_there(path):
                raise AttributionError(
                    f"Expected argument `dirpath` to be an empty or new directory, or one with ground truth, but "
                    f"{dirpath} holds other files and no {_MANIFEST}. Choose another directory."
                )
            create_once(path, seal(manifest))
        found = _read_manifest(dirpath)  # another process may have been first
        _check_same(dirpath, found, json.loads(json.dumps(manifest)))
        if not is_there(dirpath / "masks.safetensors"):
            write_tensors(inside(dirpath, "masks.safetensors"), masks, _masks_place(found))
        return cls(dirpath)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Data, model and trainer."""
        recipe: Mapping[str, Any] = self.manifest["recipe"]
        return recipe

    def path(self, retraining: Retraining) -> Path:
        """Name the file of a finished retraining.

        Returns where its outputs are, or will be.
        """
        return inside(self.dirpath, "runs", f"{retraining.name}.safetensors")

    def checkpoint_path(self, retraining: Retraining) -> Path:
        """Name the checkpoint of a retraining.

        Returns where it is, if it is kept.
        """
        return inside(self.dirpath, "checkpoints", f"{retraining.name}.ckpt")

    def unfinished(self) -> list[Retraining]:
        """List what has no outputs yet, whether or not somebody is at it."""
        done = set(names_in(inside(self.dirpath, "runs")))
        return [retraining for retraining in self.plan if self.path(retraining).name not in done]

    def claim(self, retraining: Retraining) -> Claim | None:
        """Claim a retraining.

        Returns the claim; None if it is finished, or another process is at it.
        """
        claim = self.claims.take(retraining.name)
        if claim is not None and is_there(self.path(retraining)):
            claim.release()
            return None
        return claim

    def write(self, retraining: Retraining, outputs: Tensor, details: Mapping[str, object] | None = None) -> None:
        """Keep the outputs of a finished retraining, at once.

        Shapes: outputs (n_target,).
        """
        n_target = self.recipe["n_target"]
        if outputs.shape != (n_target,):
            raise AttributionError(
                f"Expected the outputs of {retraining} to have the shape ({n_target},), one a target, but got "
                f"{tuple(outputs.shape)}."
            )
        if not outputs.isfinite().all():
            raise AttributionError(
                f"The retraining of {retraining} diverged: the outputs of "
                f"{int((~outputs.isfinite()).sum())} of {n_target} targets are NaN or Inf. Lower the learning rate, or "
                "clip gradients (in another directory: the results here are of the recipe as it is)."
            )
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        header = {**{name: str(value) for name, value in (details or {}).items()}, **self._place(retraining)}
        write_tensors(self.path(retraining), {"outputs": wide}, header)

    def read(self, retraining: Retraining) -> Tensor:
        """Read the outputs of a finished retraining.

        Returns ``(n_target,)``.
        """
        path, remedy = self.path(retraining), "Delete it and run again: only this retraining is repeated."
        outputs = read_tensors(path, remedy=remedy, place=self._place(retraining)).get("outputs")
        good = outputs is not None and outputs.dtype.is_floating_point and outputs.shape == (self.recipe["n_target"],)
        if outputs is None or not good or not outputs.isfinite().all():
            raise CorruptedStoreError(f"{path} holds no finite output of each target. {remedy}")
        return outputs

    def _place(self, retraining: Retraining) -> dict[str, str]:
        own = {"kind": "run", "truth": self.manifest["id"], "retraining": retraining.name}
        return {**own, "seed": str(retraining.seed)}

    def sweep(self) -> None:
        """Delete what killed processes left: claims of what is finished, and temporary files of long ago."""
        for file in inside(self.dirpath, "claims").glob("*-repeat=*"):
            if is_there(inside(self.dirpath, "runs", f"{file.stem}.safetensors")):
                file.unlink(missing_ok=True)
        for file in remains(self.dirpath):
            with suppress(FileNotFoundError):  # its owner lives, or another process sweeps
                if time.time() - file.stat().st_mtime > 2 * STALE_AFTER:
                    file.unlink()


@dataclass(frozen=True)
class GroundTruth:
    """What the model outputs after retraining, for many sets of training samples.

    A directory is a ground truth: one file for each finished retraining, beside a manifest. There is nothing to save,
    and one that is still being filled can be opened, too.

    Args:
        dirpath: the directory.
        kind: "lds" (random subsets), "loo" (one sample left out) or "without" (sets of samples removed); the last two
            have the full set as subset 0.
        masks: ``(num_subsets, n_train)``, bool, True where a sample is in.
        outputs: ``(seeds, num_subsets, n_target)``, float32 (float64 from float64 modules): the model output ``f`` of
            each target, which is higher where the model does better; NaN for what is not finished. Beside the masks it
            is what :func:`lightning_attr.metrics.linear_datamodeling_score` takes.
        seeds: ``(seeds, num_subsets)``, int64: the seed of each retraining.
        provenance: data, model and trainer that it was made with.

    Example:
        >>> from lightning_attr.metrics import linear_datamodeling_score
        >>> masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
        >>> outputs = torch.tensor([[[3.0], [5.0], [6.0]]])
        >>> truth = GroundTruth(Path(), "lds", masks, outputs, torch.zeros(1, 3, dtype=torch.int64), {})
        >>> scores = torch.tensor([[1.0], [2.0], [4.0]])
        >>> linear_datamodeling_score(scores, truth.masks, truth.outputs).mean
        tensor(1., dtype=torch.float64)
    """

    dirpath: Path
    kind: str
    masks: Tensor
    outputs: Tensor
    seeds: Tensor
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, dirpath: str | Path) -> GroundTruth:
        """Read a directory, and check every file against its checksum.

        Args:
            dirpath: the directory.

        Returns:
            The ground truth, as far as it is there.

        Raises:
            CorruptedStoreError: if the directory holds no ground truth, or a file is damaged.
        """
        records = Records(check_path("GroundTruth.open", "dirpath", dirpath))
        plan = records.plan
        shape = (plan.repeats, len(plan.masks), records.recipe["n_target"])
        _check_size(records.dirpath, shape)
        outputs = torch.full(shape, torch.nan)
        seeds = torch.empty(outputs.shape[:2], dtype=torch.int64)
        missing = {retraining.name for retraining in records.unfinished()}
        for retraining in plan:
            seeds[retraining.repeat, retraining.subset] = retraining.seed
            if retraining.name not in missing:
                found = records.read(retraining)
                outputs = outputs.to(torch.promote_types(outputs.dtype, found.dtype))
                outputs[retraining.repeat, retraining.subset] = found
        return cls(records.dirpath, plan.kind, plan.masks, outputs, seeds, records.recipe)

    @property
    def finished(self) -> Tensor:
        """Which retrainings have outputs, bool ``(seeds, num_subsets)``."""
        return ~self.outputs.isnan().any(2)

    @property
    def complete(self) -> bool:
        """Whether all have."""
        return bool(self.finished.all())

    @property
    def removed(self) -> list[list[int]]:
        """Training samples that each set but the first is without, for "loo" and "without"."""
        self._check_reference("removed")
        return [(~mask).nonzero().flatten().tolist() for mask in self.masks[1:]]

    @property
    def reference(self) -> Tensor:
        """Outputs after training on the full set, ``(seeds, n_target)``, for "loo" and "without"."""
        self._check_reference("reference")
        return self.outputs[:, 0]

    @property
    def effects(self) -> Tensor:
        """Outputs with the full set less outputs without each removed set, ``(seeds, num_subsets - 1, n_target)``.

        Positive where the samples help the target, as scores are; for "loo" and "without".
        """
        self._check_reference("effects")
        return self.outputs[:, :1] - self.outputs[:, 1:]

    def _check_reference(self, name: str) -> None:
        if self.kind == "lds":
            raise AttributionError(
                f"`{name}` compares with a model trained on the full set, but this ground truth has random subsets "
                '(kind "lds"). Use `retrain_loo` or `retrain_without`.'
            )


_PLAN = {
    "kind": one_of("lds", "loo", "without"),
    "repeats": integer(1, 2**20),
    "seed": integer(-(2**63), 2**64),
    "masks": sha256,
}


def _read_manifest(dirpath: Path) -> dict[str, Any]:
    path = dirpath / _MANIFEST
    manifest = read_record(path, "ground truth", FORMAT)
    try:
        if not all(isinstance(manifest.get(name), dict) for name in ("plan", "recipe")):
            raise ValueError("plan or recipe is missing")
        checked("id", manifest.get("id"), text(100))
        checked("n_target", manifest["recipe"].get("n_target"), integer(1, 2**40))
        for name, check in _PLAN.items():
            checked(name, manifest["plan"].get(name), check)
    except (ValueError, RecursionError) as error:
        raise CorruptedStoreError(f"{path} is damaged: {error}. {RESTORE}") from error
    return manifest


def _masks_place(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {"kind": "masks", "truth": manifest["id"]}


def _read_plan(dirpath: Path, manifest: Mapping[str, Any]) -> RetrainingPlan:
    path, plan = inside(dirpath, "masks.safetensors"), manifest["plan"]
    masks = read_tensors(path, plan["masks"], RESTORE, place=_masks_place(manifest)).get("masks")
    if masks is None or masks.ndim != 2 or masks.dtype != torch.bool or not masks.numel():
        raise CorruptedStoreError(f"{path} holds no sets of samples, one a row. {RESTORE}")
    return RetrainingPlan(plan["kind"], masks, plan["repeats"], plan["seed"])


def _check_size(dirpath: Path, shape: tuple[int, int, int]) -> None:
    """Refuse what a foreign manifest promises and no memory holds."""
    needed, free = 8 * math.prod(shape), free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise AttributionError(
            f"The outputs of {dirpath}, {shape[0]} seeds x {shape[1]:,} subsets x {shape[2]:,} targets, need "
            f"{needed:,} bytes, but {free:,} are free. Open it on a machine with more memory."
        )


_MEANINGS = {
    "train_data": "its training samples differ (a random split without a fixed seed does that)",
    "target_data": "its targets differ",
    "masks": "its subsets differ (`num_subsets`, `alpha`, `indices` or `index_sets`)",
}


def _check_same(dirpath: Path, stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    own, other = ({**manifest["recipe"], **manifest["plan"]} for manifest in (stored, found))
    # In this order, as the data decide about all that follows.
    first = ("kind", "n_train", "train_data", "targets", "n_target", "target_data")
    for name in dict.fromkeys((*first, *other, *own)):
        if own.get(name) != other.get(name):
            meaning = _MEANINGS.get(name, f"it has {name} = {own.get(name)!r}, here it is {other.get(name)!r}")
            raise StoreMismatchError(
                f"{dirpath} holds ground truth of other data or arguments: {meaning}. Use another directory, or delete "
                "this one to start afresh; nothing in it was changed."
            )
