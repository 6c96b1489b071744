"""One process of a distributed training or evaluation: `accelerate launch … -m qadapter.training.worker job.json`.

A job is a function of `qadapter` and its arguments, as JSON. The process with rank 0 writes the results.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from qadapter.config.base import Settings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json
from qadapter.files.process_tags import ProcessTag
from qadapter.files.shown import quiet_libraries
from qadapter.progress.reports import Listener, listening

PROGRESS = "progress: "  # a line of rank 0's log; anything else a child prints is a library's
REPORT = "report: "  # a report of rank 0 (`qadapter.progress.reports`) as JSON
_SECONDS_BETWEEN_REPORTS = 1.0
_TRAININGS = ("qadapter.training.", "qadapter.methods.", "qadapter.judging.", "qadapter.evaluation.")
_SECTIONS = ("qadapter.",)


def write_job(file: Path, function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Write a call as JSON.

    Args:
        file: where to.
        function: a function at the top of one of `qadapter`'s modules; it takes `out`, the folder of its results.
        positional, named: its arguments: JSON values, paths, sections of an experiment's config, records (dataclasses)
            of them, and other functions at the top of the modules where trainings and evaluations are.

    Raises:
        TypeError: an argument is something else.
    """
    call = {"function": _name_of(function), "positional": positional, "named": named}
    text = json.dumps({**call, "owner": ProcessTag.own().text()}, default=_tagged, allow_nan=False)
    file.write_text(text, encoding="utf-8")


def read_job(file: Path) -> dict[str, Any]:
    """A job of `write_job`, with `function` resolved and the arguments' types restored.

    Raises:
        ValueError: it names a function elsewhere than where trainings are.
    """
    job: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"), object_hook=_untagged)
    return {**job, "function": _named(job["function"], _TRAININGS)}


def _name_of(value: Any) -> str:
    """`module:name` of a function or class at the top of a module."""
    return f"{value.__module__}:{value.__qualname__}"


def _named(text: str, packages: tuple[str, ...]) -> Any:
    """What `module:name` names; nothing outside these packages is imported.

    Raises:
        ValueError: the module lies elsewhere.
    """
    module, _, name = text.partition(":")
    if not module.startswith(packages):
        raise ValueError(f"{module} is not below {' or '.join(packages)}")
    return getattr(import_module(module), name)


def _tagged(value: Any) -> Any:
    if isinstance(value, Path):
        return {"!path": str(value)}
    if isinstance(value, Settings):
        return {"!settings": _name_of(type(value)), "values": value.model_dump(mode="json", by_alias=True)}
    if is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith(_SECTIONS):
        return {
            "!record": _name_of(type(value)),
            "fields": {one.name: getattr(value, one.name) for one in fields(value)},
        }
    if isinstance(value, FunctionType) and value.__module__.startswith(_TRAININGS):
        return {"!function": _name_of(value)}
    raise TypeError(f"{type(value).__name__} cannot be handed to a training process")


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() == {"!path"}:
        return Path(value["!path"])
    if value.keys() == {"!function"}:
        return _named(value["!function"], _TRAININGS)
    if value.keys() == {"!settings", "values"}:
        kind = _named(value["!settings"], _SECTIONS)
        if not issubclass(kind, Settings):
            raise ValueError(f"{value['!settings']} is not a section of a config")
        return kind.model_validate(value["values"])
    if value.keys() == {"!record", "fields"}:
        record: Any = _named(value["!record"], _SECTIONS)
        if not (isinstance(record, type) and is_dataclass(record)):
            raise ValueError(f"{value['!record']} is no record")
        return record(**value["fields"])
    return value


def main(arguments: list[str] | None = None) -> int:
    """Do this process's part of a job; a failure is written beside the job file, for the launching process."""
    (file,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    rank = int(os.environ.get("RANK", "0"))
    _die_with(json.loads(file.read_text(encoding="utf-8"))["owner"])
    quiet_libraries()
    logging.basicConfig(
        format=f"{PROGRESS}%(message)s", stream=sys.stdout, level=logging.ERROR if rank else logging.WARNING
    )
    logging.getLogger("qadapter").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    try:
        job = read_job(file)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"rank-{rank}-") as elsewhere:
            if rank:  # the results are rank 0's to write; the others do the same into a folder that is not read
                job["named"]["out"] = Path(elsewhere)
            with listening(None if rank else PrintedReports()):
                job["function"](*job["positional"], **job["named"])
            _leave_together()
    except BaseException as error:
        failure = {"refused": isinstance(error, QAdapterError), "message": str(error), "traceback": _last(error)}
        write_json(file.with_name(f"failure-{rank}.json"), failure)
        raise
    return 0


class PrintedReports:
    """Prints reports for the process that launched this one; of the counts, at most one per second."""

    def __init__(self) -> None:
        self._printed = 0.0

    def begin(self, work: str, unit: str, total: int, done: int) -> None:
        """See `Listener`."""
        self._print("begin", work, unit, total, done)

    def at(self, done: int) -> None:
        """See `Listener`."""
        if time.monotonic() - self._printed >= _SECONDS_BETWEEN_REPORTS:
            self._printed = time.monotonic()
            self._print("at", done)

    def end(self) -> None:
        """See `Listener`."""
        self._print("end")

    def row(self, row: Mapping[str, float]) -> None:
        """See `Listener`."""
        self._print("row", dict(row))

    def _print(self, *report: Any) -> None:
        sys.stdout.write(f"{REPORT}{json.dumps(report)}\n")  # one write: lines of several processes do not mix
        sys.stdout.flush()


def pass_on(line: str, to: Listener | None) -> None:
    """Give a printed report to a listener of this process.

    Args:
        line: what follows `REPORT`.
        to: the listener; None ignores it.
    """
    kind, *arguments = json.loads(line)
    if to is not None and kind in ("begin", "at", "end", "row"):
        getattr(to, kind)(*arguments)


def _last(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-4:])


def _leave_together() -> None:
    """Wait for the other processes: one that ends early tears down what the others still talk through."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _die_with(owner: str) -> None:
    """End this process within a second of that one's end, or its launcher's: no orphan goes on writing checkpoints.

    Args:
        owner: its tag.
    """
    launcher, tag = os.getppid(), ProcessTag.read(owner)

    def watch() -> None:
        while os.getppid() == launcher and not (tag and tag.is_dead()):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
