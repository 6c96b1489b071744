"""Turn optimiser settings into arguments of transformers' Trainer, and write the records of every training."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import psutil
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from qadapter.config.open_settings import for_arguments
from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json, write_json_lines
from qadapter.policy.fingerprint import write_fingerprint
from qadapter.progress.reports import Work, counted, report_row
from qadapter.training.checkpoints import SealCheckpoints, last_checkpoint, seconds_before, trained_to_the_end
from qadapter.training.evaluated import evaluation_row, prepare_evaluation, stopped_early
from qadapter.training.sampling import group_rows

log = logging.getLogger(__name__)
_NOT_OF_THE_CURVE = ("step", "epoch", "num_tokens", "step_time")
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def trainer_arguments(
    settings: OptimizerSettings, *, seed: int, scratch: Path, sequences_per_example: int = 1
) -> dict[str, Any]:
    """Keyword arguments for any `TrainingArguments` subclass.

    Args:
        settings: batch size, steps, learning rate and so on; its open settings take precedence.
        seed: seed of weights, data order and dropout.
        scratch: folder of checkpoints; training resumes from an existing one.
        sequences_per_example: trainer rows per example of `settings`: 2 if a pair's budget is spent on single
            conversations (SFT, replay).

    `batch_size` covers all processes together; each accumulates over its share.

    Raises:
        QAdapterError: the batch cannot be divided evenly between the started processes, or a tracker is not installed.
    """
    settings.check_trackers()
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torch.distributed; absent for a single process
    micro = settings.micro_batch_size or max(1, settings.batch_size // processes)
    if settings.batch_size % (micro * processes):
        raise QAdapterError(
            f"batch_size {settings.batch_size} is not a multiple of micro-batch {micro} × {processes} processes; "
            "change one of the three"
        )
    return {
        "output_dir": str(scratch),
        "seed": seed,
        "data_seed": seed,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_steps": settings.max_steps or -1,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro * sequences_per_example,
        "gradient_accumulation_steps": settings.batch_size // (micro * processes),
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": 2,
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "activation_checkpointing": settings.gradient_checkpointing,
        "bf16": settings.bf16,
        "use_cpu": not torch.cuda.is_available(),
        **for_arguments(settings.trainer),
    }


def for_trl(arguments: dict[str, Any]) -> dict[str, Any]:
    """Adapt arguments to TRL 1.16, which enables checkpointing by default, by a name that transformers deprecates."""
    return {**arguments, "gradient_checkpointing": arguments["activation_checkpointing"]}


class LogAtCheckpoints(TrainerCallback):
    """Logs at each checkpoint and at the last step, besides every `logging_steps`.

    A logged loss is the mean since the last log, which a checkpoint does not hold: without this, the curves of a
    resumed training would differ from those of an undisturbed one. And a training shorter than `logging_steps` has its
    final numbers.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Trainer's hook: after each optimiser step, and after Trainer decided whether to save."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control


class RefuseDivergence(TrainerCallback):
    """Ends a training whose weights are no numbers any more, at its next log, and so before it is kept anywhere.

    The curve does not tell: Trainer logs the mean of earlier losses in place of one that is NaN. And a finished stage
    is not computed again. A training that keeps its best checkpoint ends with that one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._stopped = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Trainer's hook: after each logged step, and before a checkpoint of it is saved.

        Raises:
            QAdapterError: a trained weight is NaN or infinite, and there is no best checkpoint.
        """
        if self._stopped or (weight := _diverged(model)) is None:
            return control
        what = f"{self.name}: the training diverged by step {state.global_step} of {state.max_steps}"
        if args.load_best_model_at_end and state.best_model_checkpoint:
            log.warning("%s; it ends with its best checkpoint, %s", what, Path(state.best_model_checkpoint).name)
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
            self._stopped = True
            return control
        raise QAdapterError(
            f"{what}: {weight} is NaN or infinite. Set a lower learning rate than {args.learning_rate:g}, or more "
            "steps of warm-up."
        )


def _diverged(model: torch.nn.Module | None) -> str | None:
    """The name of a trained weight that is NaN or infinite; None if there is none."""
    for name, weight in model.named_parameters() if model is not None else ():
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.requires_grad and not bool(part.isfinite().all()):
            return name
    return None


class ReportProgress(TrainerCallback):
    """Reports a training's steps and curves (`qadapter.progress.reports`).

    It replaces the callback that prints every logged step. A resumed training first reports the curves that its
    checkpoint contains.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = ExitStack()
        self._work: Work | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: before the first step."""
        if not state.is_world_process_zero:
            return
        self._work = self._open.enter_context(counted(self.name, "step", state.max_steps, state.global_step))
        for row in curves(state):
            report_row(row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Trainer's hook: after each logged step."""
        row = curve_row({**(logs or {}), "step": state.global_step})
        if row and state.is_world_process_zero:
            report_row(row)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: after each optimiser step."""
        if self._work:
            self._work.at(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: after the last step."""
        self._open.close()


def curve_row(entry: Mapping[str, float]) -> dict[str, float] | None:
    """A point of the training's curves: {"step": n, "train/loss": value, ...}.

    Args:
        entry: what Trainer logged, with its step.

    Returns:
        None if the entry is neither of the training nor of an evaluation, such as Trainer's summary at the end.
    """
    if (evaluation := evaluation_row(entry)) is not None:
        return evaluation
    # Sorted, since a resumed training reads its history in another order. TRL restarts its token count on resuming.
    named = ((name, value) for name, value in sorted(entry.items()) if name not in _NOT_OF_THE_CURVE)
    values = {f"train/{name}": value for name, value in named}
    return {"step": entry["step"], **values} if "train/loss" in values else None


def curves(state: TrainerState) -> list[dict[str, float]]:
    """All points of a training's curves so far."""
    return [row for entry in state.log_history if (row := curve_row(entry))]


@dataclass
class Cost:
    """The cost of a piece of work.

    Attributes:
        seconds: wall time.
        peak_memory_mb: largest CUDA allocation in MB; without CUDA, the growth of the process since the start.
    """

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    _start: float = field(default_factory=time.perf_counter, repr=False)


@contextmanager
def measured_cost() -> Iterator[Cost]:
    """Measure the wall time and peak memory of a block; the result is filled in when the block ends."""
    cost = Cost()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield cost
        cost.peak_memory_mb = torch.cuda.max_memory_allocated() / 2**20
    else:
        gc.collect()  # garbage that exists at the start would hide growth when it is freed
        process, done = psutil.Process(), Event()
        before = peak = process.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.1):
                peak = max(peak, process.memory_info().rss)

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield cost
        finally:
            done.set()
            watcher.join()
        cost.peak_memory_mb = (max(peak, process.memory_info().rss) - before) / 2**20
    cost.seconds = time.perf_counter() - cost._start


