"""Which bases are GGUF files."""

from __future__ import annotations

from pathlib import Path

from qadapter.errors import QAdapterError


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that a base is: named itself, or the only one of a folder without a model; else None.

    Raises:
        QAdapterError: the file does not exist, or a folder without a `config.json` holds several.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise QAdapterError(f"There is no file {path}. Give a GGUF file that exists, or a folder that holds one.")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise QAdapterError(f"The folder {path} holds several GGUF files ({names}). Name one of them.")
    return found[0] if found else None
