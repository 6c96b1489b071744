"""What an experiment would cost, estimated before anything runs: tokens, steps, memory, hours, and assumptions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.config.evaluation import BuiltBenchmarks, RetentionSettings
from qadapter.config.model import FromScratch, LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError

CHARS_PER_TOKEN = 4.0  # English text and a vocabulary of 32,000 or more; a small vocabulary has fewer
TURN_TOKENS = 3.6
"""What a template adds to each turn and to the reply: 12.4 tokens where HH-RLHF's harmless rows have 2.4 turns."""
_LLAMA_VOCABULARY = 128_256
BYTES_PER_PARAMETER = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.55}


@dataclass(frozen=True)
class Machine:
    """A machine by the rate it reaches in practice.

    Attributes:
        name: what the plan calls it.
        flops: floating-point operations per second that training reaches, not the datasheet's.
    """

    name: str
    flops: float


# 4,000 tokens/s at 2 M parameters, 6 operations per parameter and token (measured on two cores, one process).
TWO_CORES = Machine("2 CPU cores", 6 * 2e6 * 4_000)
# 790 TFLOP/s of bf16 matrix products, of which training reaches about four tenths.
ONE_H200 = Machine("1 H100/H200", 0.4 * 790e12)


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model and what its activations are made of.

    Attributes:
        parameters: all of them.
        hidden_size, layers, vocab_size: of the config.
        assumption: where the numbers are from.
        unquantized: of the parameters, those that stay in the model's own precision: embeddings and head.
    """

    parameters: float
    hidden_size: int
    layers: int
    vocab_size: int
    assumption: str
    unquantized: float = 0.0


def model_size(model: ModelSettings) -> ModelSize:
    """The size of an experiment's base model: computed, read from its config, or taken from its name.

    Raises:
        QAdapterError: a pretrained model whose config cannot be reached and whose name says no size.
    """
    if model.from_scratch:
        return _size_from_scratch(model.from_scratch)
    name = str(model.pretrained)
    try:
        from qadapter.policy.base import load_config

        config = load_config(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return _size_of(config, f"from the config of {name}", trust_remote_code=model.trust_remote_code)
    except (QAdapterError, ValueError):  # out of reach, or of a model that transformers does not build from it
        return _size_from_name(name)


def _size_of(config: Any, assumption: str, **options: bool) -> ModelSize:
    """The size of the model that transformers builds from a config, built without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(config, **options)
    network.tie_weights()
    ends = {id(m.weight): m.weight for m in (network.get_input_embeddings(), network.get_output_embeddings()) if m}
    text = config.get_text_config()
    return ModelSize(
        network.num_parameters(),
        text.hidden_size,
        text.num_hidden_layers,
        text.vocab_size,
        assumption,
        unquantized=sum(weight.numel() for weight in ends.values()),
    )


def _size_from_scratch(size: FromScratch) -> ModelSize:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        tie_word_embeddings=True,
    )
    return _size_of(config, "computed from model.from_scratch")


