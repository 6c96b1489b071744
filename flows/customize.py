"""New preferences arrive: validate them, train the champion further, measure both, promote or reject.

python -m flows.recurring customize --config smoke
prefect deployment run customize-on-new-preferences/smoke
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State

from flows.launch import Launch, PrefectRun, launched
from qadapter.artifacts import read_json
from qadapter.customization import PREFERENCES, Customization, load_customization
from qadapter.evaluation.task_catalog import check_tasks
from qadapter.experiment import Experiment
from qadapter.preferences import sources
from tasks.candidate import (
    METHOD,
    Rows,
    champions_base,
    judge_candidate,
    register_candidate,
    registry_of,
    take_adapter,
    train_candidate,
)
from tasks.context import Customisation, workspace
from tasks.data import build_benchmarks, generate_toy_world, prepare_data
from tasks.evaluate import evaluate, measure_base_retention
from tasks.logged import StageResult
from tasks.preferences import Seen, changes_of, collect_preferences, hold_out, mix_preferences, source_files
from tasks.registry import Version
from tasks.train import Base, fine_tune_base, pretrain_base, train_adapter

Step = Callable[..., Any]


@flow(name="customize-on-new-preferences")
def customize_on_new_preferences(config: str = "smoke") -> State[Any]:
    """Look for new preferences; if there are any, train, compare with the champion, promote or reject.

    Ends as `NothingNew`, `Promoted`, `Rejected`, or, where a delivery holds nothing usable, fails as `Quarantined`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    with one_at_a_time(customization):
        registry = registry_of(customization)
        finished = registry.finish()
        seen = Seen.read(customization)
        fingerprint = fingerprint_of(customization)
        if fingerprint == seen.fingerprint:
            return _ended("NothingNew", f"nothing new in {customization.source.path}; the last time: {seen.outcome}")
        last = next(reversed(registry.versions()), None)
        if last is not None and last.tags.get("data_fingerprint") == fingerprint:
            # A run was killed between registering and remembering: this data has its version, only the end is missing.
            outcome = f"version {last.number}: {'; '.join(last.tags['reasons'].splitlines())}"
            replace(seen, fingerprint=fingerprint, ledger=last.tags["ledger"], outcome=outcome).write(customization)
            name = "Promoted" if last.number in finished else "NothingNew"
            return _ended(name, f"what a killed run had left was finished; {outcome}")
        with prepared(config, customization, "customize-on-new-preferences") as (run, step):
            name, outcome, ledger = _customize(run.experiment, step, customization, seen.ledger, fingerprint)
        known = Seen.read(customization)  # the watcher may have written meanwhile
        # Last: a run that is killed before this is done again, out of finished stages.
        replace(known, fingerprint=fingerprint, ledger=ledger, outcome=outcome).write(customization)
        return _ended(name, outcome)


def _ended(name: str, message: str) -> State[Any]:
    if name == "Quarantined":
        get_run_logger().error("%s: %s", name, message)
        return Failed(name=name, message=message)
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})


def _customize(
    x: Experiment, step: Step, customization: Customization, previous: str, fingerprint: str
) -> tuple[str, str, str]:
    """Name and sentence of the outcome, and the ledger's folder."""
    registry = registry_of(customization)
    world = step(generate_toy_world) if x.toy_world else None
    ledger = step(collect_preferences, customization=customization, previous=previous, world=world)
    changes = changes_of(ledger)
    place = str(ledger.path)
    if changes.fresh_pairs == 0:
        if changes.fresh_quarantined:
            return "Quarantined", _complaint(customization, ledger), place
        return "NothingNew", changes.text(), place
    champion = registry.champion()
    mixture = step(mix_preferences, customization=customization, ledger=ledger, world=world, first=champion is None)
    if read_json(mixture.path / "summary.json")["fresh_pairs"] == 0:
        return "NothingNew", f"{changes.text()}; all of them are held out", place
    ground = lay_ground(x, step, world, champion, customization.model_name)
    heldout = step(hold_out, mixture=mixture)
    cell = Customisation(customization.domain, METHOD, customization.seed)
    measure = measuring(step, ground, heldout, world)
    base_row = measure(Customisation(customization.domain, "base"), None, None)
    champion_row = champion_adapter = None
    if champion is not None:
        champion_adapter = fetch(step, customization, champion)
        champion_row = measure(cell, champion_adapter, base_row)
        trained = step(train_candidate, cell=cell, base=ground.base, data=mixture, champion=champion_adapter)
    else:
        trained = step(train_adapter, cell=cell, base=ground.base, data=mixture, answers=None)
    adapter = step(take_adapter, label="candidate", folder=trained.path / "adapter", run_id=trained.run_id)
    rows = Rows(measure(cell, adapter, base_row), champion_row, base_row)
    parent = champion.number if champion else None
    decision = step(judge_candidate, customization=customization, rows=rows, parent=parent)
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
    if decision.passed:
        registry.promote(version)
    name = "Promoted" if decision.passed else "Rejected"
    return name, f"version {version.number}, {changes.text()}: " + "; ".join(decision.reasons), place


