"""Samples as HTML. Plain strings are escaped by the page; only :class:`markupsafe.Markup` is taken as it is."""

from __future__ import annotations

import io
import wave
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup, escape

from lightning_attr.arguments.checks import check_float, check_int
from lightning_attr.arguments.listed import check_words
from lightning_attr.errors import MissingDependencyError
from lightning_attr.report.highlights import HighlightedText

Renderer = Callable[[Any], str]
"""From a sample to HTML: a ``markupsafe.Markup`` is taken as it is, any other string is text and is escaped."""

_CHANNELS = (1, 3, 4)
_WAVEFORM = (240, 48)
"""Width and height of a waveform, in pixels."""


@dataclass(frozen=True)
class ImageRenderer:
    """Thumbnails.

    Images are arrays or tensors of shape ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, or of
    Pillow. ``uint8`` and values from 0 to 1 are shown as they are; other ranges, such as those of normalised images,
    are stretched to what each image holds.

    Args:
        size: of the longer side, in pixels; smaller images keep theirs.

    Raises:
        ValueError: if the size is no positive integer.

    Example:
        >>> ImageRenderer(size=8)(torch.rand(3, 16, 16))[:34]
        Markup('<img alt="" src="data:image/png;ba')
    """

    size: int = 96

    def __post_init__(self) -> None:
        check_int(self, "size", self.size, 1)

    def __call__(self, sample: Any) -> Markup:
        """Draw a sample.

        Returns an ``<img>`` that holds the picture.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingDependencyError(
                'Reports with images need Pillow, which is not installed. Run `pip install "lightning_attr[plot]"`.'
            ) from error
        image = sample.convert("RGB") if isinstance(sample, Image.Image) else Image.fromarray(_pixels(sample))
        image.thumbnail((self.size, self.size))
        files = {"png": _encoded(image, "PNG", optimize=True)}
        if image.mode == "RGB" and max(image.size) > 32:
            files["jpeg"] = _encoded(image, "JPEG", quality=80)
        kind, file = min(files.items(), key=lambda entry: len(entry[1]))
        return Markup('<img alt="" src="data:image/{};base64,{}">').format(kind, b64encode(file).decode())


@dataclass(frozen=True)
class TextRenderer:
    """Text; of a :class:`lightning_attr.modalities.HighlightedText` the tokens that count are marked.

    Args:
        width: characters shown; the whole text is in the tooltip. Marked tokens are all shown.

    Raises:
        ValueError: if the width is no positive integer.

    Example:
        >>> TextRenderer(width=8)("<b>It rains</b>")
        Markup('<span class="text" title="&lt;b&gt;It rains&lt;/b&gt;">&lt;b&gt;It ra…</span>')
    """

    width: int = 300

    def __post_init__(self) -> None:
        check_int(self, "width", self.width, 1)

    def __call__(self, sample: Any) -> Markup:
        """Write a sample."""
        if isinstance(sample, HighlightedText):
            return Markup('<span class="text">{}</span>').format(Markup(sample.html()))
        text = str(sample)
        shown = text if len(text) <= self.width else text[: self.width].rstrip() + "…"
        whole = Markup(' title="{}"').format(text) if shown != text else Markup("")
        return Markup('<span class="text"{}>{}</span>').format(whole, shown)


@dataclass(frozen=True)
class AudioRenderer:
    """A waveform and a player.

    Args:
        sample_rate: in samples per second.
        seconds: of each recording that the page holds; 16 bits per sample.

    Raises:
        ValueError: if an argument is not positive.

    Example:
        >>> AudioRenderer(sample_rate=8000)(torch.zeros(1, 80))[:17]
        Markup('<svg class="wave"')
    """

    sample_rate: int
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_int(self, "sample_rate", self.sample_rate, 1)
        check_float(self, "seconds", self.seconds, above=0)

    def __call__(self, sample: Any) -> Markup:
        """Draw a recording.

        Shapes: sample (T,). Returns a picture, and an ``<audio>`` that holds the sound.
        """
        values = np.atleast_2d(_array(sample))
        if values.ndim != 2 or not values.size:
            raise ValueError(f"Expected a recording of shape (T,) or (channels, T), but got shape {values.shape}.")
        sound = np.nan_to_num(values.mean(0))[: max(1, round(self.seconds * self.sample_rate))].clip(-1, 1)
        file = io.BytesIO()
        with wave.open(file, "wb") as written:
            written.setnchannels(1)
            written.setsampwidth(2)
            written.setframerate(self.sample_rate)
            written.writeframes((sound * 32767).astype("<i2").tobytes())
        player = Markup('<audio controls preload="none" src="data:audio/wav;base64,{}"></audio>')
        return _waveform(sound) + player.format(b64encode(file.getvalue()).decode())


@dataclass(frozen=True)
class TabularRenderer:
    """Names and values of a row.

    Args:
        names: of the values; by default the keys of a mapping, else numbers from 0.
        most: values shown.

    Raises:
        TypeError: if ``names`` is no list of names.
        ValueError: if ``most`` is no positive integer.

    Example:
        >>> TabularRenderer(["age", "sex"])([31.0, "f"])
        Markup('<table class="row"><tr><th>age</th><td>31</td></tr><tr><th>sex</th><td>f</td></tr></table>')
    """

    names: Sequence[str] | None = None
    most: int = 12

    def __post_init__(self) -> None:
        check_int(self, "most", self.most, 1)
        if self.names is not None:
            check_words(self, "names", self.names, "a list of names, or None")

    def __call__(self, sample: Any) -> Markup:
        """Write a row."""
        keyed = isinstance(sample, Mapping)
        values = list(sample.values()) if keyed else list(sample if _is_sequence(sample) else _array(sample).flat)
        names = list(sample) if keyed and self.names is None else self.names
        if names is not None and len(names) != len(values):
            raise ValueError(
                f"Expected argument `names` to have one name for each value, but got {len(names)} names and a sample "
                f"of {len(values)} values."
            )
        shown = zip(range(len(values)) if names is None else names, values, strict=True)
        rows = [
            Markup("<tr><th>{}</th><td>{}</td></tr>").format(name, _value(value))
            for name, value in list(shown)[: self.most]
        ]
        rest = len(values) - self.most
        more = Markup('<tr><td colspan="2">{} more</td></tr>').format(rest) if rest > 0 else Markup("")
        return Markup('<table class="row">{}{}</table>').format(Markup("").join(rows), more)


def render_sample(sample: Any) -> Markup:
    """Draw a sample by what it is: an image, a text, a row of a table, or the fields of a mapping.

    Args:
        sample: what a data set gives for an index, without its label.

    Returns:
        HTML; of what is none of these the beginning of its ``repr``.

    Example:
        >>> render_sample("It rains.")
        Markup('<span class="text">It rains.</span>')
        >>> render_sample(torch.tensor([0.5, 2.0]))
        Markup('<table class="row"><tr><th>0</th><td>0.5</td></tr><tr><th>1</th><td>2</td></tr></table>')
    """
    if isinstance(sample, (str, HighlightedText)):
        return TextRenderer()(sample)
    if _is_image(sample):
        return ImageRenderer()(sample)
    if isinstance(sample, Mapping):
        fields = [Markup("<dt>{}</dt><dd>{}</dd>").format(name, render_sample(value)) for name, value in sample.items()]
        return Markup("<dl>{}</dl>").format(Markup("").join(fields))
    if _is_sequence(sample) or _is_vector(sample):
        return TabularRenderer()(sample)
    if isinstance(sample, (torch.Tensor, np.ndarray)):
        return TextRenderer()(f"{type(sample).__name__} of shape {tuple(sample.shape)}, {sample.dtype}")
    return TextRenderer()(_value(sample) if isinstance(sample, (int, float)) else repr(sample))


def _is_sequence(sample: Any) -> bool:
    return isinstance(sample, (list, tuple))


def _is_vector(sample: Any) -> bool:
    return isinstance(sample, (torch.Tensor, np.ndarray)) and sample.ndim == 1


def _is_image(sample: Any) -> bool:
    """Whether it is of Pillow, or has the shape of a picture: two sides of at least 4 pixels, and channels."""
    if hasattr(sample, "getbands"):
        return True
    if not isinstance(sample, (torch.Tensor, np.ndarray)) or sample.ndim not in (2, 3):
        return False
    shape = tuple(sample.shape)
    if len(shape) == 3 and shape[0] not in _CHANNELS and shape[-1] not in _CHANNELS:
        return False
    sides = shape if len(shape) == 2 else shape[1:] if shape[0] in _CHANNELS else shape[:2]
    return bool(min(sides) >= 4)


def _array(sample: Any) -> np.ndarray[Any, Any]:
    """As numpy, floating-point where torch has a type that numpy lacks."""
    if isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu()
        sample = (sample.float() if sample.dtype in (torch.bfloat16, torch.float16) else sample).numpy()
    return np.asarray(sample)


def _pixels(sample: Any) -> np.ndarray[Any, Any]:
    """``(H, W)`` or ``(H, W, 3 or 4)``, uint8."""
    values = _array(sample)
    if values.ndim not in (2, 3):
        raise ValueError(
            f"Expected an image of shape (H, W), (C, H, W) or (H, W, C), but got shape {values.shape}. Pass a "
            "`renderer` for these samples."
        )
    if values.ndim == 3 and values.shape[0] in _CHANNELS:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] not in _CHANNELS:
        raise ValueError(
            f"Expected an image with 1, 3 or 4 channels, but got shape {values.shape}. Pass a `renderer` for these "
            "samples."
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.dtype != np.uint8:
        values = np.nan_to_num(values.astype(np.float64))
        low, high = values.min(), values.max()
        if low < 0 or high > 1:
            values = (values - low) / max(high - low, 1e-12)
        values = (values * 255).round().astype(np.uint8)
    return np.ascontiguousarray(values)


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _waveform(sound: np.ndarray[Any, Any]) -> Markup:
    """Lowest and highest value of each column of pixels, as a line."""
    width, height = _WAVEFORM
    columns = np.array_split(sound, min(width, len(sound)))
    points = [
        f"{i},{height / 2 * (1 - value):.1f}"
        for i, column in enumerate(columns)
        for value in (column.min(), column.max())
    ]
    drawing = Markup(
        '<svg class="wave" viewBox="0 0 {} {}" role="img" aria-label="waveform"><polyline points="{}"/></svg>'
    )
    return drawing.format(width, height, " ".join(points))


def _value(value: Any) -> str:
    """A number in four digits, anything else in its own words."""
    if isinstance(value, (torch.Tensor, np.generic)) and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(escape(value)) if isinstance(value, Markup) else str(value)
