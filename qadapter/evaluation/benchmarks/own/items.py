"""The user's own benchmarks: files of questions, checked whole before anything long runs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import records

if TYPE_CHECKING:
    from datasets import Dataset

CHOICE, SHORT, REGEX = "multiple choice", "short answer", "regular expression"
_FIELDS = {
    "question": ("question", "prompt"),
    "choices": ("choices", "options"),
    "answer": ("answer", "answers"),
    "regex": ("regex", "pattern"),
}
_EXPECTED = "'question' with 'choices' and 'answer', with 'answer' alone, or with 'regex'"
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_AWAY = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # a URL, of which a path has one slash left, or hub:
_LETTERED = re.compile(r"(?:choice|option)?[ _-]?([a-j])", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:choice|option)[ _-]?(\d{1,2})", re.IGNORECASE)


@dataclass(frozen=True)
class OwnBenchmark:
    """A file of questions.

    Attributes:
        kind: `multiple choice`, `short answer` or `regular expression`; of all rows.
        items: {prompt, choices, answer (the right one's place)} of the first kind, else {prompt, target, answers,
            regex}.
    """

    kind: str
    items: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Row:
    """A row before its answer is looked at: the line that it begins in, its kind, its texts."""

    place: str
    kind: str
    question: str
    choices: list[str]
    answer: Any
    regex: str | None


def read_own(file: str | Path, name: str = "") -> OwnBenchmark:
    """The questions of a file.

    Args:
        file: JSON lines, a JSON list, CSV (`,`, `;` or tab between its columns) or Parquet; UTF-8.
        name: of the benchmark, for messages.

    Raises:
        QAdapterError: the file is missing, empty or unreadable, or a row lacks something; the message has the line.
    """
    path = Path(file).expanduser()
    called = f"Own benchmark {name} ({path})" if name else f"Own benchmark {path}"
    if not path.is_file() and _AWAY.match(str(file)):
        raise QAdapterError(f"Own benchmark {name or file}: {file} is not on this machine; download it, give the file.")
    if not path.is_file():
        raise QAdapterError(f"{called}: there is no such file.")
    if path.suffix.lower() not in _ENDINGS:
        raise QAdapterError(
            f"{called}: its name ends in {path.suffix or 'nothing'!r}; expected {', '.join(_ENDINGS)}. Save it as JSON "
            "lines or CSV."
        )
    rows: list[_Row] = []
    faults: list[str] = []
    for place, record in _records(path):
        try:
            rows.append(_row(place, record))
        except ValueError as error:
            faults.append(f"{place} {error}")
    if not rows and not faults:
        raise QAdapterError(f"{called} has no questions. A row has {_EXPECTED}.")
    faults += [
        f"{row.place} is of the kind '{row.kind}' and {rows[0].place} of '{rows[0].kind}': give each kind its own file"
        for row in rows
        if row.kind != rows[0].kind
    ]
    items: list[dict[str, Any]] = []
    if not faults:
        base = _first_number(rows)
        for row in rows:
            try:
                items.append(_item(row, base))
            except ValueError as error:
                faults.append(f"{row.place} {error}")
    if faults:
        more = f" ({len(faults) - 1} more rows have faults)" if len(faults) > 1 else ""
        raise QAdapterError(f"{called}, {faults[0]}{more}. A row has {_EXPECTED}.")
    return OwnBenchmark(rows[0].kind, tuple(items))


def lm_eval_dataset(file: str, **_metadata: Any) -> dict[str, Dataset]:
    """What lm-eval's `custom_dataset: !function` gets: the file's questions as the split `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(read_own(file).items))}


def describe(name: str, benchmark: OwnBenchmark) -> str:
    """`quiz: 30 questions, multiple choice`."""
    count = len(benchmark.items)
    return f"{name}: {count} {'question' if count == 1 else 'questions'}, {benchmark.kind}"


# ---- records ----------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """The place of each row, and the row or why it cannot be read."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        yield from records(path)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield "the file", ValueError(f"is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8")
        return
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max("\t;,", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    begin = 1
    try:
        for cells in reader:
            place, begin = f"line {begin}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
            elif len(cells) > len(names):
                yield (
                    place,
                    ValueError(
                        f"has {len(cells)} cells, and the header has {len(names)}: put a cell that contains "
                        f"{delimiter!r} into quotes"
                    ),
                )
            else:
                yield place, {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        yield f"line {begin}", ValueError(f"is not CSV ({error})")


def _row(place: str, record: Any) -> _Row:
    """Raise ValueError, in words that follow the place, where a row is not of one of the kinds."""
    if isinstance(record, Exception):
        raise ValueError(str(record))
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object")
    lowered = {str(key).strip().lower(): value for key, value in record.items()}
    if len(lowered) < len(record):
        raise ValueError("has two fields whose names differ in their case alone")
    found = {field: _field(lowered, names) for field, names in _FIELDS.items()}
    question, regex = found["question"], found["regex"]
    if question is None:
        raise ValueError("has no 'question'")
    if not isinstance(question, str):
        raise ValueError(f"has a 'question' that is {type(question).__name__}, not a text")
    choices = _choices(found["choices"], lowered)
    if regex is not None and choices:
        raise ValueError("has both choices and 'regex'; keep one")
    if regex is not None:
        return _Row(place, REGEX, question, [], found["answer"], _compiled(regex))
    if found["answer"] is None:
        raise ValueError("has no 'answer'")
    return _Row(place, CHOICE if choices else SHORT, question, choices, found["answer"], None)


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    present = [name for name in names if record.get(name) not in (None, "", [])]
    present = [name for name in present if not isinstance(record[name], str) or record[name].strip()]
    if len(present) > 1:
        raise ValueError(f"has {' and '.join(map(repr, present))}; keep one of them")
    return record[present[0]] if present else None


def _choices(given: Any, record: Mapping[str, Any]) -> list[str]:
    """The choices of a row: a list, a cell of them, or columns of their own."""
    columns = _columns(record, _LETTERED) or _columns(record, _NUMBERED)
    if given is None:
        if len(columns) == 1:
            raise ValueError(f"has one choice, {columns[0]!r}; expected at least two")
        return _distinct([_text(value, "a choice") for value in columns])
    if isinstance(given, str):
        given = _listed(given)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError("has 'choices' that are no list of at least two (in CSV: a JSON list, or texts between '|')")
    return _distinct([_text(value, "a choice") for value in given])


def _columns(record: Mapping[str, Any], pattern: re.Pattern[str]) -> list[Any]:
    named = {match[1]: key for key in record if (match := pattern.fullmatch(key)) and record[key] not in (None, "")}
    return [record[named[mark]] for mark in sorted(named, key=lambda mark: (len(mark), mark))]


def _listed(cell: str) -> list[Any]:
    if cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except ValueError as error:
            raise ValueError(f"has 'choices' that begin like a JSON list and are none ({error})") from None
        return listed if isinstance(listed, list) else []
    return [part.strip() for part in cell.split("|")]


def _distinct(choices: list[str]) -> list[str]:
    if repeated := sorted({choice for choice in choices if choices.count(choice) > 1}):
        raise ValueError(f"has the choice {repeated[0]!r} twice")
    return choices


def _text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"has {what} that is {json.dumps(value, default=str)}, not a text")
    return str(value).strip()


def _compiled(regex: Any) -> str:
    if not isinstance(regex, str):
        raise ValueError(f"has a 'regex' that is {type(regex).__name__}, not a text")
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ValueError(f"has a 'regex' that Python cannot read ({error}): {regex!r}") from None
    if pattern.search(""):
        raise ValueError(f"has a 'regex' that every reply matches: {regex!r}")
    return regex


# ---- items ------------------------------------------------------------------------------------------------------


def _first_number(rows: Sequence[_Row]) -> int | None:
    """Whether answers that are numbers of choices count from 0 or from 1; None where the file does not show it.

    A place of 0, or one as large as the number of choices, says it.
    """
    numbers = [(row, number) for row in rows if (number := _number_of(row)) is not None]
    if any(number == 0 for _, number in numbers):
        return 0
    return 1 if any(number == len(row.choices) for row, number in numbers) else None


def _number_of(row: _Row) -> int | None:
    """The answer as a number of a choice, where it is none of the choices' texts."""
    answer = row.answer
    if row.kind != CHOICE or isinstance(answer, bool) or str(answer).strip() in row.choices:
        return None
    if isinstance(answer, int):
        return answer
    return int(answer) if isinstance(answer, str) and re.fullmatch(r"\s*\d{1,2}\s*", answer) else None


def _item(row: _Row, base: int | None) -> dict[str, Any]:
    if row.kind == CHOICE:
        return {"prompt": row.question, "choices": row.choices, "answer": _place(row, base)}
    given = row.answer if isinstance(row.answer, list) else [] if row.answer is None else [row.answer]
    answers = [_text(value, "an answer") for value in given]
    target = " | ".join(answers) if answers else f"/{row.regex}/"
    return {"prompt": row.question, "target": target, "answers": answers, "regex": row.regex}


def _place(row: _Row, base: int | None) -> int:
    """The place of the right choice: the answer is its text, its letter, or its number."""
    if isinstance(row.answer, list):
        raise ValueError("has several answers; a question with choices has one")
    answer, count = _text(row.answer, "an answer"), len(row.choices)
    if answer in row.choices:
        return row.choices.index(answer)
    number = _number_of(row)
    if number is not None:
        if base is None:
            raise ValueError(
                f"has the answer {number}, and no row of the file shows whether choices are counted from 0 or from 1: "
                "give the choice's text or its letter"
            )
        if base <= number < base + count:
            return number - base
    elif re.fullmatch(r"\(?[A-Za-z][).]?", answer) and (place := ord(answer.strip("().").upper()) - ord("A")) < count:
        return place
    raise ValueError(f"has the answer {answer!r}, which is none of its {count} choices")
