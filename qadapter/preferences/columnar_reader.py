"""Parquet and Arrow files as JSON lines, read in a process of its own.

`containers.py` starts this file as a program: `python columnar_reader.py KIND FILE LIMITS`. It imports nothing of this
project. A file that is built to crash pyarrow or to fill the memory ends this process and not the one that prepares the
data. Nothing is memory-mapped: a file that is cut while it is read gives an error, never SIGBUS. Arrow data are
validated in full (offsets, lengths, UTF-8) before a value is taken from them.

Each line of standard output is one of

    {"prompt": "…", …}   a row
    #0.25                the share of the file that was read so far
    !long                a row that is larger than a record may be; it counts
    !budget              rows or bytes beyond the budget; the last line
    !columns             two columns have the same name; the last line
    !end                 every row was written; the last line

Output without one of the last lines means that the file is damaged.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

ROWS_AT_ONCE = 64
"""Few, because each row of a hostile file can be as large as a record may be."""


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Attributes:
        address_space: bytes of virtual memory.
        cpu_seconds: processor time.
        rows: rows that are written at most.
        output_bytes: bytes that are written at most.
        record_bytes: size of one row as JSON.
    """

    address_space: int
    cpu_seconds: int
    rows: int
    output_bytes: int
    record_bytes: int

    def text(self) -> str:
        """The limits as the program's third argument."""
        return json.dumps(asdict(self))


class _StopError(Exception):
    """Ends the reading; the message is the last line of the output."""


def _batches(kind: str, file: str) -> Iterator[tuple[Any, float]]:
    """Record batches of at most `ROWS_AT_ONCE` rows, each with the share of the file that was read."""
    import pyarrow as pa

    pa.set_cpu_count(1)
    size = max(1, os.path.getsize(file))  # noqa: PTH202 - pathlib is not imported here
    with pa.OSFile(file) as source:
        if kind == "parquet":
            import pyarrow.parquet

            parquet = pa.parquet.ParquetFile(source, pre_buffer=False, buffer_size=2**20)
            _refuse_equal_names(parquet.schema_arrow)
            rows, done = max(1, parquet.metadata.num_rows), 0
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                done += batch.num_rows
                yield batch, done / rows
            return
        # The stream's reader reads the file format too, behind its magic and padding, without trusting its index.
        opened = pa.ipc.open_file(source) if kind == "arrow-file" else pa.ipc.open_stream(source)
        _refuse_equal_names(opened.schema)
        count = opened.num_record_batches if kind == "arrow-file" else None
        whole = (opened.get_batch(i) for i in range(count)) if count is not None else iter(opened)
        for number, batch in enumerate(whole, start=1):
            batch.validate(full=True)
            share = number / count if count else source.tell() / size
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE), share


def _refuse_equal_names(schema: Any) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise _StopError("!columns")


def _plain(value: Any) -> Any:
    """What JSON has no type for: dates as ISO 8601, bytes as text (halves of surrogate pairs where not UTF-8)."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def main(kind: str, file: str, limits: Limits) -> None:
    """Write the file's rows to standard output."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limits.address_space,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, written, rows, reported = sys.stdout.buffer, 0, 0, 0.0
    try:
        for batch, share in _batches(kind, file):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                rows += 1
                line = json.dumps(row, default=_plain).encode()
                written += len(line)
                if rows > limits.rows or written > limits.output_bytes:
                    raise _StopError("!budget")
                out.write((b"!long" if len(line) > limits.record_bytes else line) + b"\n")
            if share >= reported + 0.001:
                reported = share
                out.write(f"#{share:.4f}\n".encode())
        raise _StopError("!end")
    except _StopError as end:
        out.write(f"{end}\n".encode())
    out.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Limits(**json.loads(sys.argv[3])))
    except BaseException:  # a damaged file raises anything; what was written stays
        sys.stdout.flush()
        os._exit(1)  # interpreter shutdown can hang in a library whose allocations fail