def _complaint(customization: Customization, ledger: StageResult) -> str:
    """What is wrong with a delivery of which nothing can be used, and what to do."""
    changes = changes_of(ledger)
    reasons = "; ".join(f"{reason}: {count}" for reason, count in changes.fresh_quarantined.items())
    files = "".join(f"\n  {name}: {reason}" for name, reason in changes.refused_files.items())
    return (
        f"nothing of what is new in {customization.source.path} can be used ({reasons}), so nothing was trained and "
        f"the champion stays. Correct or remove it; line by line: {ledger.path / 'quarantine.jsonl'}{files}"
    )


# ---- shared with the other flows of a customisation


def fingerprint_of(customization: Customization) -> str:
    """sha256 over the source's files as they are now."""
    data = Path(customization.data).expanduser().resolve() if customization.data else None
    return sources.fingerprint(source_files(customization.source, data))


@contextmanager
def one_at_a_time(customization: Customization) -> Iterator[None]:
    """Runs of one customisation follow each other, however they were started; a lock of a dead process is free."""
    file = workspace() / ".qadapter" / "customize" / f"{customization.model_name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, poll_interval=0.2)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        get_run_logger().info("another run of %s is at work; waiting for it", customization.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _CustomizationLaunch(Launch):
    """A launch of the reduced experiment: the growing source is looked at by its own stages."""

    customization: Customization | None = None

    def check(self, *, remote: bool = True) -> Experiment:
        """The experiment; tasks that do not exist are refused here."""
        assert self.customization is not None
        experiment = self.customization.experiment()
        check_tasks(experiment.evaluation.retention.tasks)
        return experiment


@contextmanager
def prepared(config: str, customization: Customization, flow_name: str) -> Iterator[tuple[PrefectRun, Step]]:
    """A run of stages and the way to take one step: submit a task, wait for it, hand on its result."""
    launch = _CustomizationLaunch(flow_name, config, customization.data, {}, customization)
    with launched(launch) as run:

        def step(task: Any, **inputs: Any) -> Any:
            return run.result(run(task, **inputs))

        yield run, step


@dataclass(frozen=True)
class Ground:
    """What candidate and champion stand on: their base, its own retention, what it is measured with."""

    base: Base
    base_retention: StageResult
    old_texts: StageResult | None
    benchmarks: StageResult | None


def lay_ground(
    x: Experiment, step: Step, world: StageResult | None, champion: Version | None, model_name: str
) -> Ground:
    """Base and benchmarks, as the full experiment makes them (found, unless something changed)."""
    data = {name: step(prepare_data, source=name, world=world) for name in x.sources if name != PREFERENCES}
    built = step(build_benchmarks, data=data, world=world) if x.built_benchmarks else None
    (domain,) = x.domains.values()
    base = step(pretrain_base, data=data, world=world, built=built)
    if domain.base == "helpful":
        assert x.helpful_sft is not None
        base = step(fine_tune_base, base=base, data=data[x.helpful_sft.source])
    base = champions_base(base, champion, x.model, model_name)
    old_texts = data[x.helpful_sft.source] if x.helpful_sft else None
    benchmarks = built or world
    kept = step(measure_base_retention, name=base.name, base=base, old_texts=old_texts, benchmarks=benchmarks)
    return Ground(base, kept, old_texts, benchmarks)


def measuring(step: Step, ground: Ground, heldout: StageResult, world: StageResult | None) -> Step:
    """How one policy is measured: called with its cell, its adapter (None: the base) and the base's row."""

    def measure(cell: Customisation, adapter: StageResult | None, base_row: Any) -> Any:
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
    from tasks.served_model import find_served_model

    folder = find_served_model(f"{customization.model_name}/{version.number}").adapter
    adapter: StageResult = step(take_adapter, label=f"version {version.number}", folder=folder, run_id=None)
    return adapter
