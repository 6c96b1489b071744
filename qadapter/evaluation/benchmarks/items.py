"""Benchmark files: JSON lines, JSON or Parquet, checked before a model sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import QAdapterError

if TYPE_CHECKING:
    from datasets import Dataset


def read_items(file: str | Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The items of a benchmark file, each with at least the named fields.

    Args:
        file: JSON lines (UTF-8, blank lines are skipped), a JSON list (or an object that holds one as `examples`,
            as BIG-Bench Hard does), or Parquet.
        fields: keys every item needs, with a value that is neither null nor an empty string.

    Raises:
        QAdapterError: the file is missing, empty or unreadable, or an item lacks a field. Every faulty item is counted
            and the first is named: a score over the remaining items would not be the benchmark's.
    """
    path = Path(file)
    if not path.is_file():
        raise QAdapterError(
            f"Benchmark file {path} does not exist. Give the folder that contains it as the evaluation's data folder, "
            f"or leave this task out."
        )
    items: list[dict[str, Any]] = []
    faults: list[str] = []
    for place, item in records(path):
        if isinstance(item, Exception):
            faults.append(f"{place} {item}")
        elif not isinstance(item, dict):
            faults.append(f"{place} holds {type(item).__name__}, not an object")
        elif absent := [field for field in fields if item.get(field) in (None, "")]:
            faults.append(f"{place} has no {', '.join(repr(field) for field in absent)}")
        else:
            items.append(item)
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise QAdapterError(
            f"Benchmark file {path}: {faults[0]}{more}. Every item must be an object with "
            f"{', '.join(repr(field) for field in fields)}. Correct the file or leave this task out."
        )
    if not items:
        raise QAdapterError(f"Benchmark file {path} has no items. Fill it or leave this task out.")
    return items


def lm_eval_dataset(file: str, fields: Sequence[str], **_metadata: Any) -> dict[str, Dataset]:
    """What a task's `custom_dataset: !function` gets: the file's items as the split `test`.

    lm-eval's own `dataset_path: json` copies the file into the Hugging Face cache first and answers a missing field
    with a template error. lm-eval passes the task's `metadata` along with `dataset_kwargs`; it is not needed here.
    """
    from datasets import Dataset

    keep = list(fields)
    return {"test": Dataset.from_list([{key: item[key] for key in keep} for item in read_items(file, fields)])}


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """The place of each item of a JSON lines, JSON or Parquet file, and the item, or why it cannot be read."""
    if path.suffix not in (".json", ".parquet"):
        with path.open("rb") as lines:  # cut at b"\n" only: a text may hold U+2028
            yield from ((f"line {i}", _parsed(line)) for i, line in enumerate(lines, start=1) if line.strip())
        return
    whole = _parquet_rows(path) if path.suffix == ".parquet" else _parsed(path.read_bytes())
    items = whole.get("examples") if isinstance(whole, dict) else whole
    if isinstance(items, list):
        place = "row" if path.suffix == ".parquet" else "item"
        yield from ((f"{place} {i}", item) for i, item in enumerate(items, start=1))
    else:
        yield "the file", items


def _parsed(data: bytes) -> Any:
    """A JSON value, or a `ValueError`; a leading byte-order mark is ignored."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 ({error.reason} at byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON ({error})")


def _parquet_rows(path: Path) -> Any:
    """The rows of a Parquet file, or a `ValueError`."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        return ValueError(f"is not Parquet ({str(error).partition(chr(10))[0]})")
