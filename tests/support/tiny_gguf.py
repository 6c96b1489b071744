"""A base in a GGUF file of a few kilobytes, for tests only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write_gguf(file: Path, architecture: str = "llama") -> dict[str, Tensor]:
    """A tiny Llama as a GGUF file, in 32 bits, with a byte-level BPE tokenizer; its tensors by transformers' names."""
    from gguf import GGUFWriter, TokenType

    tokens = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th", "in"]
    hidden, inner, heads, layers = 32, 64, 4, 1
    draw = np.random.default_rng(0)
    writer = GGUFWriter(str(file), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    shapes |= {f"blk.0.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    held = {}
    for name, shape in shapes.items():
        value = draw.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", value)
        held[name] = torch.from_numpy(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
