"""The journal of a run: which samples each optimizer step was taken on, at which learning rates."""

from lightning_attr.journal.journal import Journal
from lightning_attr.journal.steps import GroupStep, JournalBatch, JournalStep

__all__ = ["GroupStep", "Journal", "JournalBatch", "JournalStep"]
