"""What reads the records of a source in the layout that was chosen for it (`recognition.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qadapter.preferences.building import Context, texts_of
from qadapter.preferences.cells import opened
from qadapter.preferences.formats import Format
from qadapter.preferences.mapping import FieldMapping
from qadapter.preferences.pair import LabelledReply, PreferencePair
from qadapter.preferences.pairing import Pairing
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import Candidates, UnusableRecord
from qadapter.preferences.unread_fields import NOT_TEXT, suspects, unexplained


@dataclass(frozen=True, slots=True)
class Accepted:
    """A candidate pair that can be used, and where it came from (see `RawRecord.line`)."""

    file: Path
    line: int
    pair: PreferencePair


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate pair that cannot be used, where it came from and why."""

    file: Path
    line: int
    reason: Reason


ParsedRecord = Accepted | Rejected


class Left(NamedTuple):
    """A candidate that was known only at the end; see `Reader.finish`."""

    shard: int
    line: int
    candidate: PreferencePair | Reason


class Reader:
    """Reads the records of one source in the layout that was chosen for it.

    Attributes:
        name: of the layout: a format's, `transcript:<style>`, or `mapping`.
        across_records: whether what a record gives depends on the records before it (unpaired rows).
        counts: what is counted beside the candidates.
    """

    def __init__(
        self,
        name: str,
        context: Context,
        parse: Any,
        file_format: Format | None,
        cells: Sequence[str] = (),
        structs: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._context = context
        self._parse = parse
        self._format = file_format
        self._cells, self._structs = tuple(cells), tuple(structs)
        self._pairing, self._finishes = parse if isinstance(parse, Pairing) else None, True
        self._suspects: dict[tuple[Any, ...], tuple[str, ...]] = {}
        choices = context.choices
        self._ties = parse.ties if isinstance(parse, FieldMapping) and parse.ties else choices.ties

    @property
    def across_records(self) -> bool:
        """See the class."""
        return self._pairing is not None

    @property
    def labels(self) -> Counter[str]:
        """How often each label was given, or each side preferred."""
        return self._context.labels

    @property
    def reading(self) -> str:
        """How a record is read, as far as it was decided from the first records: readers with one text read alike."""
        context = self._context
        marks = [  # a name does not tell a style: several have one, and vicuna's begins as the data do
            style and (style.name, style.starts.pattern, style.answers.pattern, style.open_end.pattern)
            for style in (context.prompt_style, context.reply_style)
        ]
        return repr([self.name, *marks, context.repeats_prompt, self._cells, self._structs])

    def give_single(self, take: Callable[[LabelledReply], None] | None) -> None:
        """Hand each unpaired row to a function as well."""
        self._context.single = take

    @property
    def counts(self) -> Mapping[str, int]:
        """See the class."""
        return self._context.counts

    def share(self, other: Reader) -> None:
        """Pair rows with those that another reader has read too (`across_records`); it gives what is left."""
        self._pairing, self._finishes = other._pairing, False

    def read(self, record: Any, line: int = 0, shard: int = 0) -> Candidates:
        """All candidate pairs of one decoded record, each a pair or the reason why it is none.

        Args:
            record: as the file or data set has it.
            line: its number, by which `finish` names it.
            shard: number of its file, likewise.

        Returns:
            At least one candidate; only a row that waits for a partner (`across_records`) gives none.
        """
        if not isinstance(record, dict):
            return [Reason.NOT_AN_OBJECT]
        try:
            if self._cells or self._structs:
                record = opened(record, self._cells, self._structs)
            if self._format is not None:
                self._check_fields(record, self._format)
            if self._pairing is not None:
                return self._kept(self._pairing.read(record, self._context, (shard, line)))
            candidates = self._parse(record, self._context)
            if self._format is not None and self._format.group == "judgement":
                candidates = _agreeing(record, self._format, candidates)
        except UnusableRecord as unusable:
            return [unusable.reason]
        except RecursionError:
            return [Reason.WRONG_FIELDS]
        return self._kept(candidates)

    def finish(self) -> Iterator[Left]:
        """After the last record: the candidates of unpaired rows that had to wait, and the rows that stayed alone."""
        if self._pairing is None or not self._finishes:
            return
        for (shard, line), candidate in self._pairing.finish():
            (kept,) = self._kept([candidate])
            yield Left(shard, line, kept)

    def _kept(self, candidates: Candidates) -> Candidates:
        for place, pair in enumerate(candidates):
            if isinstance(pair, Reason) or pair.margin is None:
                continue
            if pair.margin <= 0:
                name = "equal scores" if pair.margin == 0 else "scores against the decision"
                self._context.counts[name] = self._context.counts.get(name, 0) + 1
                if self._ties == "drop":
                    candidates[place] = Reason.NO_PREFERENCE
                    continue
            least = self._context.choices.min_margin
            if least is not None and pair.margin < least:
                candidates[place] = Reason.WEAK_PREFERENCE
        return candidates

    def _check_fields(self, record: Mapping[str, Any], file_format: Format) -> None:
        keys = tuple(record)
        names = self._suspects.get(keys)
        if names is None:
            if len(self._suspects) > 1000:
                self._suspects.clear()
            names = self._suspects[keys] = tuple(suspects(keys, file_format))
        if names and (problem := unexplained(record, file_format, names)):
            raise UnusableRecord(Reason.NOT_TEXT if problem in NOT_TEXT else Reason.WRONG_FIELDS)


def _agreeing(record: Mapping[str, Any], file_format: Format, candidates: Candidates) -> Candidates:
    """A judgement and a decision beside it must agree: else the record says two things."""
    chosen = record.get("chosen")
    if "chosen" in file_format.reads or chosen is None or record.get("rejected") is None:
        return candidates
    said = texts_of(chosen)
    return [
        candidate
        if isinstance(candidate, Reason) or (said and " ".join(candidate.chosen.split()) == said[-1])
        else Reason.NO_PREFERENCE
        for candidate in candidates
    ]
