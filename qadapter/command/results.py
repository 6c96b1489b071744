"""Result files of the subcommands: JSON lines that are there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadapter.command.sections import FileOptions
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import storage_errors

Row = Mapping[str, Any]


def require_free(options: FileOptions) -> Path | None:
    """Where the result goes, None for stdout.

    Raises:
        QAdapterError: the file is there already, or is a folder.
    """
    if options.output is None:
        return None
    file = Path(options.output).expanduser()
    if file.is_dir():
        raise QAdapterError(f"--output {file} is a folder; give the name of a file")
    if file.exists() and not options.overwrite:
        raise QAdapterError(f"{file} already exists; give another --output, or --overwrite to replace it")
    return file


@contextmanager
def writing(file: Path | None) -> Iterator[Callable[[Row], None]]:
    """Yield a function that writes a row; the file appears when the block ends without an error.

    Until then the rows are in `<name>.partial`, which stays if the block fails: it may be hours of work.
    """
    if file is None:
        yield lambda _: None
        return
    partial = file.with_name(f"{file.name}.partial")
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:

            def write(row: Row) -> None:
                stream.write(_line(row) + "\n")
                stream.flush()

            yield write
        partial.replace(file)


def _line(row: Row) -> str:
    """A row as JSON that can be written; half a surrogate pair stays an escape."""
    text = json.dumps(row, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(row)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
