"""Writes to MLflow that are queued while MLflow is unavailable, so that no run stops because of an outage.

Pending writes are queued in the spool, in order, and delivered when MLflow is available again: before the next write,
before the run ends, or when the next run starts. Each write is idempotent, so a delivery that was killed is repeated.
Writes that MLflow refuses, or repeatedly fails at while it answers other requests, are moved to a separate file with
the reason, and do not delay the others.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.shown import shown
from tasks.tracking.spool import Entry, Spool
from tasks.tracking.store import AwayError, MlflowStore, RefusedError

TICKET_TAG = "qadapter.ticket"
TICKET = "spooled-"
"""Prefix of a ticket: the id of a run that MLflow has not created yet."""

_LOGGER = logging.getLogger(__name__)
_LONGEST_PAUSE = 30.0
_ASK_AGAIN = 10.0
_TRIES = 5  # attempts per entry, each up to a minute; counted in the spool, so across processes
_not_before: dict[str, float] = {}  # tracking URI → when a server that was unavailable is contacted again


@lru_cache(maxsize=256)
def _experiment_of(store: MlflowStore, run: str) -> str:
    """The experiment of a run; it never changes."""
    return str(store.call("get_run", run).info.experiment_id)


@dataclass(frozen=True)
class Outbox:
    """The writes to one store; safe to share between threads and processes."""

    _store: MlflowStore

    @property
    def spool(self) -> Spool:
        """The spool: one file per store, in `.qadapter` beside the artifacts' folder."""
        name = hashlib.sha256(self._store.uri.encode()).hexdigest()[:16]
        return Spool(Path(self._store.artifact_root).parent / ".qadapter" / "spool" / f"{name}.jsonl")

    def deliver(self, patience: float = 0.0) -> bool:
        """Deliver the pending writes to MLflow.

        Args:
            patience: seconds to wait for MLflow, with attempts at growing intervals.

        Returns:
            Whether no write is pending any more.
        """
        spool, start, pause = self.spool, time.monotonic(), 1.0
        while spool.waiting:
            if self._is_there(at_once=patience > 0) and self._deliver_all(spool):
                _LOGGER.info("Delivered all pending writes to MLflow at %s.", shown(self._store.uri))
                return True
            if time.monotonic() - start + pause > patience:
                if patience:
                    where = f"{shown(self._store.uri)} is still unavailable; pending writes stay in {spool.file}"
                    _LOGGER.warning("MLflow at %s and are delivered when the next run starts.", where)
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _is_there(self, at_once: bool) -> bool:
        """Whether MLflow is available. Without `at_once`, a recently unavailable one is not contacted."""
        if not at_once and time.monotonic() < _not_before.get(self._store.uri, 0.0):
            return False
        if self._store.is_there():
            return True
        self._pause(_ASK_AGAIN)
        return False

    def _pause(self, seconds: float) -> None:
        _not_before[self._store.uri] = time.monotonic() + seconds

    def _deliver_all(self, spool: Spool) -> bool:
        """Deliver in order until an entry must be tried again later. Returns whether nothing is left."""
        start = time.monotonic()
        try:
            with spool.locked():
                rest = spool.entries()
                while rest:
                    entry = rest.pop(0)
                    start = time.monotonic()
                    again = self._deliver_one(spool, entry)
                    if again is not None:
                        spool.keep([again, *rest])
                        break
                else:
                    spool.keep([])
                    _not_before.pop(self._store.uri, None)
                    return True
        except QAdapterError as error:  # the spool cannot be written, and is unchanged
            _LOGGER.warning("%s Pending writes are delivered later.", error)
        # Not before each write: a run spends at most half of its time waiting for a failing server.
        self._pause(max(_ASK_AGAIN, time.monotonic() - start))
        return False

    def _deliver_one(self, spool: Spool, entry: Entry) -> Entry | None:
        """Deliver an entry or refuse it for good. Returns the entry if it must be tried again, else None."""
        try:
            self._write(entry)
            return None
        except (FileNotFoundError, NotADirectoryError, RefusedError) as error:  # no later attempt can succeed
            failed: Exception = error
        except (AwayError, OSError) as error:
            tries = entry.get("tries", 0) + 1
            if tries < _TRIES or not self._answers():
                _LOGGER.warning("%s It is delivered later.", shown(str(error)))
                return {**entry, "tries": tries}
            failed = error
        except QAdapterError as error:  # the disk is full or read-only, for any entry
            _LOGGER.warning("%s MLflow gets the missed entries later.", error)
            return entry
        except Exception as error:  # for example an entry of another version
            failed = error
        reason = shown(str(failed))
        _LOGGER.warning("MLflow refused a pending write (%s), see %s: %s", entry.get("what"), spool.refused, reason)
        spool.refuse(entry, reason)
        return None

    def _answers(self) -> bool:
        """Whether MLflow answers a request that needs its database."""
        try:
            self._store.call("search_experiments", max_results=1)
        except QAdapterError:
            return False
        return True

    def record(self, what: str, run_id: str, **content: Any) -> str | None:
        """Write now; if MLflow is unavailable, or earlier writes are pending, queue the write in the spool.

        A write that a proxy refuses, for example for its size, is moved to the file of refused writes and fails no
        stage.

        Args:
            what: `start`, or one of `MlflowStore.write`'s kinds.
            run_id: the run's id, or its ticket.
            content: plain JSON values.

        Returns:
            The new run's id after a `start`; None for other writes, and if the write is pending.

        Raises:
            RefusedError: MLflow itself refuses the write, or a run could not be started.
            QAdapterError: a disk is full or read-only.
        """
        entry = {"what": what, "run": run_id, **content}
        spool = self.spool
        if self.deliver():
            try:
                return self._write(entry)
            except AwayError as error:
                _LOGGER.warning("%s The write is queued: %s", error, spool.file)
            except RefusedError as error:
                if error.code or what == "start":
                    raise
                _LOGGER.warning("%s The write was refused: %s", error, spool.refused)
                with spool.locked():
                    spool.refuse(entry, str(error))
                return None
        spool.append(entry)
        return None

    def run_of(self, run_id: str) -> str:
        """Resolve a ticket to the run's id; any other id is returned unchanged.

        Raises:
            RefusedError: MLflow did not start that run.
        """
        if not run_id.startswith(TICKET):
            return run_id
        if found := self.spool.identity_of(run_id):
            return found
        raise RefusedError(f"MLflow refused to start the run {run_id}; see {self.spool.refused} for the reason.")

    def _write(self, entry: Entry) -> str | None:
        """Do one write; it is idempotent."""
        if entry["what"] == "start":
            return self._create(entry)
        self._store.write(entry, self.run_of(entry["run"]))
        return None

    def _create(self, entry: Entry) -> str:
        """Create a child run, unless an earlier attempt created it and only the answer was lost."""
        ticket, parent = entry["run"], self.run_of(entry["parent"])
        experiment_id = _experiment_of(self._store, parent)
        found = []
        if self.spool.waiting:
            found = self._store.call("search_runs", [experiment_id], f"tags.`{TICKET_TAG}` = '{ticket}'")
        tags = {**entry["tags"], "mlflow.parentRunId": parent}
        run = found[0] if found else self._store.call("create_run", experiment_id, entry["time"], tags, entry["name"])
        if self.spool.waiting:
            self.spool.name(ticket, run.info.run_id)
        return str(run.info.run_id)
