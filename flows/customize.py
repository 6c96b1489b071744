"""Process new preferences: validate them, train the champion further, measure both, promote or reject.

qadapter customize --config smoke
prefect deployment run customize-on-new-preferences/smoke
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import State

from flows.prefect_host.waiting_runs import join_waiting_runs
from flows.running.outcomes import ended
from flows.running.prefect_run import PrefectRun, checked_run, close_abandoned
from flows.running.run_request import RunRequest, check_workspace
from qadapter.config.customization import PREFERENCES, Customization, load_customization
from qadapter.config.experiment import Experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json
from qadapter.files.locks import private_lock
from qadapter.files.shown import shown
from qadapter.preferences import sources
from qadapter.preferences.ledger import Changes
from qadapter.preferences.mixture import unlearnt
from tasks.candidate import (
    METHOD,
    Rows,
    champions_adapter,
    champions_base,
    config_of,
    digest_of,
    judge_candidate,
    learnt_by,
    refuse_other_division,
    register_candidate,
    registry_of,
    take_adapter,
    train_candidate,
)
from tasks.curve import measure_curve
from tasks.data import build_benchmarks, generate_toy_world, prepare_data
from tasks.dialled import dial_candidate
from tasks.evaluate import evaluate, measure_base_retention
from tasks.new_rows import look_at_new_rows
from tasks.preferences import (
    Seen,
    changes_of,
    collect_preferences,
    delivered,
    heldout_files,
    hold_out,
    mix_preferences,
)
from tasks.quality import measure_quality
from tasks.stages.context import Cell, workspace
from tasks.stages.stage_run import StageResult
from tasks.tracking.registry import Registry, Version
from tasks.tracking.tracker import Tracker
from tasks.train import Base, fine_tune_base, pretrain_base, train_adapter

Step = Callable[..., Any]
NAME = "customize-on-new-preferences"


@flow(name=NAME)
def customize_on_new_preferences(config: str = "smoke", force: bool = False) -> State[Any]:
    """Look for new preferences; if there are any, train, compare with the champion, promote or reject.

    Changed held-out pairs or a changed config count as new preferences. A source without data files has nothing new.
    Ends as `NothingNew`, `Promoted`, `Rejected`, `Superseded` (it passed, but the champion was moved in the meantime),
    or fails as `Quarantined` if a delivery contains nothing usable.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
        force: train and judge even if nothing is new.
    """
    customization = load_customization(config)
    check_workspace(workspace())
    close_abandoned(Tracker.for_project(workspace()), NAME)
    if force or fingerprint_of(customization) != Seen.read(customization).fingerprint:
        request_of(config, customization, NAME).check()  # what cannot work need not wait for another run's end
    with one_at_a_time(customization):
        asked_until = datetime.now(UTC)  # after the wait for the lock
        customization = read_again(config, customization)
        state = _look(config, customization, force)
        for name in join_waiting_runs({"config": config, "force": False}, asked_until, str(state.name)):
            get_run_logger().info("%s was requested before this run read the data, so it has nothing left to do", name)
        return state


def _look(config: str, customization: Customization, force: bool) -> State[Any]:
    """The work of one run, while no other run of this customization is in progress."""
    registry = registry_of(customization)
    finished = registry.finish()
    left = _remember_what_was_killed(customization, registry)
    try:
        fingerprint = _fingerprint(customization)
    except sources.NoDataError as error:
        if force:
            raise
        return _nothing(customization, left, finished, f"no data file in {_shown_source(customization)} now: {error}")
    # Under the lock, so that the state that the watcher sees is that of this run.
    seen = Seen.update(customization, started=fingerprint, started_at=time.time())
    if fingerprint == seen.fingerprint and not force:
        what = f"nothing new in {_shown_source(customization)}; the last time: {seen.outcome}"
        return _nothing(customization, left, finished, what)
    with prepared(config, customization, NAME) as (run, step):
        name, outcome, ledger = _customize(run.experiment, step, customization, seen.ledger, fingerprint, force)
    # Last, so that a run killed earlier is repeated, from finished stages.
    versions = registry.versions()
    version = versions[-1].number if versions else 0
    Seen.update(customization, fingerprint=fingerprint, ledger=ledger, outcome=outcome, version=version)
    return ended(name, outcome)


def _nothing(customization: Customization, left: Version | None, finished: list[int], what: str) -> State[Any]:
    """The outcome if there is nothing to train: nothing new, or the completed work of a killed run."""
    if left is None:
        return ended("NothingNew", what)
    name = "Promoted" if left.number in finished else "NothingNew"
    return ended(name, f"what a killed run had left was finished; {Seen.read(customization).outcome}")


def _remember_what_was_killed(customization: Customization, registry: Registry) -> Version | None:
    """Restore the progress of a run that was killed after registering its version, from the version's tags.

    Versions registered by hand have no such tags and are ignored.
    """
    last = next((version for version in reversed(registry.versions()) if "candidate" in version.tags), None)
    if last is None or last.number <= Seen.read(customization).version:
        return None
    Seen.update(
        customization,
        fingerprint=last.tags["data_fingerprint"],
        ledger=last.tags["ledger"],
        outcome=f"version {last.number}: {'; '.join(last.tags['reasons'].splitlines())}",
        version=last.number,
    )
    return last


def _customize(
    experiment: Experiment, step: Step, customization: Customization, previous: str, fingerprint: str, force: bool
) -> tuple[str, str, str]:
    """The outcome's name and sentence, and the ledger's folder."""
    registry = registry_of(customization)
    world = step(generate_toy_world) if experiment.toy_world else None
    ledger = step(collect_preferences, customization=customization, previous=previous, world=world)
    changes = changes_of(ledger)
    place = str(ledger.path)
    champion = registry.champion()
    refuse_other_division(champion, customization)
    learnt = learnt_by(champion, registry)
    # Compared with the champion, not with the last run: the champion has not learnt a rejected candidate's data.
    waiting = unlearnt(ledger.path, learnt)
    broken = bool(changes.fresh_quarantined) and not changes.fresh_pairs
    if not force and (waiting == 0 or (broken and not changes.removed)):
        if broken:
            return "Quarantined", _complaint(customization, ledger), place
        known = "" if champion is None else f"; version {champion.number} has learnt all of them"
        return "NothingNew", changes.text() + known, place
    mixture = step(
        mix_preferences,
        customization=customization,
        ledger=ledger,
        learnt=learnt,
        world=world,
        everything=champion is None or waiting == 0 or customization.start == "base",
    )
    step(measure_quality, source=PREFERENCES, data=mixture, benchmarks=world)
    if not force and read_json(mixture.path / "summary.json")["fresh_pairs"] == 0:
        limit = customization.source.max_train_pairs
        where = f" or beyond source.max_train_pairs ({limit})" if limit else ""
        return "NothingNew", f"{changes.text()}; all of them are held out{where}", place
    ground = lay_ground(experiment, step, world, champion, customization.model_name)
    heldout = step(hold_out, mixture=mixture)
    cell = Cell(customization.domain, METHOD, customization.seed)
    measure = measuring(step, ground, heldout, world)
    base_row = measure(Cell(customization.domain, "base"), None, None)
    champion_row = champion_adapter = None
    if champion is not None:
        champion_adapter = fetch(step, customization, champion)
        champion_row = measure(cell, champion_adapter, base_row)
    trained = train(step, customization, cell, ground.base, mixture, champion_adapter)
    adapter = step(take_adapter, label="candidate", folder=trained.path / "adapter", run_id=trained.run_id)
    rows = Rows(measure(cell, adapter, base_row), champion_row, base_row)
    if customization.budget is not None:
        curve = step(
            measure_curve,
            cell=cell,
            row=rows.candidate,
            base=ground.base,
            base_row=base_row,
            data=heldout,
            benchmarks=ground.benchmarks,
            world=world,
            old_texts=ground.old_texts,
        )
        dialled = step(dial_candidate, curve=curve, adapter=adapter, heldout=heldout, budget=customization.budget)
        adapter = step(
            take_adapter, label="dialled candidate", folder=dialled.stage.path / "adapter", run_id=trained.run_id
        )
        rows = Rows(measure(cell, adapter, base_row), champion_row, base_row, rows.candidate, dialled)
    parent = champion.number if champion else None
    new_rows = None
    if read_json(mixture.path / "summary.json")["fresh_pairs"]:
        new_rows = step(
            look_at_new_rows,
            base=ground.base,
            candidate=adapter,
            champion=champion_adapter,
            champion_row=champion_row,
            mixture=mixture,
        )
    decision = step(judge_candidate, customization=customization, rows=rows, parent=parent, new_rows=new_rows)
    version = step(
        register_candidate,
        customization=customization,
        decision=decision,
        rows=rows,
        base=ground.base,
        adapter=adapter,
        mixture=mixture,
        ledger=ledger,
        fingerprint=fingerprint,
        parent=parent,
    )
    outcome = f"version {version.number}, {_trained_on(changes, waiting)}: " + "; ".join(decision.reasons)
    if not decision.passed:
        return "Rejected", outcome, place
    if left_alone := registry.promote(version):
        return "Superseded", f"{left_alone}; {outcome}", place
    return "Promoted", outcome, place


def train(
    step: Step,
    customization: Customization,
    cell: Cell,
    base: Base,
    mixture: StageResult,
    champion: StageResult | None,
) -> Any:
    """Train a candidate: the champion's adapter further, or a new one where there is none or the config wants that."""
    if champion is None or customization.start == "base":
        return step(train_adapter, cell=cell, base=base, data=mixture, needs={})
    return step(train_candidate, cell=cell, base=base, data=mixture, champion=champion)