def train_to_end(trainer: AnyTrainer, name: str) -> AnyTrainer:
    """Train from the newest checkpoint in the trainer's folder, or from the start, and report the progress.

    Args:
        trainer: a trainer of transformers or TRL; its `output_dir` has the checkpoints.
        name: name of the training in reports and log lines.

    Returns:
        The same trainer, after the training.

    Raises:
        QAdapterError: the training diverged, and no best checkpoint is kept.
    """
    if trainer.model is not None and any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        from qadapter.training.reply_log_probs import score_replies_only  # TRL takes seconds to import

        score_replies_only(trainer.model)
    trainer.remove_callback(PrinterCallback)
    name_for_trackers(trainer, f"{name} {Path(str(trainer.args.output_dir)).absolute().name}")
    prepare_evaluation(trainer, name)
    checkpoint = last_checkpoint(str(trainer.args.output_dir))
    trainer.add_callback(ReportProgress(name))
    watch_checkpoints(trainer, name, checkpoint)
    group_rows(trainer)
    if checkpoint and stopped_early(trainer, checkpoint):
        log.info("%s: had stopped early at step %d", name, trainer.state.global_step)
        return trainer
    if checkpoint and trained_to_the_end(trainer, checkpoint):
        log.info("%s: had made all %d steps", name, trainer.state.global_step)
        return trainer
    if checkpoint:
        trainer.args.eval_on_start = False  # the evaluation before the first step is in the checkpoint's log
        log.info("%s: resumes after step %s, where it was stopped", name, checkpoint.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def watch_checkpoints(trainer: Trainer, name: str, checkpoint: str | None) -> None:
    """Let a trainer log at each checkpoint, keep only whole ones, and none of weights that are no numbers.

    Args:
        trainer, name: as in `train_to_end`.
        checkpoint: the one that it resumes from.
    """
    for callback in (LogAtCheckpoints(), RefuseDivergence(name), SealCheckpoints(checkpoint)):
        trainer.add_callback(callback)


def name_for_trackers(trainer: Trainer, label: str) -> None:
    """Name a training for the trackers of `report_to`, so that one that was stopped goes on in its own curves.

    TensorBoard's files go to `TENSORBOARD_LOGGING_DIR`, by default beside the folder of checkpoints, which is deleted
    after the training.

    Args:
        trainer: its `output_dir` has the checkpoints.
        label: the same after a stop, and no other training's.
    """
    checkpoints = Path(str(trainer.args.output_dir)).absolute()
    trainer.args.run_name = label
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(Path(callback.logging_dir or checkpoints.parent / "tensorboard", label))


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Save a trained model without Trainer's pickle of its arguments, which is not used and unsafe to load."""
    trainer.save_model(str(folder))
    model = trainer.accelerator.unwrap_model(trainer.model) if trainer.model is not None else None
    if isinstance(model, PeftModel) and trainer.is_world_process_zero():  # a policy's own `save_pretrained` does it
        write_fingerprint(model.get_base_model(), folder)
    (folder / "training_args.bin").unlink(missing_ok=True)


def tokens_seen(lengths: Sequence[int], steps: int, batch_size: int) -> int:
    """Tokens read in a number of steps; the last step of an epoch takes the remaining examples.

    Args:
        lengths: tokens of each example.
        steps: optimiser steps.
        batch_size: examples of a full step.
    """
    steps_of_an_epoch = math.ceil(len(lengths) / batch_size)
    return round(sum(lengths) / steps_of_an_epoch * steps)


def write_training_record(out: Path, trainer: Trainer, cost: Cost, tokens: int, **extra: float) -> None:
    """Write `history.jsonl` (training curves, one row per logged step) and `metrics.json` (`train/…`, `cost/…`).

    Args:
        out: the stage's folder.
        trainer: the trainer after training.
        cost: cost of the training since it was started or resumed; the time of earlier sittings is added.
        tokens: tokens read by the trained model, without padding.
        extra: further metrics by their full names.
    """
    model = trainer.model
    assert model is not None
    rows = curves(trainer.state)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    seconds = seconds_before(trainer) + cost.seconds
    write_json_lines(out / "history.jsonl", rows)
    write_json(
        out / "metrics.json",
        {
            **({"train/final_loss": losses[-1]} if losses else {}),
            "train/steps": trainer.state.global_step,
            "cost/train_seconds": seconds,
            "cost/train_tokens": tokens,
            "cost/train_tokens_per_second": tokens / max(seconds, 1e-9),
            "cost/train_peak_memory_mb": cost.peak_memory_mb,
            "cost/trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **extra,
        },
    )
