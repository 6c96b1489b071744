"""Data set cards: which files a card may name, looked at before a library reads it.

A card is a `README.md` written by the data set's author. `datasets` would follow a URL in it, and expand YAML
aliases without end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.files.yaml_text import read_yaml

MAX_CARD_BYTES = 2**20


def check(path: str, folder: Path) -> None:
    """Refuse a card that could lead out of its folder.

    Args:
        path: the source, for the message.
        folder: the data set's folder; a `README.md` in it is the card.

    Raises:
        QAdapterError: the card is too large, is no YAML, or names files by a URL, an absolute path or `..`.
    """
    file = folder / "README.md"
    if not file.is_file():
        return
    if file.stat().st_size > MAX_CARD_BYTES:
        raise QAdapterError(f"The card {shown_path(file)} of {path} is larger than 1 MiB; shorten it or remove it.")
    text = file.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    if not text.startswith("---"):
        return
    try:
        card = read_yaml(text.split("\n---", 1)[0].removeprefix("---"))
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise QAdapterError(f"The splits of {path} cannot be read: its card is not plain YAML ({reason}).") from error
    if not isinstance(card, dict):
        return
    for pattern in _patterns(card.get("configs")):
        if "://" in pattern or "::" in pattern or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
            raise QAdapterError(
                f"The card of {path} names files outside the data set's folder ({pattern[:80]!r}). Only patterns "
                "relative to it were expected; correct the card."
            )


def _patterns(value: Any, inside: bool = False) -> Iterator[str]:
    """The texts under `data_files` and `data_dir`, which say which files belong to a config."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _patterns(inner, inside or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner, inside)
    elif inside and isinstance(value, str):
        yield value
