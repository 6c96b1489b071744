"""The model registry: versions with all their tags, the aliases `champion` and `previous`, and rollbacks.

Every step leaves a usable registry: a version is registered with all its tags in one call, a promotion sets `previous`
before `champion`, and `finish` or another rollback completes what a killed process left undone. Aliases are moved under
a lock, after checking which version is the champion. All calls to MLflow go through `tasks/tracking/tracker.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.locks import held
from qadapter.files.shown import shown
from tasks.tracking.store import NOT_FOUND, RefusedError, downloaded, local_path
from tasks.tracking.tracker import Tracker

CHAMPION, PREVIOUS = "champion", "previous"
_LOGGED_MODEL = "models:/"
_LOCK_SECONDS = 600.0  # long enough to move aliases despite a short outage of the server
_PROMOTE, _REJECT = "promote", "reject"
_UNDER_WAY = "rolling_back_from"  # tag of the target until both aliases have moved
# Bytes that all of MLflow's databases accept: VARCHAR(5000) in PostgreSQL and MySQL, and TEXT in MySQL (65,535), which
# is less than the 100,000 characters that MLflow itself allows. SQLite has no limit.
_DESCRIPTION, _TAG = 5_000, 60_000


@dataclass(frozen=True)
class Version:
    """One registered version.

    Attributes:
        number: the version's number, from 1.
        run_id: MLflow run of its training and evaluation.
        source: the model's URI.
        tags: its tags (`docs/recurring.md`).
        aliases: the aliases that point to it now.
        created: time of registration in seconds since the epoch.
        description: readable description.
    """

    number: int
    run_id: str
    source: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created: float
    description: str = ""

    @property
    def rejected(self) -> bool:
        """Whether the gate rejected it."""
        return self.tags.get("decision") == _REJECT

    @property
    def metrics(self) -> dict[str, float]:
        """Its metrics at registration, or as many of a very long list as fit into a tag."""
        return dict(json.loads(self.tags.get("metrics", "{}")))


@dataclass(frozen=True)
class Candidate:
    """A candidate for registration.

    Attributes:
        key: identifies the candidate; it is never registered twice.
        run_id: its MLflow run.
        passed: the gate's decision.
        reasons: the reasons for the decision.
        parent: number of the version whose training was continued; None for the first.
        facts: further tags: digests of data and config, the base, …; secrets in URLs are masked, as in `config`.
        metrics: its metrics.
        config: the whole config as JSON values.
        origin: what became of its parent, where that was not trained further.
    """

    key: str
    run_id: str
    passed: bool
    reasons: list[str]
    parent: int | None
    facts: Mapping[str, str]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    origin: str = ""

    def tags(self) -> dict[str, str]:
        """The version's tags."""
        tags = {
            "candidate": self.key,
            "decision": _PROMOTE if self.passed else _REJECT,
            "reasons": _fitting(self.reasons, _TAG, "… and {} more: see gate.json among the run's artifacts"),
            "parent": str(self.parent or ""),
            "metrics": _fitting_metrics(self.metrics),
            "config": _fitting([shown(json.dumps(dict(self.config), sort_keys=True))], _TAG, "too long for a tag"),
            **{name: shown(value) for name, value in self.facts.items()},
        }
        return tags if self.passed else {**tags, "rejected": "true"}

    def description(self) -> str:
        """The version's description, cut to what every database accepts; `gate.json` of the run is complete."""
        origin = f"Trained on from version {self.parent}." if self.parent else "The first candidate, from the base."
        origin = self.origin or origin
        verdict = "Promoted" if self.passed else "Rejected"
        head = f"{verdict} by the gate. {origin}\n\n"
        rest = "- … and {} more: the tag `reasons` has them, and gate.json among the run's artifacts"
        reasons = [f"- {reason}" for reason in self.reasons]
        return head + _fitting(reasons, _DESCRIPTION - len(head.encode()) - 1, rest) + "\n"


