"""A base in a GGUF file, unpacked once into an ordinary folder: reading its packed form takes minutes each time."""

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


def unpack(file: Path, dtype: str, out: Path) -> None:
    """Write a GGUF file as `out/model`: weights without their quantisation, as safetensors, with the tokenizer.

    Args:
        file: the GGUF file.
        dtype: of the written weights: `float32`, `bfloat16` or `float16`.
        out: an existing folder.

    Raises:
        QAdapterError: as `qadapter.policy.base.load_network`.
    """
    from qadapter.policy.base import load_network, load_tokenizer

    load_network(file, dtype=dtype).save_pretrained(out / "model")
    load_tokenizer(file).save_pretrained(out / "model")
