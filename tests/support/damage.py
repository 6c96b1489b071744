"""What a power cut or a failing disk makes of a file, for as long as a test looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cut(file: Path) -> None:
    """Half of it was written."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    """The right size, and nothing in it."""
    file.write_bytes(bytes(file.stat().st_size))


@contextmanager
def damaged(file: Path, harm: Callable[[Path], None]) -> Iterator[None]:
    """Harm a file; it is whole again when the block is left."""
    whole = file.read_bytes()
    harm(file)
    try:
        yield
    finally:
        file.write_bytes(whole)


@contextmanager
def hidden(folders: list[Path], aside: Path) -> Iterator[None]:
    """Take folders away; they are back when the block is left."""
    aside.mkdir()
    assert folders
    for number, folder in enumerate(folders):
        folder.rename(aside / str(number))
    try:
        yield
    finally:
        for number, folder in enumerate(folders):
            (aside / str(number)).rename(folder)
