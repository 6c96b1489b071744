"""Settings of trainings: optimiser, pre-training, the SFT base, and the domains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qadapter.config.base import Count, Epochs, Name, NonNegative, Positive, Settings
from qadapter.config.open_settings import TRAINER_TWINS, trainer_fields, with_twins
from qadapter.config.trackers import Tracker, check_trackers

TrainerFields = Annotated[dict[str, Any], AfterValidator(trainer_fields)]


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
        report_to: further trackers that get the curves while the training runs, besides MLflow: `tensorboard`, `wandb`,
            `trackio`, each with its own environment variables.
        trainer: further fields of transformers' `TrainingArguments`, under their own names.
    """

    learning_rate: Positive
    max_steps: Count | None = None
    epochs: Epochs = 1.0
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
    report_to: tuple[Tracker, ...] = ()
    trainer: TrainerFields = Field({}, exclude_if=lambda fields: not fields)  # no part of a key unless given

    @model_validator(mode="before")
    @classmethod
    def _twins(cls, data: Any) -> Any:
        return with_twins(data, TRAINER_TWINS, within="trainer")

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if self.trainer.get(name) and not self.gradient_checkpointing:
                raise ValueError(f"trainer.{name} has no effect without gradient_checkpointing")
        if "lr_scheduler_type" in self.trainer and self.schedule != "linear":
            raise ValueError("trainer.lr_scheduler_type and schedule are the same setting; give one of them")
        return self

    def check_trackers(self) -> None:
        """Raise QAdapterError if a tracker of `report_to` is not installed or cannot be imported."""
        check_trackers(self.report_to)

    @property
    def micro_batch(self) -> int:
        """Examples per forward pass."""
        return self.micro_batch_size or self.batch_size

    def asked(self) -> dict[str, str]:
        """What methods may not be able to follow: name → key in this section."""
        found = {name: f"trainer.{name}" for name in self.trainer}
        if self.trainer.get("train_sampling_strategy") == "group_by_length":
            found["group_by_length"] = "trainer.train_sampling_strategy"
        if not self.trainer.get("group_by_length", True):
            del found["group_by_length"]
        return found


def _is_none(value: object) -> bool:
    return value is None


class AdapterTraining(OptimizerSettings):
    """How adapters are trained, and what is evaluated while they are.

    Attributes:
        eval_steps: steps between evaluations of the training's own metrics; None: none while training.
        eval_pairs: training pairs set aside for it, whole prompts; the experiment's held-out pairs are not used. None:
            `DEFAULT_EVAL_PAIRS`.
        best_by: metric of that evaluation, such as `loss` or `rewards/accuracies`: the adapter is the checkpoint that
            was best by it. Each evaluation then saves a checkpoint. Losses, KL and perplexity are better when smaller.
        early_stopping: stop after so many evaluations in a row without a better `best_by` (by default `loss`).
    """

    eval_steps: Count | None = Field(None, exclude_if=_is_none)  # no part of a stage's key unless given
    eval_pairs: Count | None = Field(None, exclude_if=_is_none)
    best_by: Annotated[str, Field(min_length=1)] | None = Field(None, exclude_if=_is_none)
    early_stopping: Count | None = Field(None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _check_evaluation(self) -> AdapterTraining:
        given = [name for name in ("eval_pairs", "best_by", "early_stopping") if getattr(self, name) is not None]
        if self.eval_steps is None and given:
            raise ValueError(f"{given[0]} has no effect without eval_steps; set the steps between evaluations")
        if self.chosen_by and self.save_steps and self.save_steps != self.eval_steps:
            raise ValueError(
                f"save_steps {self.save_steps} and eval_steps {self.eval_steps}: to find the best checkpoint each "
                "evaluation saves one; leave save_steps out"
            )
        return self

    def asked(self) -> dict[str, str]:
        """As of every training, and the evaluation while it runs."""
        return super().asked() | ({} if self.eval_steps is None else {"eval_steps": "eval_steps"})

    @property
    def chosen_by(self) -> str | None:
        """The metric that decides which checkpoint becomes the adapter; None for the last one."""
        return self.best_by or ("loss" if self.early_stopping else None)


DEFAULT_EVAL_PAIRS = 32


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
    epochs: Epochs | None = None
