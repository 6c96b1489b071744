"""Texts to predict, out of any conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qadapter.files.artifacts import write_json_lines


def write_texts(replies: Sequence[str], out_file: Path, *, max_items: int, max_chars: int) -> int:
    """Write replies as JSON lines `{"text": str}`; returns how many.

    Args:
        replies: the texts.
        out_file: written as a whole.
        max_items: most texts written, the first ones.
        max_chars: where a longer text is cut.
    """
    texts = [reply[:max_chars] for reply in replies[:max_items]]
    write_json_lines(out_file, ({"text": text} for text in texts))
    return len(texts)
