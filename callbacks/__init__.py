"""Lightning callbacks: when attribution happens. How is in the rest of the package."""

from lightning_attr.callbacks.attribution import AttributionCallback

__all__ = ["AttributionCallback"]
