"""Tiny random models of every architecture the method is tested on, for tests only; the tokenizer is `tiny_chat`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qadapter.policy.model import QAdapterForCausalLM

VOCABULARY = 262  # of `tiny_chat.byte_tokenizer`
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from uniform, so that answers differ from prompt to prompt
}
_GROUPED = {**DECODER, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        **IDS, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, attn_pdrop=0.1, resid_pdrop=0.1
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**DECODER),
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random causal language model of some ten thousand parameters, in eval mode.

    Args:
        architecture: a key of `CONFIGS`.
        seed: of its weights.
        changes: attributes of its config.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def lora(rank: int = 4, dropout: float = 0.0, **changes: object) -> LoraConfig:
    """A LoRA on every linear layer but the head."""
    settings: dict[str, object] = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout}
    settings |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def moved(policy: QAdapterForCausalLM, seed: int = 1, scale: float = 0.3) -> QAdapterForCausalLM:
    """The same policy with random adapter weights: an untrained LoRA changes nothing, and so tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy
