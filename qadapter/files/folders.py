"""Folders that a user gives: resolving them, and refusing links that lead out of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qadapter.errors import QAdapterError


def refuse_links_out(folder: Path, files: Iterable[Path], name: str | None = None) -> None:
    """Refuse links that lead out of a folder. Its authors may lack the right to read files that this process can read.

    Args:
        folder: the folder that the user gave; it may itself be a link.
        files: the files to read in it.
        name: the folder as the user wrote it, for the message.

    Raises:
        QAdapterError: a file lies outside the folder; the message names the first one.
    """
    inside = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside):
            raise QAdapterError(
                f"{shown_path(file)} is, or lies behind, a link that leads out of the folder {name or folder}. Put a "
                "copy of the file in its place, or give the link's target instead."
            )


def resolve_path(path: str, data: Path | None) -> str:
    """Replace `{data}` in a path by the data folder.

    Raises:
        QAdapterError: the path contains `{data}`, but no data folder was given.
    """
    if "{data}" not in path:
        return path
    if data is None:
        raise QAdapterError(
            f"the path {path!r} needs a data folder and none was given; give one, for example "
            "`make repro PROFILE=mini DATA=path/to/folder` or the deployment parameter data=path/to/folder"
        )
    return path.replace("{data}", str(data))


def shown_path(file: Path | str) -> str:
    r"""A path as printable text; bytes that are not UTF-8 appear as `\xff`."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")
