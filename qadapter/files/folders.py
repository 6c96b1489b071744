"""Folders that a user names: where they are, and one guard against links that lead out of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qadapter.errors import QAdapterError


def refuse_links_out(folder: Path, files: Iterable[Path], name: str | None = None) -> None:
    """Refuse links that lead out of a folder: its writers need not be allowed to read all that this process may read.

    Args:
        folder: the folder that a user named; it may be a link itself.
        files: what is to be read in it.
        name: the folder as the user wrote it, for the message.

    Raises:
        QAdapterError: naming the first file that lies somewhere else.
    """
    inside = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside):
            raise QAdapterError(
                f"{shown_path(file)} is, or lies behind, a link that leads out of the folder {name or folder}. Put a "
                "copy of the file in its place, or name what it leads to."
            )


def resolve_path(path: str, data: Path | None) -> str:
    """Fill in `{data}`.

    Raises:
        QAdapterError: there is no folder to fill in.
    """
    if "{data}" not in path:
        return path
    if data is None:
        raise QAdapterError(
            f"the path {path!r} needs a data folder and none was given; name one, for example "
            "`make repro PROFILE=mini DATA=path/to/folder` or the deployment parameter data=path/to/folder"
        )
    return path.replace("{data}", str(data))


def shown_path(file: Path | str) -> str:
    r"""A path as text that can be printed and stored: bytes that are not UTF-8 appear as `\xff`."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")
