"""Reliable checkpoints for killed trainings: sealed when they are complete, and verified before use."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_file, list_files, read_json, write_json

log = logging.getLogger(__name__)

SEAL = "whole.json"
"""Written last into a checkpoint: file name → sha256."""
_SECONDS = "seconds.json"


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint once all its files are flushed to the disk, and notes in it how long the training took.

    transformers writes a checkpoint file by file without flushing. After a kill a file may be missing; after a power
    cut any of them may be truncated or empty.

    Attributes:
        seconds_before: of the sittings before this one, up to the checkpoint at which it goes on.
    """

    def __init__(self, checkpoint: str | None) -> None:
        """`checkpoint`: at which this training goes on; None if it starts anew."""
        self.seconds_before = _seconds(checkpoint) if checkpoint else 0.0
        self._start = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: in every process, after the checkpoint of this step was written."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # each process writes its own random state
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            write_json(checkpoint / _SECONDS, self.seconds_before + time.perf_counter() - self._start)
            seal(checkpoint)


def seconds_before(trainer: Trainer) -> float:
    """Seconds that a trainer's earlier sittings took, up to the checkpoint at which it went on; 0 if there is none."""
    handlers = trainer.callback_handler.callbacks
    return sum(one.seconds_before for one in handlers if isinstance(one, SealCheckpoints))


def _seconds(checkpoint: str) -> float:
    file = Path(checkpoint, _SECONDS)
    return float(read_json(file)) if file.exists() else 0.0


def seal(checkpoint: Path) -> None:
    """Push a checkpoint's files to the disk and write down what they hold."""
    digests = {}
    for name, file in list_files(checkpoint, exclude={SEAL}).items():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        digests[name] = digest_file(file)
    write_json(checkpoint / SEAL, digests)


def last_checkpoint(scratch: str | Path) -> str | None:
    """The newest whole checkpoint in a folder, or None; those that a kill or a power cut damaged are passed over."""
    found = [folder for folder in Path(scratch).glob("checkpoint-*") if folder.name.split("-")[1].isdecimal()]
    for folder in sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if _is_whole(folder):
            return str(folder)
        log.warning("%s is not whole and is passed over", folder)
    return None


def trained_to_the_end(trainer: Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint is that of the last step; the trainer then has its weights, state and random state.

    A training that was killed after its last step has nothing left to do. transformers would train one more step,
    unless the last step is the last one of an epoch. Models that FSDP or DeepSpeed split up are left to transformers.

    Args:
        trainer: before its training, with the settings with which the checkpoint was written.
        checkpoint: a complete one in the trainer's folder.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(checkpoint)
    trainer._load_rng_state(checkpoint)
    trainer.state = state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return True


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = read_json(checkpoint / SEAL)
        return bool(digests) and all(digest_file(checkpoint / name) == digest for name, digest in digests.items())
    except (QAdapterError, OSError, AttributeError):
        return False
