"""The model registry: versions with their whole story, the aliases `champion` and `previous`, and the way back.

Every step leaves a registry that serves: a version is registered with all its tags in one call, `previous` is set
before `champion`, and what a kill left undone is finished by `finish`. MLflow is reached through `tasks/tracking.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from tasks.tracking import Tracker

CHAMPION, PREVIOUS = "champion", "previous"
_PROMOTE, _REJECT = "promote", "reject"


@dataclass(frozen=True)
class Version:
    """One registered version.

    Attributes:
        number: counts from 1.
        run_id: MLflow run of the training and evaluation behind it.
        source: the model's URI.
        tags: what is recorded about it (`docs/recurring.md`).
        aliases: those that point to it now.
        created: seconds since the epoch.
        description: for people.
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
        """The gate refused it."""
        return self.tags.get("decision") == _REJECT

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured before it was registered."""
        return dict(json.loads(self.tags.get("metrics", "{}")))


@dataclass(frozen=True)
class Candidate:
    """What is to be registered.

    Attributes:
        key: names this candidate; the same one is never registered twice.
        run_id: its MLflow run.
        passed: what the gate said.
        reasons: why.
        parent: number of the version it was trained on; None for the first.
        facts: tags: digests of data and config, the base, …
        metrics: what was measured.
        config: the whole config, JSON values.
    """

    key: str
    run_id: str
    passed: bool
    reasons: list[str]
    parent: int | None
    facts: Mapping[str, str]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]

    def tags(self) -> dict[str, str]:
        """The version's tags."""
        tags = {
            "candidate": self.key,
            "decision": _PROMOTE if self.passed else _REJECT,
            "reasons": "\n".join(self.reasons),
            "parent": str(self.parent or ""),
            "metrics": json.dumps(dict(self.metrics), sort_keys=True),
            "config": json.dumps(dict(self.config), sort_keys=True),
            **self.facts,
        }
        return tags if self.passed else {**tags, "rejected": "true"}

    def description(self) -> str:
        """The version's story for people."""
        origin = f"Trained on from version {self.parent}." if self.parent else "The first candidate, from the base."
        verdict = "Promoted" if self.passed else "Rejected"
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"{verdict} by the gate. {origin}\n\n{reasons}\n"


@dataclass(frozen=True)
class Registry:
    """One registered model of an MLflow store.

    Attributes:
        tracker: the way to MLflow.
        name: of the registered model.
    """

    tracker: Tracker
    name: str

    def versions(self) -> list[Version]:
        """All versions, the oldest first; none where the model does not exist yet."""
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
        """Register a candidate with everything that is to be read about it; the aliases stay where they are.

        Args:
            candidate: what to register. One that a killed run registered already is found again.
            log_model: logs the model that is registered and returns its place; called only if needed.
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
        )
        return next(version for version in self.versions() if version.number == int(created.version))

    def promote(self, version: Version) -> None:
        """Let the aliases follow a version that passed. Repeating it after a kill changes nothing that is done."""
        if version.tags["parent"]:
            self._alias(PREVIOUS, int(version.tags["parent"]))
        self._alias(CHAMPION, version.number)
        self._tag(version.number, "promoted_at", _now())

    def finish(self) -> list[int]:
        """Promote what passed the gate in a run that was killed before it could move the alias.

        A champion that somebody has moved since then (a rollback) is left where it is.

        Returns:
            Numbers of the versions that were promoted.
        """
        finished = []
        for version in self.versions():
            if version.tags.get("decision") != _PROMOTE or {"promoted_at", "superseded_at"} & set(version.tags):
                continue
            champion = self.champion()
            standing = str(champion.number) if champion else ""
            if standing in (version.tags["parent"], str(version.number)):
                self.promote(version)
                finished.append(version.number)
            else:
                self._tag(version.number, "superseded_at", _now())
        return finished

    def roll_back(self, to: int | None = None) -> tuple[Version, Version]:
        """Make an earlier version the champion again; the champion becomes `previous`.

        Args:
            to: the version; None: the one with the alias `previous`.

        Returns:
            The champion before and the champion now.

        Raises:
            QAdapterError: there is no such version, or nothing to go back to.
        """
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
        self._alias(CHAMPION, target)
        self._alias(PREVIOUS, champion.number)
        self._tag(target, "rolled_back_to_at", f"{_now()} from version {champion.number}")
        return champion, versions[target]

    def files(self, version: Version, folder: str) -> Path:
        """A folder of the artifacts of a version's run, fetched if they are not on this machine."""
        return Path(self.tracker.call("download_artifacts", version.run_id, folder))

    def _aliases(self) -> dict[str, int]:
        found = self.tracker.call("search_registered_models", f"name = '{self.name}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}

    def _alias(self, alias: str, number: int) -> None:
        self.tracker.call("set_registered_model_alias", self.name, alias, str(number))

    def _tag(self, number: int, key: str, value: str) -> None:
        self.tracker.call("set_model_version_tag", self.name, str(number), key, value)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
