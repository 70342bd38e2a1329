"""The feature store: a directory of snapshots and features, safetensors and one manifest."""

from lightning_attr.store.feature_store import FeatureStore

__all__ = ["FeatureStore"]
