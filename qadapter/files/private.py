"""What the project writes is its user's alone: folders of mode 0700, files of mode 0600.

Prompts, replies and models are private data, and a database next to the key of its secrets is no protection of them.
New files get their mode from the process' umask, those of libraries too; older, wider ones are repaired.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qadapter.errors import QAdapterError

_OTHERS = 0o077


def keep_private() -> None:
    """Let no file that this process and its children create from now on be readable or writable by other users."""
    os.umask(os.umask(_OTHERS) | _OTHERS)


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can enter; one that is there and wider is narrowed.

    Folders above it that are missing get the process' usual mode.

    Raises:
        QAdapterError: the mode of an older folder cannot be changed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    close_to_others(folder)
    return folder


def close_to_others(place: Path, *, thorough: bool = False) -> int:
    """Take other users' rights off a file, or off a folder and all that lies in it; links in it are not followed.

    What lies in a folder that was closed already cannot be reached by others, and is not looked at.

    Args:
        place: nothing happens if it does not exist. A link in this place is followed.
        thorough: look at the content of a closed folder too.

    Returns:
        How many modes were changed.

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
        except FileNotFoundError:  # another process removed it meanwhile, or it was never there
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
                f"({error.strerror}). Let its owner run `chmod -R go-rwx {place}`, or remove it."
            ) from error
        changed += 1
    return changed


def _below(place: Path) -> Iterator[Path]:
    yield place
    for parent, folders, files in os.walk(place):
        for name in (*folders, *files):
            yield Path(parent, name)