@dataclass(frozen=True)
class Registry:
    """One registered model of an MLflow store.

    Attributes:
        tracker: calls MLflow.
        name: name of the registered model.
        lock: file that processes of this machine lock while they move aliases. It differs from the lock of a flow run,
            since a rollback must not wait for a training.
    """

    tracker: Tracker
    name: str
    lock: Path

    def versions(self) -> list[Version]:
        """All versions, the oldest first; empty if the model does not exist yet."""
        aliases: dict[int, list[str]] = {}
        for alias, number in self._aliases().items():
            aliases.setdefault(number, []).append(alias)
        found = self.tracker.call("search_model_versions", f"name = '{self.name}'", max_results=10_000)
        versions = [
            Version(
                number=int(each.version),
                run_id=str(each.run_id),
                source=str(each.source),
                tags=dict(each.tags),
                aliases=tuple(sorted(aliases.get(int(each.version), []))),
                created=each.creation_timestamp / 1000,
                description=str(each.description or ""),
            )
            for each in found
        ]
        return sorted(versions, key=lambda version: version.number)

    def champion(self) -> Version | None:
        """The version that is served; None before the first promotion."""
        return next((version for version in self.versions() if CHAMPION in version.aliases), None)

    def register(self, candidate: Candidate, log_model: Callable[[], str]) -> Version:
        """Register a candidate with all its tags; the aliases do not move.

        Args:
            candidate: the candidate. If a killed run already registered it, that version is returned.
            log_model: logs the model and returns its URI; called only if needed.
        """
        known = next((v for v in self.versions() if v.tags.get("candidate") == candidate.key), None)
        if known is not None:
            return known
        source = log_model()
        if not self.tracker.call("search_registered_models", f"name = '{self.name}'"):
            self.tracker.call("create_registered_model", self.name)
        created = self.tracker.call(
            "create_model_version",
            self.name,
            source,
            run_id=candidate.run_id,
            tags=candidate.tags(),
            description=candidate.description(),
            # A server accepts a logged model as source only if the request declares it as one.
            model_id=source.removeprefix(_LOGGED_MODEL) if source.startswith(_LOGGED_MODEL) else None,
        )
        return next(version for version in self.versions() if version.number == int(created.version))

    def promote(self, version: Version) -> str | None:
        """Move the aliases to a version that passed the gate. It is idempotent, so it can be repeated after a kill.

        If the champion has changed since the candidate was compared with it (by a rollback), the aliases do not move.

        Returns:
            Why the aliases were not moved; None if the version is the champion now.
        """
        with self._moving():
            return self._promote(version.number)

    def _promote(self, number: int) -> str | None:
        version = next(version for version in self.versions() if version.number == number)
        if version.rejected:
            return f"version {number} is not promoted: the gate rejected it"
        if "superseded_at" in version.tags:
            return (
                f"version {number} is not promoted: it was rolled back or overtaken ({version.tags['superseded_at']})"
            )
        champion = self.champion()
        standing, parent = str(champion.number) if champion else "", version.tags["parent"]
        if standing not in (parent, str(number)):
            self._tag(number, "superseded_at", _now())
            return (
                f"version {number} is not promoted: it was compared with {_called(parent)}, but the champion is "
                f"{_called(standing)} now; `rollback --to {number}` makes it the champion all the same"
            )
        if standing != str(number):
            if parent:
                self._alias(PREVIOUS, int(parent))
            self._alias(CHAMPION, number)
        if "promoted_at" not in version.tags:
            self._tag(number, "promoted_at", _now())
        return None

    def finish(self) -> list[int]:
        """Promote versions that passed the gate in a run that was killed before it moved the alias.

        If the champion has changed since then (by a rollback), the aliases do not move.

        Returns:
            The numbers of the promoted versions.
        """
        finished = []
        with self._moving():
            self._finish_rollback()
            for version in self.versions():
                if version.tags.get("decision") != _PROMOTE or {"promoted_at", "superseded_at"} & set(version.tags):
                    continue
                if self._promote(version.number) is None:
                    finished.append(version.number)
        return finished

    def roll_back(self, to: int | None = None, *, even_rejected: bool = False) -> tuple[Version, Version]:
        """Make an earlier version the champion again; the champion becomes `previous`.

        The old champion gets the tag `superseded_at`, so that no killed or repeated run promotes it again. The next
        rollback completes one that was killed.

        Args:
            to: number of the version; None: the one with the alias `previous`.
            even_rejected: also accept a version that the gate rejected.

        Returns:
            The old and the new champion.

        Raises:
            QAdapterError: there is no such version, it was rejected, or there is no earlier champion.
        """
        with self._moving():
            if (finished := self._finish_rollback()) and to in (None, finished[1].number):
                return finished
            return self._roll_back(to, even_rejected)

    def _finish_rollback(self) -> tuple[Version, Version] | None:
        """Complete a rollback that was killed after moving the champion: set `previous` and the tags."""
        now = self.champion()
        if now is None or _UNDER_WAY not in now.tags:
            return None
        (before,) = [version for version in self.versions() if str(version.number) == now.tags[_UNDER_WAY]]
        self._end_rollback(now.number, before.number)
        return before, now

    def _end_rollback(self, target: int, before: int) -> None:
        self._alias(PREVIOUS, before)
        self._tag(target, "rolled_back_to_at", f"{_now()} from version {before}")
        self.tracker.call("delete_model_version_tag", self.name, str(target), _UNDER_WAY)

    def _roll_back(self, to: int | None, even_rejected: bool) -> tuple[Version, Version]:
        versions = {version.number: version for version in self.versions()}
        champion = self.champion()
        if champion is None:
            raise QAdapterError(f"the registered model {self.name!r} has no champion, so there is nothing to roll back")
        target = to if to is not None else self._aliases().get(PREVIOUS)
        if target is None or target == champion.number:
            raise QAdapterError(
                f"version {champion.number} of {self.name!r} has no earlier champion; name a version with --to "
                f"(there are {', '.join(map(str, versions))})"
            )
        if target not in versions:
            raise QAdapterError(
                f"{self.name!r} has no version {target}; its versions are {', '.join(map(str, versions))}"
            )
        if versions[target].rejected and not even_rejected:
            raise QAdapterError(
                f"version {target} of {self.name!r} was rejected by the gate "
                f"({'; '.join(versions[target].tags['reasons'].splitlines())}). Give another version, or use "
                "--even-rejected to make it the champion anyway."
            )
        # First write what a retry needs: until the champion has moved, a kill leaves the registry unchanged.
        if "promoted_at" not in champion.tags:
            self._tag(champion.number, "promoted_at", _now())
        self._tag(champion.number, "superseded_at", f"{_now()} by a rollback to version {target}")
        self._tag(target, _UNDER_WAY, str(champion.number))
        self._alias(CHAMPION, target)
        self._end_rollback(target, champion.number)
        return champion, versions[target]

    def has(self, version: Version, folder: str) -> bool:
        """Whether the artifacts of a version's run contain this folder; False if the run was deleted."""
        try:
            return bool(self.tracker.call("list_artifacts", version.run_id, folder))
        except RefusedError as error:
            if error.code != NOT_FOUND:
                raise
            return False

    def files(self, version: Version, folder: str, holds: Callable[[Path], bool] = Path.is_dir) -> Path:
        """Locate a folder in the artifacts of a version's run; it is downloaded once if it is on another machine.

        Args:
            version: the version.
            folder: name of the folder in the run's artifacts.
            holds: whether a copy downloaded earlier is still valid.

        Raises:
            QAdapterError: the run was deleted.
        """
        try:
            run = self.tracker.call("get_run", version.run_id)
        except RefusedError as error:
            if error.code != NOT_FOUND:
                raise
            raise QAdapterError(
                f"The run {version.run_id} of version {version.number} of {self.name!r} is gone from MLflow at "
                f"{shown(self.tracker.uri)} (`mlflow gc` removes deleted runs), and its folder {folder!r} with it. "
                "Restore the run from a backup, or make a version the champion whose run is there (`make rollback`)."
            ) from None
        if (artifacts := local_path(run.info.artifact_uri)) is not None:
            return artifacts / folder
        place = self.tracker.downloads / "runs" / version.run_id / folder
        return downloaded(
            place, folder, lambda at: self.tracker.call("download_artifacts", version.run_id, folder, str(at)), holds
        )

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Hold the lock of the aliases while the champion is checked and the aliases are moved."""
        with held(self.lock, guards=f"the aliases of {self.name}", seconds=_LOCK_SECONDS):
            yield

    def _aliases(self) -> dict[str, int]:
        found = self.tracker.call("search_registered_models", f"name = '{self.name}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}

    def _alias(self, alias: str, number: int) -> None:
        self.tracker.call("set_registered_model_alias", self.name, alias, str(number))

    def _tag(self, number: int, key: str, value: str) -> None:
        self.tracker.call("set_model_version_tag", self.name, str(number), key, value)


def _fitting(lines: Sequence[str], room: int, rest: str) -> str:
    """As many lines as fit into `room` bytes, followed by the number of the omitted ones."""
    kept, text = len(lines), "\n".join(lines)
    while len(text.encode()) > room:
        kept -= 1
        text = "\n".join([*lines[:kept], rest.format(len(lines) - kept)])
    return text


def _fitting_metrics(metrics: Mapping[str, float]) -> str:
    """JSON of as many metrics as fit into a tag, those with the shortest paths first: means before single tasks."""
    kept: dict[str, float] = {}
    room = _TAG
    for name in sorted(metrics, key=lambda name: (name.count("/"), name)):
        room -= len(json.dumps({name: metrics[name]}))
        if room < 0:
            break
        kept[name] = metrics[name]
    return json.dumps(kept, sort_keys=True)


def _called(number: str) -> str:
    return f"version {number}" if number else "the base"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
