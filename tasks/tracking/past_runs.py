"""Past runs in MLflow as the rows of a report: their metrics and the files behind them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json
from qadapter.files.shown import shown, visible
from qadapter.report.items import SCORE
from qadapter.report.rows import SETTING, Row, kind
from tasks.tracking.tracker import Tracker

# The artifacts of each stage that the report reads.
_FILES = {
    "train": ("history.jsonl",),
    "adaptation": ("pairs.jsonl", "answers.jsonl"),
    "retention": ("items.jsonl", "directions.json", "old_answers.jsonl"),
    "prepare": ("summary.json",),
}
_OF_ALL_DOMAINS = ("training.", "lora.", "model.")
"""How the settings begin, besides those of the method, that a flow run's domains have in common."""
_DIGESTS = ("digest.train", "digest.adaptation", "digest.retention")


@dataclass(frozen=True)
class PastRuns:
    """The content of a report on past runs.

    Attributes:
        rows: one per policy. A method that several flow runs trained differently is called `dpo (<flow run>)`.
        data: source → its `summary.json`.
        config: the parameters that all flow runs share, and each flow run's own.
    """

    rows: list[Row]
    data: dict[str, dict[str, Any]]
    config: dict[str, Any]


@dataclass
class _FlowRun:
    """The selected runs of one flow run: cell → MLflow run."""

    label: str
    parent: Any
    children: list[Any]
    cells: dict[tuple[str, str, int | None], Any] = field(default_factory=dict)

    def add(self, run: Any) -> None:
        """Select a run, together with the base's run of its domain."""
        self.cells[_cell(run)] = run
        for other in self.children:
            if _is_measured(other) and _cell(other)[:2] == (_cell(run)[0], "base"):
                self.cells.setdefault(_cell(other), other)


def read_runs(tracker: Tracker, names: Sequence[str], folder: Path) -> PastRuns:
    """Collect runs for a report.

    Args:
        tracker: the tracker of the MLflow store.
        names: ids or names of whole flow runs, or of runs of one domain and method (their base is added).
        folder: target folder for the files behind the metrics.

    Raises:
        QAdapterError: a run is unknown, its name is ambiguous, or it has no measurements.
    """
    flow_runs: dict[str, _FlowRun] = {}
    for name in names:
        run = find_run(tracker, name)
        parent_id = run.data.tags.get("mlflow.parentRunId", run.info.run_id)
        if parent_id not in flow_runs:
            parent = run if parent_id == run.info.run_id else find_run(tracker, parent_id)
            flow_runs[parent_id] = _FlowRun(_label(parent, flow_runs), parent, _children(tracker, parent))
        chosen = flow_runs[parent_id]
        runs = [r for r in chosen.children if _is_measured(r)] if run.info.run_id == parent_id else [run]
        if not runs or not all(_is_measured(r) for r in runs):
            raise QAdapterError(
                f"the run {name!r} ({run.info.run_name}, {run.info.status}) has no {SCORE} to compare; give the id or "
                "name of a finished flow run, or of a run of one domain and method such as `academy · dpo · seed 0`"
            )
        for one in runs:
            chosen.add(one)
    labelled = _labelled(list(flow_runs.values()))
    rows: dict[tuple[str, str, int | None], Row] = {}
    for flow_run in flow_runs.values():
        for (domain, method, seed), run in flow_run.cells.items():
            name = f"{method} ({flow_run.label})" if method in labelled else method
            if (domain, name, seed) not in rows:  # otherwise two flow runs share the stages of this cell
                row = _row(tracker, flow_run, (domain, method, seed), run, folder / run.info.run_id)
                rows[domain, name, seed] = replace(row, method=name)
    data: dict[str, dict[str, Any]] = {}
    for flow_run in flow_runs.values():
        for source, summary in _summaries(tracker, flow_run, folder).items():
            known = data.setdefault(source, summary)
            if known != summary:
                data[f"{source} ({flow_run.label})"] = summary
    return PastRuns(list(rows.values()), data, _config(list(flow_runs.values())))


def find_run(tracker: Tracker, name: str) -> Any:
    """Find a run by its id or its name, in any experiment of the store.

    Raises:
        QAdapterError: there is no such run, or several have that name.
    """
    experiments = [experiment.experiment_id for experiment in tracker.call("search_experiments")]
    quote = '"' if "'" in name else "'"
    for attribute in ("run_id", "run_name") if not {"'", '"'} <= set(name) else ():  # MLflow has no escapes
        found = tracker.call("search_runs", experiments, f"attributes.{attribute} = {quote}{name}{quote}")
        if len(found) > 1:
            ids = ", ".join(run.info.run_id for run in found[:5])
            raise QAdapterError(f"{len(found)} runs are called {name!r}; give an id instead: {ids}")
        if found:
            return found[0]
    newest = tracker.call("search_runs", experiments, "tags.stage = 'parent'", max_results=5)
    known = "; the newest flow runs are " + ", ".join(f"{r.info.run_name!r} ({r.info.run_id})" for r in newest)
    raise QAdapterError(f"no run has the id or name {name!r} at {shown(tracker.uri)}{known if newest else ''}")


