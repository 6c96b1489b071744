"""Reliable checkpoints for killed trainings: sealed when they are complete, and verified before use."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_file, list_files, read_json, write_json

log = logging.getLogger(__name__)

SEAL = "whole.json"
"""Written last into a checkpoint: file name → sha256."""


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint once all its files are flushed to the disk.

    transformers writes a checkpoint file by file without flushing. After a kill a file may be missing; after a power
    cut any of them may be truncated or empty.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: in every process, after the checkpoint of this step was written."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # each process writes its own random state
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))


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


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = read_json(checkpoint / SEAL)
        return bool(digests) and all(digest_file(checkpoint / name) == digest for name, digest in digests.items())
    except (QAdapterError, OSError, AttributeError):
        return False
