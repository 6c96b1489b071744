"""Checks of a model before training or generation, measured on a few tokens in a fraction of a second.

- Of a base: two passes agree, and no position sees a later one.
- Of a policy: with the adapter off it is the base, to numerical noise, in train mode too; and an adapter that has not
  been trained changes nothing, so that the first loss of the residual form is ln 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError

_ROWS, _LENGTH = 2, 6
# Largest difference of logits that is rounding, in units of their spread
_NOISE = {"exact": 1e-3, "rounded": 5e-2}


def can_be_probed(model: nn.Module) -> bool:
    """Whether the weights are here: those of sharded training are put in place for its own passes only."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return not sharded and not any(parameter.is_meta for parameter in model.parameters())


def probe_ids(base: PreTrainedModel) -> Tensor:
    """[2, 6] int64 token ids, always the same for a vocabulary."""
    embeddings: Any = base.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    drawn = torch.randint(0, size, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    return drawn.to(embeddings.weight.device)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[2, 6, V] float32 logits, on the processor."""
    with _as_packed(model):
        output: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return output.float().cpu()


@contextmanager
def _as_packed(model: nn.Module) -> Iterator[None]:
    """Within the block bitsandbytes' layers are in train mode: in eval mode they repack themselves, for good."""
    layers = [
        module
        for module in model.modules()
        if type(module).__module__.startswith("bitsandbytes") and not module.training
    ]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def differ(first: Tensor, second: Tensor, model: nn.Module) -> float | None:
    """By how much two rows of logits differ; None where that is rounding.

    Args:
        first, second: of the same shape.
        model: whose they are: half precision and quantised weights round more.
    """
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    rounded = half or getattr(model, "quantization_method", None) is not None
    tolerance = _NOISE["rounded" if rounded else "exact"]
    gap = float((first - second).abs().nan_to_num(0.0).max())
    return gap if gap > tolerance * (1 + float(second.std().nan_to_num(0.0))) else None


def refuse_misbehaviour(base: PreTrainedModel, name: str) -> None:
    """Measure that a base has one answer, and that no position sees a later one.

    Raises:
        QAdapterError: it draws at random in eval mode, is no causal model, or gives no numbers.
    """
    if not can_be_probed(base):
        return
    ids = probe_ids(base)
    try:
        logits = logits_of(base, ids)
    except Exception as error:  # a model may fail in any way, and all of them are about its files
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise QAdapterError(
            f"{name} was loaded, and cannot read a text ({reason}): its config and its weights do not belong together, "
            "or it needs what is not installed."
        ) from error
    if not bool(logits.isfinite().all()):
        raise QAdapterError(
            f"{name} answers with NaN or infinite logits, in {base.dtype}: its weights are damaged, or do not fit into "
            "that precision. Try dtype float32 or bfloat16, or download the model again."
        )
    if (gap := differ(logits_of(base, ids), logits, base)) is not None:
        raise QAdapterError(
            f"{name} gives other logits each time (they differ by {gap:.2g}), so that there is no base to keep to. "
            "Give a model without randomness in eval mode."
        )
    changed = ids.clone()
    changed[:, -1] = ids.flip(0)[:, -1]
    if (gap := differ(logits_of(base, changed)[:, :-1], logits[:, :-1], base)) is not None:
        raise QAdapterError(
            f"{name} is no causal language model: a later token changes what it says earlier (by {gap:.2g}). "
            "Give a model that reads from left to right."
        )


def refuse_other_base(policy: Any, expected: Tensor | None) -> None:
    """Measure that a policy with its adapters off is the base it was put on.

    Args:
        policy: a `QAdapterForCausalLM`.
        expected: `logits_of` the base on `probe_ids`, from before it had the adapter; None: not known.

    Raises:
        QAdapterError: it is not.
    """
    base: PreTrainedModel = policy.peft_model.get_base_model()
    if expected is None or not can_be_probed(policy):
        return
    with policy.disable_adapter():
        found = logits_of(policy, probe_ids(base))
    if (gap := differ(found, expected, base)) is not None:
        raise QAdapterError(
            f"The adapter changes the base itself: switched off, its logits differ by {gap:.2g} from the base's. Use "
            "an adapter that only adds to layers, such as LoRA with bias='none' and init_lora_weights=True."
        )


@torch.no_grad()
def refuse_wrong_start(policy: Any, fresh: bool) -> None:
    """Measure, before the first step, that the base draws nothing at random and a new adapter changes nothing.

    Args:
        policy: a `QAdapterForCausalLM`.
        fresh: whether its adapter is new.

    Raises:
        QAdapterError: either is not so.
    """
    if not can_be_probed(policy):
        return
    base: PreTrainedModel = policy.peft_model.get_base_model()
    ids = probe_ids(base)
    mask = torch.ones_like(ids)
    mode = policy.training
    try:
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):  # dropout in the adapter draws
            policy.train(True)
            q_logits, first = (logits.float().cpu() for logits in policy.q_and_base_logits(ids, mask))
            second = policy.q_and_base_logits(ids, mask)[1].float().cpu()
    finally:
        policy.train(mode)
    if (gap := differ(first, second, base)) is not None:
        raise QAdapterError(
            f"Two passes of the frozen base differ by {gap:.2g} while training, so that log π1 would be a sample. "
            "Set the dropout of the base's config to 0."
        )
    if (gap := differ(q_logits, first, base)) is not None and fresh:
        raise QAdapterError(
            f"The new adapter changes the base's logits by {gap:.2g} before it has learnt anything. Start it from the "
            "base: init_lora_weights=True."
        )