def _children(tracker: Tracker, parent: Any) -> list[Any]:
    """All child runs of a flow run, by start time."""
    experiment, token, found = [parent.info.experiment_id], None, []
    condition = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    while True:
        page = tracker.call("search_runs", experiment, condition, order_by=["start_time ASC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _is_measured(run: Any) -> bool:
    return {"domain", "method", "seed"} <= run.data.tags.keys() and SCORE in run.data.metrics


def _cell(run: Any) -> tuple[str, str, int | None]:
    """Domain, method and seed; a sweep's variant counts as a method: `dpo · β=1`, `q-adapter · residual β=0.1`."""
    tags = run.data.tags
    method, variant = tags["method"], tags.get("variant", "").removeprefix(tags["method"]).strip()
    method = f"{method}{SETTING}{variant}" if variant else method
    return tags["domain"], method, None if tags["seed"] == "None" else int(tags["seed"])


def _label(parent: Any, others: Mapping[str, _FlowRun]) -> str:
    """A flow run's short name: `lazy-fox` of `smoke · lazy-fox`, with part of its id if the name is taken."""
    label = visible(str(parent.info.run_name), keep="").rpartition(" · ")[2]
    label = re.sub(r"[()|`*<>\[\]]", "", label)  # characters with a meaning in Markdown, HTML or our labels
    taken = {flow_run.label for flow_run in others.values()}
    return f"{label} {parent.info.run_id[:6]}" if label in taken else label


def _labelled(flow_runs: Sequence[_FlowRun]) -> set[str]:
    """Methods that differ between flow runs, in some cell or in their settings; all methods if the bases differ."""
    contents = defaultdict(set)
    for flow_run in flow_runs:
        for cell, run in flow_run.cells.items():
            digests = tuple(run.data.tags.get(name) for name in _DIGESTS)
            contents[cell].add(digests if any(digests) else run.info.run_id)
    methods = {cell[1] for cell, found in contents.items() if len(found) > 1} | _set_otherwise(flow_runs)
    return {cell[1] for cell in contents} if "base" in methods else methods


def _set_otherwise(flow_runs: Sequence[_FlowRun]) -> set[str]:
    """Methods of which two flow runs ran other seeds or other domains with other settings: no cell shows that these are
    two methods."""
    found = set()
    for one, other in combinations(flow_runs, 2):
        mine, theirs = _by_row(one), _by_row(other)
        for row, again in product(mine, theirs):
            if row[1] != again[1] or row[1] == "base":
                continue
            elsewhere = row != again
            if elsewhere or mine[row].keys().isdisjoint(theirs[again]):
                set_so = _settings(one, row[1], mine[row], elsewhere=elsewhere)
                if set_so != _settings(other, row[1], theirs[again], elsewhere=elsewhere):
                    found.add(row[1])
    return found


def _by_row(flow_run: _FlowRun) -> dict[tuple[str, str], dict[int | None, Any]]:
    """Domain and method → seed → run."""
    found: dict[tuple[str, str], dict[int | None, Any]] = defaultdict(dict)
    for (domain, method, seed), run in flow_run.cells.items():
        found[domain, method][seed] = run
    return found


def _settings(flow_run: _FlowRun, method: str, runs: Mapping[int | None, Any], *, elsewhere: bool) -> dict[str, str]:
    """What a method was trained and measured with, whatever its seed.

    Args:
        flow_run: whose.
        method: its name.
        runs: its runs, in one domain.
        elsewhere: to be compared with another domain: only the settings that no domain changes.
    """
    trained = {k: v for k, v in next(iter(runs.values())).data.params.items() if k != "seed"}
    if elsewhere:
        shared = (*_OF_ALL_DOMAINS, f"{kind(method)}.")
        trained = {k: v for k, v in trained.items() if k.startswith(shared) and k != "training.epochs"}
    measured = {k: v for k, v in flow_run.parent.data.params.items() if k.startswith("evaluation.")}
    return trained | measured


def _row(tracker: Tracker, flow_run: _FlowRun, cell: tuple[str, str, int | None], run: Any, folder: Path) -> Row:
    """A run's metrics and files. The base's retention is in a separate run, which all its rows share."""
    places = {s: _fetch(tracker, run.info.run_id, s, folder) for s in ("train", "adaptation", "retention")}
    if places["retention"] is None:
        wanted = f"retention · {run.data.params.get('base')} base"
        kept = [other for other in flow_run.children if other.info.run_name == wanted]
        if cell[1] == "base" and kept:
            places["retention"] = _fetch(tracker, kept[0].info.run_id, "retention", folder)
    return Row(*cell, dict(run.data.metrics), places["train"], places["adaptation"], places["retention"])


def _fetch(tracker: Tracker, run_id: str, stage: str, folder: Path) -> Path | None:
    """Copy the artifacts of a stage that the report reads; None if there are none."""
    there = {entry.path for entry in tracker.call("list_artifacts", run_id, stage)}
    place = folder / stage
    place.mkdir(parents=True, exist_ok=True)
    for name in (name for name in _FILES[stage] if f"{stage}/{name}" in there):
        tracker.call("download_artifacts", run_id, f"{stage}/{name}", str(place))
    return place if any(place.iterdir()) else None


def _summaries(tracker: Tracker, flow_run: _FlowRun, folder: Path) -> dict[str, dict[str, Any]]:
    """The counts of the flow run's data stages."""
    found = {}
    for run in flow_run.children:
        if run.data.tags.get("stage") == "prepare":
            place = _fetch(tracker, run.info.run_id, "prepare", folder / run.info.run_id)
            if place is not None:
                found[str(run.info.run_name).removeprefix("prepare · ")] = read_json(place / "summary.json")
    return found


def _config(flow_runs: Sequence[_FlowRun]) -> dict[str, Any]:
    """Parameters of the flow runs: the shared ones, and each run's own."""
    everything = [flow_run.parent.data.params for flow_run in flow_runs]
    shared = {k: v for k, v in sorted(everything[0].items()) if all(params.get(k) == v for params in everything)}
    runs = {
        f"{flow_run.label} {flow_run.parent.info.run_id}": {
            k: v for k, v in sorted(flow_run.parent.data.params.items()) if k not in shared
        }
        for flow_run in flow_runs
    }
    return {"runs": runs, "shared": shared}
