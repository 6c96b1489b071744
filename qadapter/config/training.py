"""Settings of trainings: optimiser, pre-training, the SFT base, and the domains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Name, NonNegative, Positive, Settings


class OptimizerSettings(Settings):
    """How long and how fast one training runs.

    Attributes:
        max_steps: number of optimiser steps; None: `epochs` decides.
        epochs: passes over the data, used where `max_steps` is None.
        batch_size: examples (conversations; for adapters: preference pairs) per optimiser step.
        micro_batch_size: examples per forward pass; gradients are accumulated up to `batch_size`. None: `batch_size`.
        max_length: tokens; a longer prompt is cut from the left.
        allow_truncation: train even if `max_length` cuts the replies of most pairs.
        save_steps: steps between checkpoints, from which a killed training resumes; None: no checkpoints.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        bf16: mixed precision.
    """

    learning_rate: Positive
    max_steps: Count | None = None
    epochs: Positive = 1.0
    batch_size: Count
    micro_batch_size: Count | None = None
    max_length: Annotated[int, Field(ge=2)]
    allow_truncation: bool = False
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: NonNegative = 0.0
    save_steps: Count | None = None
    logging_steps: Count = 10
    gradient_checkpointing: bool = False
    bf16: bool = False

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Examples per forward pass."""
        return self.micro_batch_size or self.batch_size


class PretrainingSettings(OptimizerSettings):
    """Pre-training from scratch.

    Attributes:
        corpus_sources: preference sources whose training pairs become conversations, one per reply. A toy world has
            its own corpus; the learnt part of `built_benchmarks.questions` is added too.
    """

    corpus_sources: tuple[Name, ...] = ()


class HelpfulSettings(OptimizerSettings):
    """The SFT base: the pre-trained model fine-tuned on the chosen replies of one source.

    Attributes:
        source: name under `sources`.
        lora: for a pretrained model, train a LoRA and merge it; without it, all weights are trained.
    """

    source: Name
    lora: bool = False


class DomainSettings(Settings):
    """One domain: the source of its preferences, and the base that is customized.

    Attributes:
        source: name under `sources`.
        base: `pretrained`, or `helpful` for the SFT base.
        epochs: passes over this domain's data, if different from `training.epochs`.
    """

    source: Name
    base: Literal["pretrained", "helpful"] = "pretrained"
    epochs: Positive | None = None
