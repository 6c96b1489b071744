"""Writes to MLflow that are done now, or if it stays away for long, later: no run stops because of it.

What could not be written is kept in a spool, in order, and written when MLflow is back: before the next write, before
the run ends, or when the next run starts. Each write can be repeated without harm, so a delivery that was itself
killed is simply begun again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.url_secrets import shown
from tasks.mlflow_store import AwayError, MlflowStore
from tasks.spool import Entry, Spool

TICKET_TAG = "qadapter.ticket"
TICKET = "spooled-"
"""How the id of a run begins that MLflow has not been told of yet."""

_LOGGER = logging.getLogger(__name__)
_LONGEST_PAUSE = 30.0
_ASK_AGAIN = 10.0
_last_seen_away: dict[str, float] = {}  # tracking URI → when its server was last found away


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
        if not at_once and time.monotonic() - _last_seen_away.get(self._store.uri, -_ASK_AGAIN) < _ASK_AGAIN:
            return False
        if self._store.is_there():
            _last_seen_away.pop(self._store.uri, None)
            return True
        _last_seen_away[self._store.uri] = time.monotonic()
        return False

    def _deliver_all(self, spool: Spool) -> bool:
        with spool.locked():
            for entry in spool.entries():
                try:
                    self._write(entry)
                except AwayError:
                    return False
                except Exception as error:  # such as a run that was deleted: no later attempt will fare better
                    _LOGGER.warning("MLflow refused what it had missed (%s): %s", entry.get("what"), shown(str(error)))
                    spool.refuse(entry, shown(str(error)))
            spool.clear()
        return True

    def record(self, what: str, run_id: str, **content: Any) -> str | None:
        """Write now; if MLflow is away, or has not been told of earlier writes, leave it in the spool.

        Args:
            what: `start`, or one of `MlflowStore.write`'s kinds.
            run_id: the run, or the ticket that stands for it.
            content: plain JSON values.

        Returns:
            The new run's id after a `start`; None otherwise, and if the write is still to come.
        """
        entry = {"what": what, "run": run_id, **content}
        spool = self.spool
        if self.deliver():
            try:
                return self._write(entry)
            except AwayError as error:
                _LOGGER.warning("%s It will be told later: %s", error, spool.file)
        spool.append(entry)
        return None

    def run_of(self, run_id: str) -> str:
        """The id behind a ticket; any other id is itself."""
        if not run_id.startswith(TICKET):
            return run_id
        if found := self.spool.identity_of(run_id):
            return found
        raise QAdapterError(f"MLflow refused to start the run {run_id}; the log says why.")

    def _write(self, entry: Entry) -> str | None:
        """Do one write; doing it again changes nothing."""
        if entry["what"] == "start":
            return self._create(entry)
        self._store.write(entry, self.run_of(entry["run"]))
        return None

    def _create(self, entry: Entry) -> str:
        """Create a child run, unless an earlier attempt did so and only its answer was lost."""
        ticket, parent = entry["run"], self.run_of(entry["parent"])
        experiment_id = self._store.call("get_run", parent).info.experiment_id
        found = []
        if self.spool.waiting:
            found = self._store.call("search_runs", [experiment_id], f"tags.`{TICKET_TAG}` = '{ticket}'")
        tags = {**entry["tags"], "mlflow.parentRunId": parent}
        run = found[0] if found else self._store.call("create_run", experiment_id, entry["time"], tags, entry["name"])
        if self.spool.waiting:
            self.spool.name(ticket, run.info.run_id)
        return str(run.info.run_id)
