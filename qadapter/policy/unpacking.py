"""A base in a GGUF file, unpacked once into an ordinary folder: reading its packed form takes minutes each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadapter.policy.base import load_network, load_tokenizer
from qadapter.progress.reports import counted


def unpack(file: Path, dtype: str, out: Path) -> None:
    """Write a GGUF file as `out/model`: weights without their quantisation, as safetensors, with the tokenizer.

    Args:
        file: the GGUF file.
        dtype: of the written weights: `float32`, `bfloat16` or `float16`.
        out: an existing folder.

    Raises:
        QAdapterError: as `qadapter.policy.base.load_network`.
    """
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
