"""Encode a preference data set given in Python as token ids, setting unusable rows aside."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.containers import RECORDS_TO_DETECT
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason
from qadapter.preferences.rows import iter_rows, plain
from qadapter.preferences.tokenize import (
    EncodedPair,
    Truncation,
    UnrenderablePair,
    UnusablePair,
    encode_pair,
    truncation_of,
)

log = logging.getLogger(__name__)
_NOTEWORTHY = 0.03  # share of pairs that lost tokens, above which it is a warning


class EncodedPairs(Dataset[EncodedPair]):
    """Pairs as token ids.

    Attributes:
        quarantined: (index in the given data, reason) of every pair that was left out.
    """

    def __init__(self, pairs: Sequence[EncodedPair], quarantined: Sequence[tuple[int, str]] = ()) -> None:
        self._pairs = list(pairs)
        self.quarantined = list(quarantined)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        return self._pairs[index]

    def select(self, indices: Iterable[int]) -> EncodedPairs:
        """Some of the pairs, as `datasets.Dataset.select` has it."""
        return EncodedPairs([self._pairs[index] for index in indices])

    @property
    def truncation(self) -> Truncation:
        """What `max_length` removed."""
        return truncation_of(self._pairs)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair: the prompt twice, and both replies."""
        return [2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in self._pairs]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + reply."""
        return max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in self._pairs)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(max(*p.prompt_ids, *p.chosen_ids, *p.rejected_ids) for p in self._pairs)


def encode_dataset(
    rows: Iterable[Mapping[str, Any] | PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str = "train",
    *,
    domain: str | None = None,
    choices: Choices | None = None,
    allow_truncation: bool | None = None,
) -> EncodedPairs:
    """Tokenise every row; unusable rows are counted, logged and skipped.

    Args:
        rows: `PreferencePair`s, or records in any layout that is read from files (docs/data.md), as a list, a
            `datasets.Dataset` or a pandas DataFrame. A row that scores several replies gives several pairs.
        tokenizer: as in `encode_pair`.
        max_length: as in `encode_pair`.
        name: name of the data in messages.
        domain, choices: as in `qadapter.preferences.recognition.recognise`.
        allow_truncation: for training data, whether `max_length` may cut most replies; None for other data, for which
            cuts are only logged.

    Raises:
        QAdapterError: the rows have no known layout, no row is usable, or the data are not fit for training (see
            `refuse_unlearnable`).
    """
    pairs: list[EncodedPair] = []
    quarantined: list[tuple[int, str]] = []
    unrenderable = 0
    for index, candidate in _candidates(iter_rows(rows, name), f"The {name} data", domain, choices):
        if isinstance(candidate, Reason):
            quarantined.append((index, candidate.value))
            continue
        try:
            pairs.append(encode_pair(candidate, tokenizer, max_length))
        except UnusablePair as unusable:
            quarantined.append((index, str(unusable)))
            unrenderable += isinstance(unusable, UnrenderablePair)
    if not pairs:
        first = f"; the first because {quarantined[0][1]}" if quarantined else ""
        raise QAdapterError(
            f"The {name} data have no usable pair ({len(quarantined)} rows, all unusable{first}). Expected rows in a "
            "layout of docs/data.md, such as prompt, chosen and rejected, as messages or as text."
        )
    if quarantined:
        index, reason = quarantined[0]
        log.warning(
            "%d of %d %s pairs are unusable and left out, the first at index %d: %s",
            len(quarantined),
            len(quarantined) + len(pairs),
            name,
            index,
            reason,
        )
    report_truncation(name, truncation_of(pairs), max_length)
    if allow_truncation is not None:
        refuse_unlearnable(name, quarantined, unrenderable, truncation_of(pairs), max_length, allow_truncation)
    return EncodedPairs(pairs, sorted(quarantined))


def report_truncation(name: str, truncation: Truncation, max_length: int, what: str = "pairs") -> None:
    """Warn if `max_length` cut tokens of more than a few per cent of the pairs, or of what else is trained on."""
    if max(truncation.prompts, truncation.replies) > _NOTEWORTHY * truncation.pairs:
        log.warning(
            "max_length %d cuts %d of %d %s %s: %d lose the beginning of their prompt, %d the end of a reply",
            max_length,
            truncation.cut,
            truncation.pairs,
            name,
            what,
            truncation.prompts,
            truncation.replies,
        )


def refuse_unlearnable(
    name: str,
    quarantined: Sequence[tuple[int, str]],
    unrenderable: int,
    truncation: Truncation,
    max_length: int,
    allow_truncation: bool,
    what: str = "pairs",
) -> None:
    """Refuse a training on data that are mostly unusable.

    Args:
        name: what to call the data.
        quarantined: (index, reason) of the skipped pairs.
        unrenderable: how many of them cannot be rendered with this tokenizer and template.
        truncation: the cuts of the other pairs.
        max_length: the length that they were cut to.
        allow_truncation: whether most replies may be cut.
        what: what the data are.

    Raises:
        QAdapterError: more than half of the pairs cannot be rendered, or lost the end of a reply.
    """
    total = truncation.pairs + len(quarantined)
    if 2 * unrenderable > total:
        reasons = Counter(reason for _, reason in quarantined)
        raise QAdapterError(
            f"{unrenderable} of {total} {name} {what} cannot be rendered with this tokenizer and chat template, "
            f"most because {reasons.most_common(1)[0][0]}. Nothing was trained."
        )
    if 2 * truncation.replies > truncation.pairs and not allow_truncation:
        raise QAdapterError(
            f"max_length {max_length} cuts a reply of {truncation.replies} of {truncation.pairs} {name} {what}, so "
            "that a policy would learn answers without an end. Nothing was trained. Raise max_length, or set "
            "allow_truncation to train anyway."
        )


def _candidates(
    rows: Iterator[Any], where: str, domain: str | None, choices: Choices | None
) -> Iterator[tuple[int, PreferencePair | Reason]]:
    """The candidate pairs of rows, from the reader that also reads files."""
    first = list(itertools.islice(rows, RECORDS_TO_DETECT))
    records = [plain(row) for row in first if isinstance(row, Mapping)]
    reader = recognise(records, where=where, domain=domain, choices=choices) if records else None
    for index, row in enumerate(itertools.chain(first, rows)):
        if isinstance(row, PreferencePair):
            yield index, row
            continue
        record = plain(row)
        if reader is None:
            reader = recognise([record], where=where, domain=domain, choices=choices)
        for candidate in reader.read(record, index):
            yield index, candidate
    if reader is not None:
        yield from ((index, candidate) for _, index, candidate in reader.finish())
