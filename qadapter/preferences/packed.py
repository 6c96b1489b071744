"""Compressed files as streams with a budget: gzip, zstd, bzip2, xz, and a zip archive with one data file in it.

The compression is recognised by the first bytes. What comes out is metered, so that a small file cannot give gigabytes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path

MAX_RECORDS = 20_000_000
"""Records of one file at most; docs/data.md names half of it as the design limit of a source."""

SMALL_FILE_BYTES, SMALL_FILE_RECORDS = 256 * 2**20, 1_000_000
"""What even the smallest file may give."""

MAX_DIRECTORY_BYTES = 2**20
"""Size of a zip archive's directory at most: one data file is expected, and Python holds an object per entry."""

# What decompressors raise on damaged data; zstd's (pyarrow) raises OSError without a number.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError)


class BudgetError(Exception):
    """A file has more contents than a file of its size can honestly hold."""


class DamagedError(Exception):
    """A file breaks off or cannot be decompressed."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one file may give. Text is packed to a third or a tenth of its size, hostile files to a thousandth.

    Attributes:
        stored: size of the file in bytes.
    """

    stored: int

    @property
    def bytes(self) -> int:
        """Size after decompression: 256 MiB, or a hundred times the stored size if that is more."""
        return max(SMALL_FILE_BYTES, 100 * self.stored)

    @property
    def records(self) -> int:
        """A million, or one per four stored bytes if that is more, and never more than `MAX_RECORDS`."""
        return min(MAX_RECORDS, max(SMALL_FILE_RECORDS, self.stored // 4))


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Contents of a file.

    Attributes:
        stream: the contents, buffered; raises `DamagedError` and `BudgetError`.
        name: the file's name without the ending of its compression; in a zip archive the name of the entry.
        packed: whether it was compressed.
        head: its first 512 bytes, which `stream` gives again.
    """

    stream: io.BufferedReader[Any]
    name: str
    packed: bool
    head: bytes


class _Metered(io.RawIOBase):
    """A stream that ends with an error beyond its budget, and with one kind of error for all kinds of damage."""

    def __init__(self, source: Any, budget: int) -> None:
        self._source, self._left = source, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # One read of the source at a time (`read1`), so that what precedes a break is kept.
            data = getattr(self._source, "read1", self._source.read)(len(buffer))
        except _DAMAGE as error:
            raise DamagedError(str(error)) from error
        self._left -= len(data)
        if self._left < 0:
            raise BudgetError
        buffer[: len(data)] = data
        return len(data)


def unpack(file: Path, raw: IO[bytes], budget: Budget) -> Unpacked:
    """The contents of an open file.

    Args:
        file: its path, for its name and messages.
        raw: the file, at its beginning.
        budget: of the file.

    Raises:
        QAdapterError: an Excel file, a tar archive, or a zip archive with several files or a password.
        DamagedError: the file breaks off within its first bytes.
        BudgetError: the directory of a zip archive is too large.
    """
    magic = raw.read(512)
    raw.seek(0)
    source, name = _opened(file, raw, magic)
    stream: io.BufferedReader[Any]
    if source is None:
        stream, head = io.BufferedReader(_Metered(raw, 2**62), 2**16), magic
    else:
        stream = io.BufferedReader(_Metered(source, budget.bytes), 2**16)
        head = stream.peek(512)[:512]
        if _is_packed(head):
            raise refused(file, "is compressed twice", "Decompress it once")
    if head[257:262] == b"ustar":
        raise refused(file, "is a tar archive", "Give the files that are in it")
    return Unpacked(stream, name, source is not None, head)


def refused(file: Path, what: str, advice: str) -> QAdapterError:
    """The error for a container that is readable and still not read."""
    return QAdapterError(f"{shown_path(file)} {what}, which is not read. {advice}.")


def _is_packed(magic: bytes) -> bool:
    return magic.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00", b"PK\x03\x04", b"PK\x05\x06"))


def _opened(file: Path, raw: IO[bytes], magic: bytes) -> tuple[Any, str]:
    """A decompressing stream, or None where the file is not compressed; and the name of the contents."""
    inner = file.stem
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw), inner
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa  # a quarter of a second that other files need not wait for

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), inner
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(raw), inner
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(raw), inner
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_entry(file, raw)
    return None, file.name


def _zip_entry(file: Path, raw: IO[bytes]) -> tuple[Any, str]:
    _check_directory(raw)
    try:
        archive = zipfile.ZipFile(raw)
        infos = archive.infolist()
        if any(info.filename == "[Content_Types].xml" for info in infos):
            raise refused(file, "is an Office file (Excel)", "Export the sheet as CSV")
        data = [info for info in infos if not info.is_dir() and not _is_beside(PurePosixPath(info.filename))]
        if len(data) != 1:
            raise refused(
                file, f"is a zip archive with {len(data)} data files in place of one", "Unpack it into a folder"
            )
        if data[0].flag_bits & 1:
            raise refused(file, "is a zip archive with a password", "Unpack it")
        return archive.open(data[0]), PurePosixPath(data[0].filename).name
    except _DAMAGE as error:
        raise DamagedError(str(error)) from error


def _is_beside(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def _check_directory(raw: IO[bytes]) -> None:
    """Look at the size of a zip archive's directory before Python reads it whole."""
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - 2**16 - 22))
    tail = raw.read()
    raw.seek(0)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise DamagedError("no directory at the end")
    if struct.unpack_from("<I", tail, end + 12)[0] > MAX_DIRECTORY_BYTES:
        raise BudgetError
