"""One page that shows a result: suspicious training samples, and each target beside the samples behind it.

:meth:`lightning_attr.AttributionResult.report` writes it. Renderers, functions from a sample to HTML, draw samples:

* :class:`ImageRenderer`: thumbnails;
* :class:`TextRenderer`: text, with marked tokens where they are known;
* :class:`AudioRenderer`: a waveform and a player;
* :class:`TabularRenderer`: names and values;
* :func:`render_sample`, the default: the first of these that knows what to do with the sample.
"""

from lightning_attr.report.page import write_report
from lightning_attr.report.renderers import (
    AudioRenderer,
    ImageRenderer,
    Renderer,
    TabularRenderer,
    TextRenderer,
    render_sample,
)

__all__ = [
    "AudioRenderer",
    "ImageRenderer",
    "Renderer",
    "TabularRenderer",
    "TextRenderer",
    "render_sample",
    "write_report",
]
