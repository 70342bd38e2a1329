"""Random numbers that depend on their key alone, and draws of single samples."""

from lightning_attr.randomness.draws import Draw

__all__ = ["Draw"]
