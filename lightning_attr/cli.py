"""A LightningCLI with two more subcommands: ``python main.py attribute --config config.yaml --ckpt_path best``.

The other is ``python main.py check --config config.yaml``, before the run. Where the config names the classes of model
and data, ``python -m lightning_attr.cli`` is as good as a ``main.py``.

It needs ``jsonargparse``, as Lightning's own does: ``pip install "lightning_attr[cli]"``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]  # re-exported

from lightning_attr import methods
from lightning_attr.attribution.run_check import RunCheck
from lightning_attr.attribution.trainer import AttributionTrainer, attribute
from lightning_attr.files.io import write_bytes
from lightning_attr.results.result import AttributionResult

__all__ = ["AttributionCLI"]

FOLDER = "attribution_result"


class AttributionCLI(LightningCLI):
    """Lightning's command line with the subcommands ``check`` and ``attribute``, which call the trainer's methods.

    ``check`` prints what the ``AttributionCallback`` of the config would do, without training. ``attribute`` has the
    arguments of ``trainer.attribute``: ``--method TRAK`` names a method, ``--method.damping 0.1`` one of its arguments;
    all of them can be in the config as well, and ``--print_config`` prints it. The result is printed, and saved in
    ``attribution_result`` under the trainer's ``default_root_dir``, with the page of it and the whole config:
    ``python main.py --config config.yaml attribute`` runs it again.

    Args:
        *args: as ``lightning.pytorch.cli.LightningCLI`` takes them.
        **kwargs: likewise; the trainer's class is :class:`lightning_attr.AttributionTrainer` or a subclass.

    Attributes:
        result: of ``attribute``, None after another subcommand.
        checked: what ``check`` found, likewise.

    Example:
        >>> sorted(AttributionCLI.subcommands())
        ['attribute', 'check', 'fit', 'predict', 'test', 'validate']
    """

    result: AttributionResult | None = None
    checked: RunCheck | None = None

    def __init__(self, *args: Any, trainer_class: Any = AttributionTrainer, **kwargs: Any) -> None:
        super().__init__(*args, **{"trainer_class": trainer_class, **kwargs})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the subcommands, and the arguments that a command line cannot give."""
        objects = {"model", "datamodule", "train_dataloaders", "target_dataloaders", "noise_mask", "target_function"}
        objects.add("model_or_datamodule")
        return {**LightningCLI.subcommands(), "attribute": objects, "check": objects}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that names the nearest method where it does not know one.

        Args:
            **kwargs: of the parser.

        Returns:
            The parser.
        """
        parser = super().init_parser(**kwargs)
        refuse = parser.error

        def error(message: str, ex: Exception | None = None) -> NoReturn:
            refuse(message + _nearest(message), ex)

        parser.error = error  # type: ignore[method-assign]
        return parser

    def check(self, model: Any, datamodule: Any = None) -> None:
        """Say what the AttributionCallback of the config would do in a run, and what it would cost, without training.

        Args:
            model: from the config.
            datamodule: from the config.

        Raises:
            SystemExit: with code 1, if ``fit`` would refuse to record.
        """
        trainer: Any = self.trainer
        self.checked = found = trainer.check(model, datamodule)
        print(found)
        if not found.ok:
            raise SystemExit(1)

    def attribute(self, model: Any, datamodule: Any = None, **arguments: Any) -> None:
        """Attribute, print and save the result.

        Args:
            model: from the config.
            datamodule: from the config.
            **arguments: of ``trainer.attribute``.
        """
        self.result = attribute(self.trainer, datamodule, model=model, **arguments)
        self._keep(self.result)

    def _parse_ckpt_path(self) -> None:
        """Lightning's hook, which takes a model's hyperparameters from one file: of several, from the first."""
        own = self.config.get(self.config.get("subcommand")) or {}
        files = own.get("ckpt_path")
        if not isinstance(files, list):
            super()._parse_ckpt_path()
            return
        own["ckpt_path"] = files[0] if files else None
        super()._parse_ckpt_path()
        self.config[self.config["subcommand"]]["ckpt_path"] = files

    @rank_zero_only
    def _keep(self, result: AttributionResult) -> None:
        folder = Path(self.trainer.default_root_dir) / FOLDER
        result.save(folder)
        result.report(folder / "report.html")
        write_bytes(folder / "config.yaml", self.parser.dump(self.config).encode())
        print(f"{result}\nin {folder}")


def _nearest(message: str) -> str:
    """What to say after the message of a parser, if it is of a method that there is not."""
    given = re.search(r"Given value: .*?([\w.]+)'?[)}]?\s*$", message)
    if 'key "method"' not in message or given is None:
        return ""
    wrong = given[1].rpartition(".")[2]
    found = {name: getattr(methods, name) for name in methods.__all__}
    known = [name for name, kind in found.items() if _is_method(kind)]
    if wrong in known:
        return ""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong.lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[near[0]]}? " if near else ""
    return f"\nThere is no method {wrong}: {hint}There are {', '.join(sorted(known))}."


def _is_method(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, methods.AttributionMethod) and not inspect.isabstract(kind)


if __name__ == "__main__":
    AttributionCLI(save_config_kwargs={"overwrite": True})
