"""Results of batches, kept in a stage's scratch folder: a killed evaluation goes on, and processes share its batches.

The batches are always formed from all items. A resumed run, or one with several processes, therefore runs the same
batches as an undisturbed run in one process, and its numbers are the same to the last digit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import json_line, storage_errors
from qadapter.progress.reports import counted

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_SYNCS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.05  # at what other processes have written


@dataclass
class Kept:
    """The results of a stage's batches, in one file per process.

    Attributes:
        folder: where the files are.
        rank, processes: which of how many processes this is; batch i is computed by process i modulo their number.
    """

    folder: Path
    rank: int = 0
    processes: int = 1
    _found: dict[str, dict[str, Any]] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)
    _calls: int = 0
    _synced: float = 0.0

    def next_call(self) -> int:
        """The number of this call of `computed`. A stage always makes the same calls in the same order."""
        self._calls += 1
        return self._calls

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a batch; None if no process has written it yet."""
        return self._found.get(key)

    def look(self) -> None:
        """Read what was written since the last look. Lines that a kill or a power cut damaged are skipped."""
        for file in sorted(self.folder.glob("items-*.jsonl")):
            with file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                for line in stream:
                    if not line.endswith(b"\n"):  # another process is writing it
                        break
                    self._read[file] = self._read.get(file, 0) + len(line)
                    row = _row_of(line)
                    if row is not None:
                        self._found.setdefault(row["key"], row)

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep the row of a batch. It is on the disk after at most a second of further work."""
        file = self.folder / f"items-{self.rank}.jsonl"
        content = {"key": key, **row}
        text = json.dumps(content)
        with storage_errors(file), file.open("ab") as stream:
            start = b"" if stream.tell() == 0 or _ends_in_newline(file) else b"\n"  # a kill can cut the last line
            stream.write(start + json_line({"sum": _digest(text), "row": text}))
            stream.flush()
            if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
                os.fsync(stream.fileno())
                self._synced = time.monotonic()
        self._found[key] = content


_kept: ContextVar[Kept | None] = ContextVar("where results are kept", default=None)


@contextmanager
def keeping(scratch: Path | None, share: tuple[int, int] | None = None) -> Iterator[None]:
    """Keep the results of the block's batches in a stage's scratch folder, and share them with the other processes.

    Args:
        scratch: the folder, the same one for all processes and for the run after a kill; None keeps nothing.
        share: rank of this process and number of processes; by default those of torch.distributed's launcher.
    """
    found = None
    if scratch is not None:
        folder = scratch / "items"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # The variables are absent for a single process.
        rank, processes = share or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        found = Kept(folder, rank, processes)
        found.look()
        if found._found and found.rank == 0:
            batches = "1 batch" if len(found._found) == 1 else f"{len(found._found)} batches"
            log.info("%s of an interrupted run kept and not computed again", batches)
    token = _kept.set(found)
    try:
        yield
    finally:
        _kept.reset(token)


def kept_folder() -> Path | None:
    """Where work keeps what is no batch's result, for the run after a kill; None where nothing is kept."""
    found = _kept.get()
    return found.folder if found else None


def leads() -> bool:
    """Whether this process does what is done once: asking a judge, writing results."""
    found = _kept.get()
    return found is None or found.rank == 0


def computed(
    work: str,
    unit: str,
    sizes: Sequence[int],
    compute: Callable[[int], Any],
    content: Callable[[int], Any],
    *,
    sampled: bool = False,
) -> list[Any]:
    """The results of all batches, in order: computed here, by another process, or by a run that was killed.

    Args:
        work, unit: what reports call the work and one item.
        sizes: number of items of each batch.
        compute: from the number of a batch to its result, as JSON values.
        content: from the number of a batch to JSON values that determine its result within this stage.
        sampled: whether the results depend on torch's random state, and so on the batches before. They are then
            computed by one process, and the random state after each batch is kept too.

    Raises:
        QAdapterError: a result is NaN, or has one.
    """
    found, results = _kept.get(), []
    if found is None:
        with counted(work, unit, sum(sizes)) as progress:
            for place, size in enumerate(sizes):
                results.append(_numbers(compute(place), work))
                progress.advance(size)
        return results
    call = found.next_call()
    # With its place: two batches of the same items are two draws where they are sampled.
    keys = [_digest(json.dumps([call, place, work, content(place)])) for place in range(len(sizes))]
    missing = dict(zip(keys, sizes, strict=True))
    total = sum(missing.values())

    def left() -> int:
        """Look at what the other processes have written; the number of items that are missing."""
        found.look()
        for key in [key for key in missing if found.get(key)]:
            del missing[key]
        return sum(missing.values())

    with counted(work, unit, total, total - left()) as progress:
        for place, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            row = found.get(key)
            mine = found.rank == 0 if sampled else place % found.processes == found.rank
            if row is None and mine:
                row = {"result": _numbers(compute(place), work)}
                if sampled:
                    row["state"] = _random_state()
                found.put(key, row)
                missing.pop(key)
                progress.advance(size)
            elif row is not None and sampled and mine:
                _set_random_state(row["state"])
        while missing:  # another process computes them; the launcher ends all processes if one of them fails
            progress.at(total - left())
            time.sleep(_SECONDS_BETWEEN_LOOKS if missing else 0)
    for key in keys:
        row = found.get(key)
        assert row is not None
        results.append(row["result"])
    return results


def _numbers(result: Any, work: str) -> Any:
    """A batch's result, which is kept only if it has no NaN."""
    if _has_nan(result):
        raise QAdapterError(
            f"{work}: a result is NaN. The policy's training diverged, or its numbers do not fit into its dtype: train "
            "it with a lower learning rate, or load it in float32 or bfloat16."
        )
    return result


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if the line is damaged."""
    try:
        outer = json.loads(line)
        if outer["sum"] != _digest(outer["row"]):
            return None
        row: dict[str, Any] = json.loads(outer["row"])
        return row
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _ends_in_newline(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _random_state() -> list[str]:
    """torch's random state: of the CPU, then of each GPU."""
    import torch

    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_random_state(kept: Sequence[str]) -> None:
    import torch

    states = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in kept]
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all(states[1:])
