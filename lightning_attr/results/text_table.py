"""Texts with their proponents and opponents, to be read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[tuple[str, str, Sequence[tuple[float, str, str]]]], width: int = 100) -> str:
    """Write each target above the samples that explain it, a line each.

    Shapes: rows (score, caption, text). Returns the table, with an empty line between targets.
    """
    found = [(f"{score:+#.3g}", caption) for _, _, samples in rows for score, caption, _ in samples]
    number, name = (max((len(pair[side]) for pair in found), default=0) for side in (0, 1))
    indent = 2 + number + 3 + name + 2
    if width < indent + 8:
        raise ValueError(f"Expected argument `width` to be at least {indent + 8} characters, but got {width}.")
    blocks = []
    for caption, text, samples in rows:
        head = f"target {caption}  "
        lines = [head + _cut(text, width - len(head))]
        lines += [
            f"{score:+#.3g}".rjust(2 + number) + f"   {own.ljust(name)}  {_cut(sample, width - indent)}"
            for score, own, sample in samples
        ]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: max(0, width - 1)].rstrip()}…"
