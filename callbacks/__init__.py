"""Lightning callbacks: when attribution happens. How is in the rest of the package."""

from lightning_attr.callbacks.attribution import AttributionCallback
from lightning_attr.callbacks.curation import DataCuration
from lightning_attr.callbacks.in_run import InRunDataValue
from lightning_attr.callbacks.monitor import AttributionMonitor

__all__ = ["AttributionCallback", "AttributionMonitor", "DataCuration", "InRunDataValue"]
