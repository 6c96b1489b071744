"""From a preference data set in Python to token ids, with what could not be used set aside."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.containers import RECORDS_TO_DETECT
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reading import recognise
from qadapter.preferences.records import Reason
from qadapter.preferences.rows import iter_rows, plain
from qadapter.preferences.tokenize import EncodedPair, UnusablePair, encode_pair

log = logging.getLogger(__name__)


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
) -> EncodedPairs:
    """Tokenise every row; the ones that cannot be used are counted, named and left out.

    Args:
        rows: `PreferencePair`s, or records in any layout that is read from files (docs/data.md), as a list, a
            `datasets.Dataset` or a pandas DataFrame. One that scores several replies gives several pairs.
        tokenizer: as in `encode_pair`.
        max_length: as in `encode_pair`.
        name: what to call the data in messages.
        domain, choices: as in `qadapter.preferences.reading.recognise`.

    Raises:
        QAdapterError: rows of no known layout, or no row can be used.
    """
    pairs: list[EncodedPair] = []
    quarantined: list[tuple[int, str]] = []
    for index, candidate in _candidates(iter_rows(rows, name), f"The {name} data", domain, choices):
        if isinstance(candidate, Reason):
            quarantined.append((index, candidate.value))
            continue
        try:
            pairs.append(encode_pair(candidate, tokenizer, max_length))
        except UnusablePair as unusable:
            quarantined.append((index, str(unusable)))
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
    return EncodedPairs(pairs, sorted(quarantined))


def _candidates(
    rows: Iterator[Any], where: str, domain: str | None, choices: Choices | None
) -> Iterator[tuple[int, PreferencePair | Reason]]:
    """The candidate pairs of rows, by the reader that files are read with."""
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
        yield from reader.finish()
