"""A progress bar in the style of the Trainer's own, silent where that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_attr.user_code.lightning_names import both


@contextmanager
def progress(trainer: L.Trainer, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress through ``total`` steps.

    Yields a function to call after each step.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, both(RichProgressBar)) and not bar.is_disabled and bar.progress is not None:
        live = bar.progress
        task = live.add_task(description, total=total)

        def advance() -> None:
            live.update(task, advance=1)
            bar.refresh()  # Lightning's Rich display does not redraw by itself

        try:
            yield advance
        finally:
            live.remove_task(task)
            bar.refresh()
    elif isinstance(bar, both(TQDMProgressBar)) and not bar.is_disabled:
        with Tqdm(
            desc=description,
            total=total,
            position=2 * bar.process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=bar.BAR_FORMAT,
        ) as line:
            yield lambda: _advance(line)
    else:
        yield lambda: None


def _advance(line: Tqdm) -> None:
    line.update(1)
