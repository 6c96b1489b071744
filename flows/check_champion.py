"""Regression monitoring: measure the champion again, from the registry's own files, and raise an event if it fell.

prefect deployment run check-champion/smoke
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.states import State

from flows.customize import (
    Ground,
    Step,
    fetch,
    lay_ground,
    measuring,
    one_at_a_time,
    prepared,
    read_again,
    request_of,
)
from flows.running.outcomes import ended
from flows.running.prefect_run import close_abandoned
from flows.running.run_request import check_workspace
from flows.watch_preferences import emit
from qadapter.config.customization import PREFERENCES, Customization, load_customization
from qadapter.gate.measured import Measured
from qadapter.gate.watch import beyond_budget, fallen
from qadapter.serving.registered import DamagedError
from tasks.candidate import METHOD, learnt_by, measured, refuse_other_division, registry_of, take_adapter
from tasks.curve import measure_curve
from tasks.data import generate_toy_world
from tasks.dialled import dial_candidate
from tasks.evaluate import Evaluation
from tasks.preferences import Seen, collect_preferences, hold_out, mix_preferences, read_heldout
from tasks.quality import measure_quality
from tasks.stages.context import Cell, workspace
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageStore
from tasks.tracking.registry import Registry, Version
from tasks.tracking.tracker import Tracker
from tasks.turned_down import TurnedDown, register_turned_down

NAME = "check-champion"
FELL = "qadapter.champion.fell"
TURNED_DOWN = "qadapter.champion.turned-down"


@flow(name=NAME)
def check_champion(config: str = "smoke") -> State[Any]:
    """Measure the champion on today's held-out preferences and the retention tasks; nothing is trained or promoted.

    The result is compared with the measurements at registration. A drop on new held-out rows shows that the preferences
    changed; a drop on the same rows, that files, libraries or the machine changed. A champion with damaged files counts
    as fallen and is not measured. With a budget in the config it also counts as fallen if it forgot more than that
    beyond noise. Ends as `NoChampion` or `Steady`, or fails as `Fell`, with the event `qadapter.champion.fell`.

    With `turn_down` a champion beyond its budget is registered again with a smaller dial that stays within the budget,
    and that version is promoted: the check ends as `TurnedDown`, with the event `qadapter.champion.turned-down`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    check_workspace(workspace())
    close_abandoned(Tracker.for_project(workspace()), NAME)
    registry = registry_of(customization)
    if registry.champion() is None:
        return ended("NoChampion", f"the registered model {customization.model_name!r} has no champion to check")
    request_of(config, customization, NAME).check()
    with one_at_a_time(customization, "checks"):  # each removes what the one before measured
        customization = read_again(config, customization)
        champion = registry.champion()
        assert champion is not None  # an alias may move, but is never removed
        damage = _damage(customization, champion)
        found = Checked(damage) if damage else _what_fell(config, customization, registry, champion)
    if not found.reasons:
        return ended("Steady", f"version {champion.number} of {customization.model_name} is as good as it was")
    message = f"version {champion.number} of {customization.model_name}: " + "; ".join(found.reasons)
    resource, payload = f"qadapter.model.{customization.model_name}", {"version": champion.number}
    if found.instead is None:
        emit(FELL, resource, {**payload, "reasons": found.reasons})
        return ended("Fell", message)
    new = found.instead
    emit(TURNED_DOWN, resource, {**payload, "reasons": found.reasons, "now": new.number, "dial": new.tags["dial"]})
    return ended("TurnedDown", f"{message}; version {new.number}, {new.tags['dial']}, is the champion now")


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        reasons: what the champion does worse, and what was done about it; empty where nothing is.
        instead: the version with a smaller dial that is the champion now.
    """

    reasons: list[str]
    instead: Version | None = None


def _damage(customization: Customization, champion: Version) -> list[str]:
    """Problems of the registered files. Training may fall back to a stage with the same files; serving cannot."""
    from tasks.tracking.models import check_files

    try:
        check_files(f"{customization.model_name}/{champion.number}")
    except DamagedError as error:
        return [str(error)]
    return []


def _what_fell(config: str, customization: Customization, registry: Registry, champion: Version) -> Checked:
    checks = workspace() / ".qadapter" / "checks" / customization.model_name
    shutil.rmtree(checks, ignore_errors=True)  # of a check that was killed
    with prepared(config, customization, NAME) as (run, step):
        x = run.experiment
        world = step(generate_toy_world) if x.toy_world else None
        heldout = _heldout(step, customization, registry, champion, world)
        ground = lay_ground(x, step, world, champion, customization.model_name)
        adapter = fetch(step, customization, champion)
        base_row = measuring(step, ground, heldout, world)(Cell(customization.domain, "base"), None, None)

        # Cached measurements would make the check pointless, so the champion is always measured anew: what other
        # machines measured is not looked for either.
        fresh = run.storing_in(StageStore(checks, remote=None))

        def again(task: Any, **inputs: Any) -> Any:
            return fresh.result(fresh(task, **inputs))

        cell = Cell(customization.domain, METHOD, customization.seed)
        row = measuring(again, ground, heldout, world)(cell, adapter, base_row)
        now = measured(row)
        then = Measured.read(registry.files(champion, "adaptation"), registry.files(champion, "retention"))
        reasons = fallen(then, now, customization.gate)
        budget = customization.budget
        over = beyond_budget(now, measured(base_row), budget, customization.gate) if budget else []
        found = Checked([*over, *reasons])
        if over and customization.turn_down:
            at = _Champion(champion, adapter, row, base_row)
            found = _turned_down(step, customization, registry, at, ground, heldout, world, found.reasons)
    shutil.rmtree(checks, ignore_errors=True)
    return found


@dataclass(frozen=True)
class _Champion:
    """A champion as it was measured now."""

    version: Version
    adapter: StageResult
    row: Evaluation
    base_row: Evaluation


def _turned_down(
    step: Step,
    customization: Customization,
    registry: Registry,
    now: _Champion,
    ground: Ground,
    heldout: StageResult,
    world: StageResult | None,
    reasons: list[str],
) -> Checked:
    """Choose a smaller dial within the budget, register the adapter with it, and make it the champion."""
    from qadapter.policy.files import read_policy

    assert customization.budget is not None
    dial = read_policy(now.adapter.path / "adapter").dial
    cell = Cell(customization.domain, METHOD, customization.seed)
    settings = customization.experiment().evaluation.curve
    assert settings is not None  # a customization with a budget has one
    if not dial.as_trained:
        settings = settings.model_copy(update={"kinds": (dial.kind,)})
    curve = step(
        measure_curve,
        cell=cell,
        row=now.row,
        base=ground.base,
        base_row=now.base_row,
        data=heldout,
        benchmarks=ground.benchmarks,
        world=world,
        old_texts=ground.old_texts,
        settings=settings,
    )
    dialled = step(
        dial_candidate,
        curve=curve,
        adapter=now.adapter,
        heldout=heldout,
        budget=customization.budget,
        below=dial.value,
    )
    if not dialled.choice["dial"]:
        return Checked([*reasons, f"its dial was not turned down: {dialled.choice['sentence']}"])
    label = f"version {now.version.number} turned down"
    adapter = step(take_adapter, label=label, folder=dialled.stage.path / "adapter", run_id=None)
    row = measuring(step, ground, heldout, world)(cell, adapter, now.base_row)
    turned = TurnedDown(now.version, str(dial), dialled, adapter, row, reasons)
    with one_at_a_time(customization):  # no candidate is compared with a champion that is being replaced
        version = step(register_turned_down, customization=customization, turned=turned, base=ground.base)
        left_alone = registry.promote(version)
        # A run of new preferences must not take this version for one that a killed run had left.
        Seen.update(customization, version=max(version.number, Seen.read(customization).version))
    if left_alone:
        return Checked([*reasons, f"{turned.sentence()}; {left_alone}"])
    return Checked([*reasons, turned.sentence()], version)


def _heldout(
    step: Step, customization: Customization, registry: Registry, champion: Version, world: StageResult | None
) -> StageResult:
    """Today's held-out pairs; their quality is reported. If they have separate files, the source is not read and may be
    empty or unavailable."""
    source = customization.source
    heldout: StageResult
    if source.heldout_path or source.heldout_split:
        heldout = step(read_heldout, customization=customization, world=world)
        step(measure_quality, source=PREFERENCES, data=heldout, benchmarks=world)
        return heldout
    refuse_other_division(champion, customization)
    previous = Seen.read(customization).ledger
    ledger = step(collect_preferences, customization=customization, previous=previous, world=world)
    mixture = step(
        mix_preferences,
        customization=customization,
        ledger=ledger,
        learnt=learnt_by(champion, registry),
        world=world,
        everything=True,  # irrelevant here: only the held-out side is used
    )
    step(measure_quality, source=PREFERENCES, data=mixture, benchmarks=world)
    heldout = step(hold_out, mixture=mixture)
    return heldout
