"""The order of training examples where sequences of similar length share a step (`group_by_length`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

GROUPED = "group_by_length"


class MeasuredRows(torch.utils.data.Dataset[Any]):
    """Rows of any kind with the tokens of each, so that they can be grouped by length, or some of them set aside.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self, rows: Sequence[Any], lengths: Sequence[int]) -> None:
        """Take `rows` and, in the same order, their lengths."""
        if len(rows) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths for {len(rows)} rows")
        self._rows, self.lengths = rows, list(lengths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def select(self, indices: Iterable[int]) -> MeasuredRows:
        """Some of the rows, as `datasets.Dataset.select` has it."""
        chosen = list(indices)
        return MeasuredRows([self._rows[index] for index in chosen], [self.lengths[index] for index in chosen])


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
    if args.train_sampling_strategy != GROUPED:
        return None
    per_step = args.train_batch_size * args.gradient_accumulation_steps
    return ByLength(lengths, per_step, args.seed if args.data_seed is None else args.data_seed)


def in_order(trainer: Trainer, rows: Any) -> SequentialSampler | None:
    """The sampler for evaluation data: their own order, in which transformers' grouping by length has no part.

    Of several processes each gets its share from the data loader, as in transformers.
    """
    return SequentialSampler(rows) if trainer.args.world_size <= 1 else None


def group_rows(trainer: Trainer) -> None:
    """Let a trainer group its rows by length, if its arguments ask for it.

    Args:
        trainer: its rows are a `datasets.Dataset` of token ids, or have `lengths` (`MeasuredRows`).
    """
    if trainer.args.train_sampling_strategy != GROUPED:
        return
    rows: Any = trainer.train_dataset
    if isinstance(rows, Dataset):
        lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in rows]
    else:
        lengths = rows.lengths
    trainer._get_train_sampler = lambda *_: by_length(trainer, lengths)  # type: ignore[method-assign]
    trainer._get_eval_sampler = lambda eval_dataset: in_order(trainer, eval_dataset)  # type: ignore[method-assign]
