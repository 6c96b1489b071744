"""Which files other users of the machine have any right to."""

from __future__ import annotations

import stat
from pathlib import Path


def others_modes(*places: Path) -> dict[str, str]:
    """Files and folders that other users can read, write or enter, with their modes."""
    found = {}
    for path in [path for place in places for path in (place, *place.rglob("*"))]:
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o077:
            found[str(path)] = f"{stat.S_IMODE(mode):04o}"
    return found
