"""Writes to MLflow that are done now, or if it stays away for long, later: no run stops because of it.

What could not be written is kept in a spool, in order, and written when MLflow is back: before the next write, before
the run ends, or when the next run starts. Each write can be repeated without harm, so a delivery that was itself
killed is simply begun again. What MLflow refuses, or fails at again and again while it answers everything else, is put
aside in a file of its own with the reason, and does not hold up the rest.
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
"""How the id of a run begins that MLflow has not been told of yet."""

_LOGGER = logging.getLogger(__name__)
_LONGEST_PAUSE = 30.0
_ASK_AGAIN = 10.0
_TRIES = 5  # of one entry, each of a minute; counted in the spool, so across processes
_not_before: dict[str, float] = {}  # tracking URI → when its server, last found away, is asked again


@lru_cache(maxsize=256)
def _experiment_of(store: MlflowStore, run: str) -> str:
    """The experiment of a run, which stays what it is."""
    return str(store.call("get_run", run).info.experiment_id)


@dataclass(frozen=True)
class Outbox:
    """The writes to one store; threads and processes may share it."""

    _store: MlflowStore

    @property
    def spool(self) -> Spool:
        """The file, one for each store, below the `.qadapter` that lies beside the artifacts' folder."""
        name = hashlib.sha256(self._store.uri.encode()).hexdigest()[:16]
        return Spool(Path(self._store.artifact_root).parent / ".qadapter" / "spool" / f"{name}.jsonl")

    def deliver(self, patience: float = 0.0) -> bool:
        """Tell MLflow what it missed while it was away.

        Args:
            patience: seconds to wait for it, asking again and again at growing distances.

        Returns:
            Whether nothing is left to be told.
        """
        spool, start, pause = self.spool, time.monotonic(), 1.0
        while spool.waiting:
            if self._is_there(at_once=patience > 0) and self._deliver_all(spool):
                _LOGGER.info("MLflow at %s was told what it had missed.", shown(self._store.uri))
                return True
            if time.monotonic() - start + pause > patience:
                if patience:
                    where = f"{shown(self._store.uri)} is still away; what it missed waits in {spool.file}"
                    _LOGGER.warning("MLflow at %s and is delivered when the next run starts.", where)
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _is_there(self, at_once: bool) -> bool:
        """Whether MLflow is there; unless it must be known at once, one found away is not asked for some seconds."""
        if not at_once and time.monotonic() < _not_before.get(self._store.uri, 0.0):
            return False
        if self._store.is_there():
            return True
        self._pause(_ASK_AGAIN)
        return False

    def _pause(self, seconds: float) -> None:
        _not_before[self._store.uri] = time.monotonic() + seconds

    def _deliver_all(self, spool: Spool) -> bool:
        """Deliver in order, until something must be tried again later; False: something is left."""
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
        except QAdapterError as error:  # the spool itself cannot be written, and is as it was
            _LOGGER.warning("%s What MLflow missed is told later.", error)
        # Not before each write of a run: half of its time is enough to wait for a server that fails.
        self._pause(max(_ASK_AGAIN, time.monotonic() - start))
        return False

    def _deliver_one(self, spool: Spool, entry: Entry) -> Entry | None:
        """Deliver an entry, or put it aside for good; what must be tried again otherwise."""
        try:
            self._write(entry)
            return None
        except (FileNotFoundError, NotADirectoryError, RefusedError) as error:  # no later attempt will fare better
            failed: Exception = error
        except (AwayError, OSError) as error:
            tries = entry.get("tries", 0) + 1
            if tries < _TRIES or not self._answers():
                _LOGGER.warning("%s It is told later.", shown(str(error)))
                return {**entry, "tries": tries}
            failed = error
        except QAdapterError as error:  # a full disk, or one that cannot be written to: not this entry's fault
            _LOGGER.warning("%s What MLflow missed is told later.", error)
            return entry
        except Exception as error:  # such as an entry of another version
            failed = error
        reason = shown(str(failed))
        _LOGGER.warning("MLflow refused what it had missed (%s), see %s: %s", entry.get("what"), spool.refused, reason)
        spool.refuse(entry, reason)
        return None

    def _answers(self) -> bool:
        """Whether MLflow answers a question that needs its database."""
        try:
            self._store.call("search_experiments", max_results=1)
        except QAdapterError:
            return False
        return True

    def record(self, what: str, run_id: str, **content: Any) -> str | None:
        """Write now; if MLflow is away, or has not been told of earlier writes, leave it in the spool.

        What somebody between here and MLflow refuses, such as a proxy with a limit of size, is put aside: no stage
        fails for it.

        Args:
            what: `start`, or one of `MlflowStore.write`'s kinds.
            run_id: the run, or the ticket that stands for it.
            content: plain JSON values.

        Returns:
            The new run's id after a `start`; None otherwise, and if the write is still to come.

        Raises:
            RefusedError: MLflow itself says that it is wrong, or a run could not be started.
            QAdapterError: a disk is full or cannot be written to.
        """
        entry = {"what": what, "run": run_id, **content}
        spool = self.spool
        if self.deliver():
            try:
                return self._write(entry)
            except AwayError as error:
                _LOGGER.warning("%s It will be told later: %s", error, spool.file)
            except RefusedError as error:
                if error.code or what == "start":
                    raise
                _LOGGER.warning("%s It is put aside: %s", error, spool.refused)
                with spool.locked():
                    spool.refuse(entry, str(error))
                return None
        spool.append(entry)
        return None

    def run_of(self, run_id: str) -> str:
        """The id behind a ticket; any other id is itself.

        Raises:
            RefusedError: MLflow did not start that run.
        """
        if not run_id.startswith(TICKET):
            return run_id
        if found := self.spool.identity_of(run_id):
            return found
        raise RefusedError(f"MLflow refused to start the run {run_id}; {self.spool.refused} says why.")

    def _write(self, entry: Entry) -> str | None:
        """Do one write; doing it again changes nothing."""
        if entry["what"] == "start":
            return self._create(entry)
        self._store.write(entry, self.run_of(entry["run"]))
        return None

    def _create(self, entry: Entry) -> str:
        """Create a child run, unless an earlier attempt did so and only its answer was lost."""
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
