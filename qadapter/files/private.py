"""All files that the project writes are private to the user: folders have mode 0700, files mode 0600.

Prompts, replies and models are private data, and a database stored beside the key of its secrets does not protect them.
The process's umask sets the mode of new files, including those of libraries; wider modes of old files are repaired.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qadapter.errors import QAdapterError

_OTHERS = 0o077


def keep_private() -> None:
    """From now on, create files in this process and its children without any rights for other users."""
    os.umask(os.umask(_OTHERS) | _OTHERS)


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can enter; an existing folder with a wider mode is narrowed.

    Missing parent folders get the process's default mode.

    Raises:
        QAdapterError: the mode of an older folder cannot be changed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    close_to_others(folder)
    return folder


def close_to_others(place: Path, *, thorough: bool = False) -> int:
    """Remove other users' rights from a file, or from a folder and its content; links in it are not followed.

    The content of a folder that is already closed cannot be reached by others, and is not inspected.

    Args:
        place: a file or folder; a missing one is ignored. If it is a link, it is followed.
        thorough: inspect the content of a closed folder as well.

    Returns:
        The number of changed modes.

    Raises:
        QAdapterError: a mode cannot be changed, because another user owns the file.
    """
    changed = 0
    place = place.resolve()
    if not place.exists() or not (thorough or place.stat().st_mode & _OTHERS):
        return 0
    for path in _below(place):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # missing, or removed by another process in the meantime
            continue
        if stat.S_ISLNK(mode) or not mode & _OTHERS:
            continue
        try:
            path.chmod(stat.S_IMODE(mode) & ~_OTHERS)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise QAdapterError(
                f"{path} is open to other users (mode {stat.S_IMODE(mode):04o}), and its mode cannot be changed "
                f"({error.strerror}). Ask its owner to run `chmod -R go-rwx {place}`, or remove it."
            ) from error
        changed += 1
    return changed


def _below(place: Path) -> Iterator[Path]:
    yield place
    for parent, folders, files in os.walk(place):
        for name in (*folders, *files):
            yield Path(parent, name)
