"""Containers: every kind gives the same records, and a hostile one costs little and stops nothing."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences import containers, packed
from qadapter.preferences.containers import Position, head, iter_records
from qadapter.preferences.records import MAX_RECORD_BYTES, Reason

ROWS = [{"prompt": f'Q{i}, "ü"\nline', "chosen": "yes; it is\ttrue", "rejected": "no"} for i in range(5)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_text(delimiter: str) -> bytes:
    quoted = ([f'"{text.replace(chr(34), chr(34) * 2)}"' for text in row.values()] for row in ROWS)
    return "\r\n".join([delimiter.join(ROWS[0]), *map(delimiter.join, quoted)]).encode()


def zipped(*entries: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def columnar(table: pa.Table, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "parquet":
        pa.parquet.write_table(table, stream)
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(stream, table.schema) as writer:
            writer.write_table(table)
    return stream.getvalue()


def write(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def values(file: Path, **options: Any) -> list[Any]:
    return [record.problem or record.value for record in iter_records(file, **options)]


def last_problem(file: Path) -> Reason | None:
    *_, last = iter_records(file)
    return last.problem


# ------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),  # as `jq` prints
        ("a.csv", csv_text(",")),
        ("a.csv", b"\xef\xbb\xbf" + csv_text(";")),
        ("a.tsv", csv_text("\t")),
        ("no name", csv_text(",")),
        ("a.jsonl.gz", gzip.compress(JSON_LINES)),
        ("two members.gz", gzip.compress(JSON_LINES[:50]) + gzip.compress(JSON_LINES[50:])),
        ("a.jsonl.zst", zstd(JSON_LINES)),
        ("two frames.zst", zstd(JSON_LINES[:50]) + zstd(JSON_LINES[50:])),
        ("a.jsonl.bz2", bz2.compress(JSON_LINES)),
        ("a.jsonl.xz", lzma.compress(JSON_LINES)),
        ("a.csv.gz", gzip.compress(csv_text(";"))),
        ("a.zip", zipped(("folder/a.csv", csv_text(",")), ("__MACOSX/a.csv", b"x"), ("folder/.hidden", b"x"))),
    ],
)
def test_text_containers_give_the_same_records(tmp_path: Path, name: str, content: bytes) -> None:
    assert values(write(tmp_path, name, content)) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream"])
def test_columns_of_all_types_come_through(tmp_path: Path, kind: str) -> None:
    turns = [{"role": "user", "content": "Q"}]
    table = pa.table(
        {
            "nested": pa.array([{"a": {"b": [1, None]}}]),
            "turns": pa.array([turns]),
            "dictionary": pa.array(["text"]).dictionary_encode(),
            "time": pa.array([datetime.datetime(2024, 5, 1, 12)], pa.timestamp("ms")),
            "bytes": pa.array(["ü".encode()], pa.binary()),
            "map": pa.array([[("academy", "A")]], pa.map_(pa.string(), pa.string())),
            "large": pa.array(["x"], pa.large_string()),
            "null": pa.nulls(1),
        }
    )
    expected = {
        "nested": {"a": {"b": [1, None]}},
        "turns": turns,
        "dictionary": "text",
        "time": "2024-05-01T12:00:00",
        "bytes": "ü",
        "map": {"academy": "A"},
        "large": "x",
        "null": None,
    }
    data = columnar(table, kind)
    assert values(write(tmp_path, "plain", data)) == [expected]
    if kind == "parquet":
        assert values(write(tmp_path, "packed.gz", gzip.compress(data))) == [expected]


def test_lines_of_a_csv_file_are_those_of_its_rows(tmp_path: Path) -> None:
    """A cell with a line end, a row with a cell too few, a stray quotation mark, and a quotation that never ends."""
    text = 'prompt,chosen,rejected\n"a\nb",c,d\n\nonly,two\n"q"x,c,d\ne,f,g\n"open,h,i\n'
    found = [
        (record.line, record.problem or record.value["prompt"]) for record in iter_records(write_text(tmp_path, text))
    ]
    assert found == [(2, "a\nb"), (5, Reason.BROKEN_ROW), (6, Reason.BROKEN_ROW), (7, "e"), (8, Reason.BREAKS_OFF)]


def write_text(folder: Path, text: str) -> Path:
    return write(folder, "a.csv", text.encode())


def test_equal_columns_are_named(tmp_path: Path) -> None:
    assert values(write_text(tmp_path, "prompt,chosen,chosen\na,b,c\n")) == [Reason.EQUAL_COLUMNS]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    assert values(write(tmp_path, "a.parquet", columnar(table, "parquet"))) == [Reason.EQUAL_COLUMNS]


def test_a_list_inside_an_object_is_named_and_opened(tmp_path: Path) -> None:
    whole = {"version": 1, "info": {"data": 1}, "data": ROWS, "more": []}
    for text in (json.dumps({"data": ROWS}), json.dumps(whole, indent=2)[:-1] + "}"):
        file = write(tmp_path, "a.json", text.encode())
        assert values(file, records="data") == ROWS
        with pytest.raises(QAdapterError, match=r"has no list `rows`.*its keys are"):
            values(file, records="rows")
    with pytest.raises(QAdapterError, match="Set `records: data`"):
        values(write(tmp_path, "a.json", json.dumps({"data": ROWS}).encode()))
    columns = {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}
    with pytest.raises(QAdapterError, match=r"a table in columns .* by rows"):
        values(write(tmp_path, "a.json", json.dumps(columns).encode()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped(("[Content_Types].xml", b"x"), ("xl/a.xml", b"x")), "Office file .* as CSV"),
        (zipped(("a.jsonl", JSON_LINES), ("b.jsonl", JSON_LINES)), "zip archive with 2 data files"),
        (gzip.compress(gzip.compress(JSON_LINES, mtime=0)), "compressed twice"),
        (b"name".ljust(257, b"\0") + b"ustar".ljust(300, b"\0"), "tar archive"),
    ],
)
def test_containers_that_are_refused_say_what_to_do(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(QAdapterError, match=words):
        values(write(tmp_path, "a", content))


def test_the_position_grows_to_the_end(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS * 400)
    for content in (JSON_LINES * 400, gzip.compress(JSON_LINES * 400), columnar(table, "parquet")):
        position, shares = Position(), []
        for _ in iter_records(write(tmp_path, "a", content), position=position):
            shares.append(position.share)
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] <= position.share == 1


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.slow
@pytest.mark.parametrize("pack", [gzip.compress, zstd, bz2.compress, lzma.compress])
def test_records_before_a_break_are_kept(tmp_path: Path, pack: Any) -> None:
    """Noise does not compress, so half of the packed bytes hold about half of the rows."""
    rows = [{"text": bytes((i * j * 7919) % 251 for j in range(200)).hex()} for i in range(2000)]
    data = pack("".join(json.dumps(row) + "\n" for row in rows).encode())
    found = values(write(tmp_path, "a", data[: len(data) // 2]))
    assert found[-1] is Reason.BREAKS_OFF
    assert found[:-1] == rows[: len(found) - 1]


def test_a_reader_that_is_killed_is_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = write(tmp_path, "reader.py", b"import os, sys\nprint('{}', flush=True)\nos.kill(os.getpid(), 7)\n")
    monkeypatch.setattr(containers.columnar_reader, "__file__", str(killed))
    file = write(tmp_path, "a.parquet", columnar(pa.Table.from_pylist(ROWS), "parquet"))
    assert values(file) == [{}, Reason.BREAKS_OFF]
    killed.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(containers, "SILENCE_SECONDS", 0.2)
    start = time.monotonic()
    assert values(file) == [Reason.BREAKS_OFF]
    assert time.monotonic() - start < 5


# ------------------------------------------------------------------------------------------- attacks


def test_an_arrow_file_with_an_offset_out_of_range(tmp_path: Path) -> None:
    """Reading such text in this process touches memory that is not its own."""
    data = bytearray(columnar(pa.table({"chosen": ["abcd", "efgh"], "rejected": ["x", "y"]}), "arrow"))
    offsets = struct.pack("<iii", 0, 4, 8)
    place = data.index(offsets)
    for value in (2**30, -5):
        data[place + 8 : place + 12] = struct.pack("<i", value)
        assert values(write(tmp_path, "a.arrow", bytes(data))) == [Reason.BREAKS_OFF]


def test_an_arrow_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """With a memory map this is SIGBUS. 40 batches; the file ends after the first records were taken."""
    table = pa.Table.from_pylist([{"chosen": "x" * 50_000, "rejected": "y"}] * 400)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    file = write(tmp_path, "a.arrow", stream.getvalue())
    records = iter_records(file)
    first = [next(records) for _ in range(3)]
    with file.open("r+b") as cut:
        cut.truncate(2_000_000)
    rest = list(records)
    assert all(record.problem is None for record in first)
    assert rest[-1].problem is Reason.BREAKS_OFF
    assert len(rest) < 397


def test_a_parquet_file_that_expands(tmp_path: Path) -> None:
    """Two columns with one text of a mebibyte, two thousand times: 4 GiB from a few kilobytes; 32 MiB are read."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 2**20]))
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({"chosen": column, "rejected": column}), stream, compression="zstd")
    file = write(tmp_path, "a.parquet", stream.getvalue())
    assert file.stat().st_size < 10_000
    budgeted(file)


