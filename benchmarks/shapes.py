"""The models and batches that all benchmarks run on: random weights and tokens, the sizes that issue 3 asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import EncodedPair, collate_pairs


@dataclass(frozen=True)
class Shape:
    """A model's size and a sequence's length.

    Attributes:
        vocabulary: V.
        layers: of the body.
        hidden: width of the body; the feed-forward part is four times as wide.
        length: tokens of prompt + reply.
        prompt_share: share of the prompt in it.
    """

    vocabulary: int
    layers: int
    hidden: int
    length: int = 512
    prompt_share: float = 0.6

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return int(self.length * self.prompt_share)


SHAPES = {
    "vocabulary-heavy": Shape(128_256, 2, 256),
    "body-heavy": Shape(32_000, 12, 768),
    "tiny": Shape(1_000, 2, 64, length=64),
}


def base_model(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama of this shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.hidden // 64, 1),
        num_key_value_heads=max(shape.hidden // 64, 1),
        max_position_embeddings=2 * shape.length,
    )
    return AutoModelForCausalLM.from_config(config).to(device=device, dtype=dtype).eval()


def lora() -> LoraConfig:
    """The paper's adapter, without dropout so that all sides compute the same."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def policy(shape: Shape, device: str, dtype: torch.dtype, objective: Objective) -> QAdapterForCausalLM:
    """A policy on `base_model` whose adapter is not the identity."""
    made = QAdapterForCausalLM.from_base(base_model(shape, device, dtype), lora(), objective)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return made


def batch(shape: Shape, pairs: int, device: str) -> dict[str, Tensor]:
    """Pairs of one prompt and two replies each, all of full length."""
    generator = torch.Generator().manual_seed(1)
    reply = shape.length - shape.prompt

    def draw(count: int) -> list[int]:
        return torch.randint(3, shape.vocabulary, (count,), generator=generator).tolist()

    encoded = [EncodedPair(draw(shape.prompt), draw(reply), draw(reply)) for _ in range(pairs)]
    return {name: value.to(device) for name, value in collate_pairs(encoded, 0).items()}
