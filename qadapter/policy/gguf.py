"""A base in a GGUF file, unpacked once into an ordinary folder: reading its packed form takes minutes each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.progress.reports import counted


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

    with _tensors_reported():
        network = load_network(file, dtype=dtype)
    network.save_pretrained(out / "model")
    load_tokenizer(file).save_pretrained(out / "model")


@contextmanager
def _tensors_reported() -> Iterator[None]:
    """Report each tensor that transformers unpacks in the block; it shows them with a bar of tqdm only."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def bar(tensors: Any, *_: Any, **__: Any) -> Iterator[Any]:
        with counted("unpacking", "tensor", len(tensors)) as work:
            for tensor in tensors:
                yield tensor
                work.advance()

    before = reader.tqdm
    reader.tqdm = bar
    try:
        yield
    finally:
        reader.tqdm = before
