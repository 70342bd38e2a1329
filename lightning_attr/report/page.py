"""The page of a report: its data as JSON, its template, one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Sized
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lightning_attr.arguments.checks import check_callable, check_instance, check_int, check_path
from lightning_attr.arguments.messages import argument_message
from lightning_attr.files.io import write_bytes
from lightning_attr.report.figures import detection_curve, distributions, figures_in_words
from lightning_attr.report.renderers import Renderer, render_sample
from lightning_attr.report.samples import Drawings, label_of, read_item
from lightning_attr.report.shown import ShownResult, knows_self_influence

BUDGET = 22 * 2**20
"""Bytes of samples on a page; with everything else it stays below 30 MB."""
_SUSPICIOUS = 1000
"""Training samples that are shown as the most suspicious; all others have a row of numbers."""


def write_report(
    result: ShownResult,
    path: str | Path,
    train: Any = None,
    targets: Any = None,
    *,
    k: int = 5,
    renderer: Renderer | None = None,
    outputs: Any = None,
    classes: Sequence[str] | Mapping[int, str] | None = None,
    title: str = "Training-data attribution",
) -> Path:
    """Write a page that shows a result; see :meth:`lightning_attr.AttributionResult.report`.

    Args:
        result: what is shown.
        path: the file; it is replaced when the page is complete.
        train: ``train[i]`` is the training sample of index ``i``; None shows numbers alone.
        targets: the same for targets.
        k: proponents of each target, and as many opponents.
        renderer: from a sample to HTML; by default :func:`render_sample`.
        outputs: of each target, numbers or words.
        classes: names of the class labels.
        title: of the page.

    Returns:
        The path.

    Raises:
        ValueError: if an argument is out of range, or a sample cannot be read or drawn.
        TypeError: if an argument is of another kind.
    """
    owner = "AttributionResult.report"
    file = check_path(owner, "path", path)
    k = min(check_int(owner, "k", k, 1), result.scores.depth)
    renderer = render_sample if renderer is None else renderer
    check_callable(owner, "renderer", renderer, "a function from a sample to HTML")
    for name, value in {"train": train, "targets": targets}.items():
        if value is not None and not hasattr(value, "__getitem__"):
            raise TypeError(argument_message(owner, name, "a data set or sequence that can be indexed", value))
        indices = result.scores.train_indices if name == "train" else result.scores.target_indices
        if isinstance(value, Sized) and not isinstance(value, Mapping) and len(value) <= int(indices.max()):
            expected = f"the data set that was attributed, which has an item {int(indices.max())}"
            raise ValueError(argument_message(owner, name, expected, value, f"It has {len(value)} items."))
    check_instance(owner, "title", title, str, "a text")
    names = _names(owner, classes)
    shown = None if outputs is None else _outputs(owner, outputs, result.scores.shape[1])
    drawings = Drawings(renderer, BUDGET)
    data = _data(result, k, train, targets, drawings, shown)
    page = _template().render(
        title=title,
        summary=_summary(result),
        measured=figures_in_words(result),
        figures=distributions(result, names),
        detection=detection_curve(result),
        style=Markup(_resource("report.css")),
        script=Markup(_resource("report.js")),
        data=Markup(_json(data | {"classes": names})),
        left_out=drawings.without,
    )
    write_bytes(file, page.encode())
    return file


def _data(
    result: ShownResult, k: int, train: Any, targets: Any, drawings: Drawings, outputs: list[str] | None
) -> dict[str, Any]:
    """Everything that the page's script reads; samples are drawn in the order of their weight in the page."""
    scores = result.scores
    proponents, opponents = ([part.tolist() for part in extreme] for extreme in (scores.topk(k), scores.bottomk(k)))
    columns = {"selfInfluence": result.self_influence, "dataValue": result.data_value, "loss": result.loss}
    known = {"label": result.labels, "noise": result.noise_mask, "trainedOn": result.trained_on}
    by = result.self_influence if knows_self_influence(result) else result.loss
    suspicious = scores.train_indices[by.argsort(descending=True, stable=True)[:_SUSPICIOUS]].tolist()
    behind = chain.from_iterable(chain(*pair) for pair in zip(proponents[0], opponents[0], strict=True))
    in_turn = (i for pair in zip_longest(suspicious, behind) for i in pair if i is not None)
    indices = scores.target_indices.tolist()
    own: list[tuple[str | None, int | str | None]] = [(None, None)] * len(indices)
    if targets is not None:
        items = ((index, read_item(targets, index)) for index in indices)
        own = [(drawings.draw(targets, index, item), label_of(item)) for index, item in items]
    return {
        "train": {
            "index": scores.train_indices.tolist(),
            **{name: _rounded(column) for name, column in columns.items()},
            **{name: column.tolist() for name, column in known.items() if column is not None},
        },
        "samples": {} if train is None else drawings.draw_all(train, in_turn),
        "targets": [
            {
                "index": index,
                "sample": sample,
                "label": label,
                "output": None if outputs is None else outputs[j],
                "proponents": _cards(proponents[0][j], proponents[1][j], 1),
                "opponents": _cards(opponents[0][j], opponents[1][j], -1),
            }
            for j, (index, (sample, label)) in enumerate(zip(indices, own, strict=True))
        ],
    }


def _cards(indices: Sequence[int], scores: Sequence[float], sign: int) -> list[tuple[int, float | None]]:
    """Samples whose scores have this sign: with few samples, the strongest of either side are the same."""
    return [(index, _short(score)) for index, score in zip(indices, scores, strict=True) if sign * score > 0]


def _summary(result: ShownResult) -> list[tuple[str, str]]:
    """What was attributed and how."""
    (n, m), provenance = result.scores.shape, result.scores.provenance
    facts = {"training samples": f"{n:,}", "targets": f"{m:,}"}
    facts |= {name.replace("_", " "): _fact(value) for name, value in provenance.items()}
    return [*facts.items()]


def _fact(value: Any) -> str:
    """In one line: numbers in four digits, long lists and mappings with their length and ends."""
    if isinstance(value, Mapping):
        parts = [f"{key}: {_inner(own)}" for key, own in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [_fact(own) for own in value]
    else:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(parts) if len(parts) <= 4 else f"{len(parts)}: {parts[0]}, …, {parts[-1]}"


def _inner(value: Any) -> str:
    return f"({_fact(value)})" if isinstance(value, (Mapping, list, tuple)) else _fact(value)


def _names(owner: str, classes: Any) -> dict[int, str]:
    if classes is None:
        return {}
    if isinstance(classes, str) or not isinstance(classes, (Sequence, Mapping)):
        raise TypeError(
            argument_message(owner, "classes", "names in the order of their labels, or label -> name", classes)
        )
    pairs = classes.items() if isinstance(classes, Mapping) else enumerate(classes)
    return {check_int(owner, f"classes[{label!r}]", label): str(name) for label, name in pairs}


def _outputs(owner: str, outputs: Any, count: int) -> list[str]:
    values = outputs.tolist() if isinstance(outputs, Tensor) else list(outputs)
    if len(values) != count:
        raise ValueError(argument_message(owner, "outputs", f"one value for each of the {count} targets", outputs))
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]


def _rounded(column: Tensor) -> list[float | None]:
    return [_short(value) for value in column.tolist()]


def _short(value: float) -> float | None:
    """In five digits; JSON has no NaN and no infinity."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _json(data: Mapping[str, Any]) -> str:
    """JSON that a ``<script>`` can hold: no text in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("report.html.j2"))


def _resource(name: str) -> str:
    return (files("lightning_attr.report") / name).read_text("utf-8")