def _trained_on(changes: Changes, waiting: int) -> str:
    """What is new; where nothing was delivered since the last run, what was trained on all the same."""
    if changes.new or changes.changed or changes.removed:
        return changes.text()
    if waiting:
        return f"no delivery since the last run; {waiting} pairs of earlier ones that the champion has not learnt"
    return "no delivery since the last run; trained on all known pairs once more"


def _complaint(customization: Customization, ledger: StageResult) -> str:
    """The message about a delivery without any usable record: the reasons, and what to do."""
    changes = changes_of(ledger)
    reasons = "; ".join(f"{reason}: {count}" for reason, count in changes.fresh_quarantined.items())
    files = "".join(f"\n  {name}: {reason}" for name, reason in changes.refused_files.items())
    return (
        f"no new record in {_shown_source(customization)} is usable ({reasons}), so nothing was trained and the "
        f"champion stays. Correct or remove them; each record: {ledger.path / 'quarantine.jsonl'}{files}"
    )


# ---- shared with the other flows of a customization


def fingerprint_of(customization: Customization) -> str:
    """sha256 of what determines the outcome: the current files of the source, the held-out files, and the config.

    If the source has no data file, nothing is new: the fingerprint is that of the last run.
    """
    try:
        return _fingerprint(customization)
    except sources.NoDataError as error:
        get_run_logger().warning("no data file in %s now: %s", _shown_source(customization), error)
        return Seen.read(customization).fingerprint


