"""Samples as HTML: pictures keep their values, texts stay text."""

from __future__ import annotations

import io
import re
import wave
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import Markup

from lightning_attr.report import AudioRenderer, ImageRenderer, TabularRenderer, TextRenderer, render_sample
from lightning_attr.report.highlights import HighlightedText

PIL = pytest.importorskip("PIL.Image")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def pixels(html: str) -> np.ndarray[Any, Any]:
    found = re.search(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    assert found
    return np.asarray(PIL.open(io.BytesIO(b64decode(found[1]))))


def test_an_image_keeps_its_values() -> None:
    image = torch.arange(90, dtype=torch.uint8).reshape(3, 5, 6)
    last = image.permute(1, 2, 0)
    for form in (image, last, PIL.fromarray(last.numpy())):
        assert (pixels(ImageRenderer()(form)) == last.numpy()).all()


def test_values_from_0_to_1_are_not_stretched_and_others_are() -> None:
    grey = torch.full((4, 4), 0.5)
    assert (pixels(ImageRenderer()(grey)) == 128).all()
    normalised = torch.tensor([-2.0, 0.0, 2.0, 2.0]).repeat(4, 1)
    assert (pixels(ImageRenderer()(normalised)) == [0, 128, 255, 255]).all()
    assert pixels(ImageRenderer()(torch.full((4, 4), float("nan")))).max() == 0


def test_a_large_image_becomes_small() -> None:
    assert pixels(ImageRenderer(size=96)(torch.rand(3, 200, 400))).shape == (48, 96, 3)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 5, 6), (4,)])
def test_what_is_no_image_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got shape {shape}")):
        ImageRenderer()(torch.zeros(shape))


@pytest.mark.parametrize(
    "render",
    [
        TextRenderer(),
        render_sample,
        lambda text: render_sample({"text": text, text: 1.0}),
        lambda text: render_sample(HighlightedText([text], [1.0])),
        lambda text: TabularRenderer([text])([text]),
        lambda text: render_sample([text]),
    ],
)
def test_markup_in_a_sample_is_text(render: Any) -> None:
    html = str(render(HOSTILE))
    assert "<script" not in html
    assert "<img" not in html
    assert HOSTILE in Markup(html).unescape() or "alert" in html


def test_a_long_text_is_cut_and_whole_in_its_tooltip() -> None:
    html = TextRenderer(width=5)("It rains.")
    assert "It ra…" in html
    assert 'title="It rains."' in html


def test_marked_tokens_are_coloured() -> None:
    assert "rgba(0,114,178" in render_sample(HighlightedText(["It", " rains"], [0.0, 1.0]))


def test_a_recording_can_be_played() -> None:
    sound = torch.stack([torch.linspace(-1, 1, 100), torch.zeros(100)])
    html = AudioRenderer(sample_rate=50, seconds=1)(sound)
    found = re.search(r"data:audio/wav;base64,([^\"]+)", html)
    assert found
    with wave.open(io.BytesIO(b64decode(found[1]))) as read:
        assert (read.getframerate(), read.getnframes()) == (50, 50)
        played = np.frombuffer(read.readframes(50), "<i2") / 32767
    assert np.allclose(played, sound.mean(0)[:50], atol=1e-4)
    with pytest.raises(ValueError, match=r"recording of shape \(T,\) or \(channels, T\), but got shape \(2, 2, 2\)"):
        AudioRenderer(50)(torch.zeros(2, 2, 2))


def test_a_row_has_names_and_values() -> None:
    html = TabularRenderer(["age", "height"])(torch.tensor([31.0, 1.8125]))
    assert "<th>age</th><td>31</td>" in html
    assert "<td>1.812</td>" in html
    assert "<th>age</th><td>31</td>" in TabularRenderer()({"age": torch.tensor(31.0)})
    assert "8 more" in TabularRenderer(most=2)(list(range(10)))
    with pytest.raises(ValueError, match="got 1 names and a sample of 2 values"):
        TabularRenderer(["age"])([1, 2])


@pytest.mark.parametrize(
    ("sample", "part"),
    [
        (torch.zeros(1, 8, 8), "<img"),
        (torch.zeros(8, 8), "<img"),
        (torch.zeros(5), '<table class="row">'),
        ([1, 2], '<table class="row">'),
        (torch.zeros(2, 3, 4, 5), "Tensor of shape (2, 3, 4, 5), torch.float32"),
        (3.0, "3"),
        (None, "None"),
        ({"a": "It rains.", "b": torch.zeros(8, 8)}, "<dt>b</dt><dd><img"),
    ],
)
def test_the_kind_of_a_sample_is_seen(sample: Any, part: str) -> None:
    assert part in render_sample(sample)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ImageRenderer(size=0), "`size` of ImageRenderer"),
        (lambda: TextRenderer(width=-1), "`width` of TextRenderer"),
        (lambda: AudioRenderer(sample_rate=0), "`sample_rate` of AudioRenderer"),
        (lambda: AudioRenderer(8000, seconds=0), "`seconds` of AudioRenderer"),
        (lambda: TabularRenderer(most=0), "`most` of TabularRenderer"),
    ],
)
def test_wrong_arguments(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()
