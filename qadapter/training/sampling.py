"""The order of training examples where sequences of similar length share a step (`group_by_length`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices


class ByLength(Sampler[int]):
    """transformers' order by length, of each epoch's own seed: a resumed training sees the same steps.

    transformers' own sampler draws from the global generator, and knows no lengths of pairs.
    """

    def __init__(self, lengths: Sequence[int], per_step: int, seed: int) -> None:
        self._lengths, self._per_step, self._seed, self._epoch = list(lengths), per_step, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._per_step, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """The hook with which a data loader announces an epoch."""
        self._epoch = epoch


def by_length(trainer: Trainer, lengths: Sequence[int]) -> ByLength | None:
    """The sampler for a trainer's arguments; None where they ask for another order.

    Args:
        trainer: its arguments say how many examples a step has.
        lengths: tokens of each example.
    """
    args = trainer.args
    if args.train_sampling_strategy != "group_by_length":
        return None
    per_step = args.train_batch_size * args.gradient_accumulation_steps
    return ByLength(lengths, per_step, args.seed if args.data_seed is None else args.data_seed)


def group_rows(trainer: Trainer) -> None:
    """Let a trainer of TRL's group its rows of token ids by length, if its arguments ask for it."""
    rows: Any = trainer.train_dataset
    if trainer.args.train_sampling_strategy == "group_by_length" and isinstance(rows, Dataset):
        lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in rows]
        trainer._get_train_sampler = lambda *_: by_length(trainer, lengths)  # type: ignore[method-assign]