def test_a_gzip_file_that_expands(tmp_path: Path) -> None:
    """40 MiB of lines from 40 kB."""
    line = b'{"chosen": "' + b"x" * 1000 + b'", "rejected": ""}\n'
    packer = gzip.GzipFile(filename="", mode="wb", fileobj=(stream := io.BytesIO()), compresslevel=9)
    for _ in range(40):
        packer.write(line * (2**20 // len(line)))
    packer.close()
    budgeted(write(tmp_path, "a.gz", stream.getvalue()))


def test_gzipped_lines_without_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300,000 `1`s in 600 bytes, where a small file may have 100,000 records (a million, but for this test)."""
    monkeypatch.setattr(packed, "SMALL_FILE_RECORDS", 100_000)
    file = write(tmp_path, "a.gz", gzip.compress(b"1\n" * 300_000))
    assert file.stat().st_size < 1_000
    assert values(file) == [1] * 100_000 + [Reason.BUDGET]
    assert packed.Budget(1_000_000_000).records == packed.MAX_RECORDS


def test_gzipped_lines_of_empty_lists(tmp_path: Path) -> None:
    """Each line has a million lists, 72 MB in memory; a hundred of them decide a format: 39 kB gave 2 GB."""
    line = b"[" + b"[]," * 1_000_000 + b"[]]\n"
    file = write(tmp_path, "a.gz", gzip.compress(line * 12))
    assert file.stat().st_size < 60_000
    assert values(file) == [Reason.TOO_LONG] * 12
    listed = write(tmp_path, "b.gz", gzip.compress(b'[{"a": ' + line.strip() + b"}]"))
    assert values(listed) == [Reason.BUDGET]


def test_few_large_records_decide_a_format(tmp_path: Path) -> None:
    line = json.dumps({"chosen": "x" * (MAX_RECORD_BYTES // 2)}).encode() + b"\n"
    file = write(tmp_path, "a.gz", gzip.compress(line * 20, 1))
    assert len(head(iter_records(file))) == 4


@pytest.mark.slow
def test_a_text_without_an_end_of_line_or_quotation(tmp_path: Path) -> None:
    endless = b"x" * (MAX_RECORD_BYTES + 100)
    assert values(write(tmp_path, "a", b"5\n" + endless + b"\n6\n")) == [5, Reason.TOO_LONG, 6]
    assert values(write(tmp_path, "a", b'[{"a": "' + endless)) == [Reason.BUDGET]
    assert values(write_text(tmp_path, 'prompt,chosen\n"' + "x\n" * MAX_RECORD_BYTES)) == [Reason.BUDGET]
    assert values(write(tmp_path, "a", b"[" * 100_000)) == [Reason.BROKEN_JSON]


def test_a_zip_archive_that_expands_or_has_a_huge_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALL_FILE_BYTES", 2**20)
    line = b'{"chosen": "' + b"x" * 10_000 + b'"}\n'
    assert last_problem(write(tmp_path, "a.zip", zipped(("a.jsonl", line * 400)))) is Reason.BUDGET
    data = bytearray(zipped(("a.jsonl", JSON_LINES)))
    struct.pack_into("<I", data, data.rindex(b"PK\x05\x06") + 12, 2**31)
    assert values(write(tmp_path, "a.zip", bytes(data))) == [Reason.BUDGET]


@pytest.mark.slow
def test_the_reader_has_a_limit_on_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Arrow batch of 200 MiB, packed with zstd, does not fit beside pyarrow in 400 MiB of address space."""
    table = pa.table({"chosen": ["x" * 2**20] * 200})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    file = write(tmp_path, "a.arrow", stream.getvalue())
    assert file.stat().st_size < 100_000
    monkeypatch.setattr(containers, "READER_BYTES", 400 * 2**20)
    assert values(file) == [Reason.BREAKS_OFF]


def budgeted(file: Path) -> None:
    """Read a file in a process of its own, with a budget of 32 MiB: it ends there, below 100 MB of memory."""
    program = (
        "import sys; from pathlib import Path; from qadapter.preferences import containers, packed\n"
        "packed.SMALL_FILE_BYTES = 2**25\n"
        "for record in containers.iter_records(Path(sys.argv[1])): pass\n"
        "print(record.problem.name, Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    shown = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    problem, peak_kibibytes = shown.stdout.split()
    assert problem == "BUDGET"
    assert int(peak_kibibytes) < 100 * 2**10