def _size_from_name(name: str) -> ModelSize:
    found = re.search(r"(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])", name)
    if not found:
        raise QAdapterError(
            f"the config of {name!r} cannot be reached and its name says no size (like 8B), so nothing can be "
            "estimated; check the name, the network and HF_TOKEN"
        )
    parameters = float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6)
    # Llama's proportions: parameters ≈ 12 · layers · hidden², layers ≈ hidden / 128
    hidden = round((parameters * 128 / 12) ** (1 / 3))
    return ModelSize(
        parameters,
        hidden,
        max(1, hidden // 128),
        _LLAMA_VOCABULARY,
        f"guessed from the name {name!r}: its config is out of reach",
        unquantized=min(parameters / 2, 2.0 * _LLAMA_VOCABULARY * hidden),
    )


def adapter_parameters(size: ModelSize, lora: LoraSettings) -> float:
    """Trainable parameters of a LoRA on all linear layers: about 2 · rank · (in + out) summed over seven matrices."""
    return size.layers * lora.rank * size.hidden_size * (4 * 2 + 3 * 3.5)


def steps(pairs: int, settings: OptimizerSettings) -> int:
    """Optimiser steps of a training on so many examples."""
    return settings.max_steps or math.ceil(pairs / settings.batch_size * settings.epochs)


def training_flops(size: ModelSize, tokens: float, passes: float, scored: float | None = None) -> float:
    """2 operations per parameter and token for each forward pass's worth.

    Args:
        size: of the model.
        tokens: that the stage reads.
        passes: forward 1, backward through activations 1, through weights 1.
        scored: of the tokens, those that are scored: the head is applied to them only, and no parameter of the
            embeddings to any. None: all parameters work on all tokens.
    """
    if scored is None:
        return 2 * size.parameters * tokens * passes
    return 2 * passes * ((size.parameters - size.unquantized) * tokens + size.vocab_size * size.hidden_size * scored)


def training_memory_gb(size: ModelSize, model: ModelSettings, lora: LoraSettings, settings: OptimizerSettings) -> float:
    """Peak of a training: frozen weights, adapter with gradient and two moments, activations, scored logits."""
    weights = weights_gb(size, model) * 2**30
    adapter = adapter_parameters(size, lora) * 4 * 4
    tokens = 2 * settings.micro_batch * settings.max_length
    per_token = size.hidden_size * size.layers * (2 if settings.gradient_checkpointing else 34)
    width = 2 if settings.bf16 else 4
    logits = tokens * size.vocab_size * width * 2
    return (weights + adapter + tokens * per_token * width + logits) / 2**30


@dataclass(frozen=True)
class TaskReads:
    """What a benchmark reads of each item.

    Attributes:
        items: of all its tasks together.
        tasks: how many tasks it consists of; a limit is each one's.
        tokens: of one item, all choices together; None: the training's longest sequence.
        scored: of them, those of the choices; None: all.
    """

    items: int
    tasks: int = 1
    tokens: float | None = None
    scored: float | None = None


# Benchmarks as lm-eval 0.4 asks them (leaderboard_bbh: 24 of BIG-Bench Hard's tasks)
_READS = {
    "mmlu": TaskReads(14_042, 57),
    "gsm8k_cot": TaskReads(1_319),
    "leaderboard_mmlu_pro": TaskReads(12_032),
    "leaderboard_bbh": TaskReads(5_761, 24),
    "leaderboard_ifeval": TaskReads(541),
    "hellaswag": TaskReads(10_042, 1, 4 * 60, 4 * 20),
    "blimp": TaskReads(67_000, 67, 2 * 12, 2 * 11),
}
ITEMS_OF_OTHER_TASKS = 2_000


def benchmark_items(tasks: Sequence[str], limit: int | None, own: Sequence[int] = ()) -> int:
    """Questions of lm-eval tasks together, and of the user's `own` files; `limit` is the most that one task asks."""
    counts = [*(_READS[task].items if task in _READS else ITEMS_OF_OTHER_TASKS for task in tasks), *own]
    return sum(min(count, limit or count) for count in counts)


def benchmark_reads(task: str, built: BuiltBenchmarks | None) -> TaskReads:
    """What one of lm-eval's tasks reads, or one that is built from the data; a guess for others."""
    if task in _READS:
        return _READS[task]
    if built is not None:
        # texts of half the longest length on average, and a prompt as long as its reply
        text = built.max_chars / 2 / CHARS_PER_TOKEN
        for ending, tokens, scored in (
            ("_reply_matching", 8 * text, 4 * text),
            ("_word_order", 4 * text, 4 * text),
            ("_bits_per_byte", text, text),
        ):
            if task.endswith(ending):
                return TaskReads(built.max_items, 1, tokens, scored)
    return TaskReads(ITEMS_OF_OTHER_TASKS)


def retention_tokens(
    settings: RetentionSettings, built: BuiltBenchmarks | None, longest: int, own: Mapping[str, int]
) -> tuple[float, float]:
    """Tokens that the retention tasks read, also in other words, and those of them that are scored.

    Args:
        settings: the tasks and their limits.
        built: the benchmarks that the experiment makes.
        longest: tokens of an item of a task that is not known.
        own: the user's own benchmarks and the items of each.
    """
    tokens = scored = 0.0
    for task in (*settings.tasks, *own):
        reads = TaskReads(own[task]) if task in own else benchmark_reads(task, built)
        each = longest if reads.tokens is None else reads.tokens
        of_each = each if reads.scored is None else reads.scored
        limit = settings.items_of(task)
        items = min(reads.items, limit * reads.tasks) if limit else reads.items
        if reads.tokens is None or of_each <= each / 2:  # there is a question that can be asked in other words
            items += min(items, settings.reworded * reads.tasks)
        tokens += items * each
        scored += items * of_each
    return tokens, scored


def weights_gb(size: ModelSize, model: ModelSettings) -> float:
    """Memory of the frozen weights; a quantised model keeps embeddings and head in its own precision."""
    whole = BYTES_PER_PARAMETER[model.dtype]
    if model.quantization == "none":
        return size.parameters * whole / 2**30
    packed = (size.parameters - size.unquantized) * BYTES_PER_PARAMETER[model.quantization]
    return (packed + size.unquantized * whole) / 2**30
