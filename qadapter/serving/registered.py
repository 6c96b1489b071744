"""Whether the files that are about to be served, or trained on from, are still those that were registered.

A module of its own, with nothing but digests: `tasks/tracking/served_policy.py` runs it where this project is not
installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree


class DamagedError(QAdapterError):
    """Registered files have changed or cannot be read."""


def digest_code(folder: Path) -> str:
    """The digest of a package's source: what Python compiles beside it is left out."""
    compiled = {path.relative_to(folder).as_posix() for path in folder.rglob("__pycache__/*")}
    return digest_tree(folder, exclude=compiled)


def refuse_damage(folder: Path, expected: str | None, what: str, digest: Callable[[Path], str] = digest_tree) -> None:
    """Read every byte of a folder: seconds for a large base, once at the start.

    Args:
        folder: the files as they are now.
        expected: their digest at registration; None if it was not recorded.
        what: whose files they are, for the message.
        digest: how `expected` was made.

    Raises:
        DamagedError: they are others now.
    """
    if expected is None:
        return
    found = digest(folder)
    if found != expected:
        raise DamagedError(
            f"The {what} is damaged: the files in {folder} are not those that were registered (sha256 {found[:12]}…, "
            f"not {expected[:12]}…). Restore them from a backup, or roll back to another version (`make rollback`)."
        )
