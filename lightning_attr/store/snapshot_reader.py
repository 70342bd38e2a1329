"""Reads what is stored of a snapshot: its weights, what the optimizer knew, what its projection has learned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.files.io import digest, read_tensors
from lightning_attr.files.paths import inside
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.store.directory import StoreNotes

WEIGHTS, FROZEN = "weights.safetensors", "frozen.safetensors"
OPTIMIZER, BASIS = "optimizer.safetensors", "basis.safetensors"


class SnapshotReader(StoreNotes):
    """A store whose snapshots can be read; every file says in its header which one it is, and is compared."""

    def weights(self, key: str) -> dict[str, Tensor]:
        """Read the weights of a snapshot.

        Args:
            key: its name.

        Returns:
            Parameter or buffer name -> tensor.

        Raises:
            CorruptedStoreError: if they are missing or damaged.
        """
        snapshot = self.snapshot(key)
        place = {name: value for name, value in self.place(key, "weights").items() if name != "weights"}
        if snapshot.frozen is None:
            return self._of_this_model(key, self._tensors(key, WEIGHTS, snapshot.weights, place))
        shared = {"kind": "frozen", "store": place["store"]}
        frozen = self._tensors(key, FROZEN, snapshot.frozen, shared)
        tensors = {**frozen, **self._tensors(key, WEIGHTS, None, place)}
        if digest(tensors) != snapshot.weights:
            raise CorruptedStoreError(f"{self.path / snapshot.folder} is damaged: {WEIGHTS} is not this snapshot's.")
        return self._of_this_model(key, tensors)

    def _of_this_model(self, key: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """See that all parameters are there; buffers are known to the model alone, and of sparse ones only parts."""
        for name, shape in self.fingerprint.layout.items():
            found = weights.get(name)
            if f"{name}.values" not in weights and (found is None or found.shape != shape):
                shown = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
                raise CorruptedStoreError(
                    f"{self.path / self.snapshot(key).folder} does not hold the weights of this store's model: "
                    f"`{name}` {shown}, where {tuple(shape)} is expected. {self._remedy(key)}"
                )
        return weights

    def optimizer_state(self, key: str) -> OptimizerState:
        """Read what the optimizer knew at a snapshot.

        Args:
            key: its name.

        Returns:
            The state.

        Raises:
            AttributionError: if it was not recorded.
            CorruptedStoreError: if it is missing, damaged, or makes no sense.
        """
        content = self.snapshot(key).optimizer
        if content is None:
            raise AttributionError(
                f"The snapshot {key!r} in {self.path} has no optimizer state, which this method needs. Fit with "
                "AttributionCallback(optimizer_state=True), or with the method itself as the callback's `method`."
            )
        tensors = self._tensors(key, OPTIMIZER, content, self.place(key, "optimizer"))
        try:
            return OptimizerState.from_tensors(tensors)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise CorruptedStoreError(
                f"{self.path / self.snapshot(key).folder / OPTIMIZER} holds no state of an optimizer ({error}). "
                f"{self._remedy(key)}"
            ) from error

    def basis(self, key: str) -> dict[str, Tensor] | None:
        """Read what the projection of a snapshot has learned.

        Args:
            key: the snapshot.

        Returns:
            As :attr:`lightning_attr.projectors.LearnedProjection.basis` gives it; None if there is none yet.

        Raises:
            CorruptedStoreError: if it is missing or damaged.
        """
        content = self.snapshot(key).basis
        return None if content is None else self._tensors(key, BASIS, content, self.place(key, "basis"))

    def place(self, key: str, kind: str) -> dict[str, str]:
        """Say what a file of a snapshot is, for its header: of which store and snapshot, with which weights.

        Args:
            key: the snapshot.
            kind: of file.

        Returns:
            Name -> value, the same in a store that this one was merged into.
        """
        snapshot = self.snapshot(key)
        store = snapshot.origin or self.manifest.id
        return {"kind": kind, "store": store, "snapshot": snapshot.projection, "weights": snapshot.weights}

    def _tensors(self, key: str, file: str, content: str | None, place: Mapping[str, str]) -> dict[str, Tensor]:
        return read_tensors(inside(self.path, self.snapshot(key).folder, file), content, self._remedy(key), place=place)

    def _remedy(self, key: str) -> str:
        return f"Call `FeatureStore.open({str(self.path)!r}).set_aside([{key!r}])` to go on without this snapshot."