def _fingerprint(customization: Customization) -> str:
    """As `fingerprint_of`.

    Raises:
        NoDataError: the source has no data file.
        QAdapterError: the source, the held-out files or the profile cannot be read.
    """
    data = Path(customization.data).expanduser().resolve() if customization.data else None
    source, experiment = customization.source, customization.experiment()

    def made(path: str | None) -> bool:
        """Whether the toy world generates the path's data, which then follow from the config."""
        return experiment.toy_world is not None and "{data}" in (path or "")

    now = {"files": "the toy world"} if made(source.path) else delivered(source, data).digests()
    held = None if made(source.heldout_path or source.path) else heldout_files(source, data)
    return digest_of(
        {
            "source": now.pop("files"),
            **now,
            "heldout": sources.fingerprint(held) if held else None,
            "config": config_of(customization, experiment),
        }
    )


def _shown_source(customization: Customization) -> str:
    return shown(customization.source.path)


def _lock(customization: Customization, what: str) -> FileLock:
    file = workspace() / ".qadapter" / what / f"{customization.model_name}.lock"
    return private_lock(file, poll_interval=0.2)


def at_work(customization: Customization) -> bool:
    """Whether a run of this customization is in progress on this machine."""
    try:
        with _lock(customization, "customize").acquire(timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def one_at_a_time(customization: Customization, what: str = "customize") -> Iterator[None]:
    """Serialize the runs of one customization, however they were started. The lock of a dead process is free.

    Args:
        customization: the customization.
        what: the kind of runs.
    """
    lock = _lock(customization, what)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        get_run_logger().info("another run of %s is in progress; waiting for it", customization.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_again(config: str, before: Customization) -> Customization:
    """The customization as it is after a wait for another run, which may have taken hours.

    A run that was requested meanwhile, for an edited config, is joined: it has to be that config that was worked with.

    Raises:
        QAdapterError: it names another model, whose lock is not held.
    """
    now = load_customization(config)
    if now.model_name != before.model_name:
        raise QAdapterError(
            f"While this run waited, {config} was given another model_name, {now.model_name!r} instead of "
            f"{before.model_name!r}. Start the run again."
        )
    return now


@dataclass(frozen=True)
class _CustomizationRequest(RunRequest):
    """A run of the reduced experiment, whose growing source is checked by its own stages."""

    customization: Customization | None = None

    def load(self) -> Experiment:
        assert self.customization is not None
        return self.customization.experiment()

    def rows_to_judge(self, experiment: Experiment) -> int:
        """Candidate and champion. A check judges the champion only, with the share it had at registration."""
        return 2 * super().rows_to_judge(experiment)

    def fixed_sources(self, experiment: Experiment) -> dict[str, Source]:
        """All sources except the growing one."""
        return {name: source for name, source in experiment.sources.items() if name != PREFERENCES}


def request_of(config: str, customization: Customization, flow_name: str) -> RunRequest:
    """The run that a flow of a customization asks for."""
    return _CustomizationRequest(flow_name, config, customization.data, {}, customization)


@contextmanager
def prepared(config: str, customization: Customization, flow_name: str) -> Iterator[tuple[PrefectRun, Step]]:
    """A run of stages, and a function that submits one task, waits for it, and returns its result."""
    with checked_run(request_of(config, customization, flow_name)) as run:

        def step(task: Any, **inputs: Any) -> Any:
            return run.result(run(task, **inputs))

        yield run, step


@dataclass(frozen=True)
class Ground:
    """What candidate and champion share: their base, its retention, and the data of the measurements."""

    base: Base
    base_retention: StageResult
    old_texts: StageResult | None
    benchmarks: StageResult | None


def lay_ground(
    experiment: Experiment, step: Step, world: StageResult | None, champion: Version | None, model_name: str
) -> Ground:
    """Make base and benchmarks as in the full experiment; they are found in the store unless something changed."""
    data = {name: step(prepare_data, source=name, world=world) for name in experiment.sources if name != PREFERENCES}
    built = step(build_benchmarks, data=data, world=world) if experiment.built_benchmarks else None
    (domain,) = experiment.domains.values()
    base = step(pretrain_base, data=data, world=world, built=built)
    if domain.base == "helpful":
        assert experiment.helpful_sft is not None
        base = step(fine_tune_base, base=base, data=data[experiment.helpful_sft.source])
    base = champions_base(base, champion, experiment.model, model_name)
    old_texts = data[experiment.helpful_sft.source] if experiment.helpful_sft else None
    benchmarks = built or world
    kept = step(measure_base_retention, name=base.name, base=base, old_texts=old_texts, benchmarks=benchmarks)
    return Ground(base, kept, old_texts, benchmarks)


def measuring(step: Step, ground: Ground, heldout: StageResult, world: StageResult | None) -> Step:
    """A function that measures one policy, given its cell, its adapter (None: the base) and the base's row."""

    def measure(cell: Cell, adapter: StageResult | None, base_row: Any) -> Any:
        return step(
            evaluate,
            cell=cell,
            base=ground.base,
            trained=adapter,
            base_row=base_row,
            data=heldout,
            base_retention=ground.base_retention,
            old_texts=ground.old_texts,
            benchmarks=ground.benchmarks,
            world=world,
            judge=None,
        )

    return measure


def fetch(step: Step, customization: Customization, version: Version) -> StageResult:
    """A version's adapter, from the registered files."""
    folder = champions_adapter(version, customization.model_name)
    adapter: StageResult = step(take_adapter, label=f"version {version.number}", folder=folder, run_id=None)
    return adapter
