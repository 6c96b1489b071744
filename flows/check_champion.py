"""Regression monitoring: measure the champion again, from the registry's own files, and raise an event if it fell.

prefect deployment run check-champion/smoke
"""

from __future__ import annotations

import shutil
from typing import Any

from prefect import flow
from prefect.states import State

from flows.customize import Step, fetch, lay_ground, measuring, one_at_a_time, prepared, request_of
from flows.running.outcomes import ended
from flows.running.prefect_run import close_abandoned
from flows.running.run_request import check_workspace
from flows.watch_preferences import emit
from qadapter.config.customization import PREFERENCES, Customization, load_customization
from qadapter.gate import Measured, fallen
from qadapter.serving.registered import DamagedError
from tasks.candidate import METHOD, learnt_by, measured, registry_of
from tasks.data import generate_toy_world
from tasks.preferences import Seen, collect_preferences, hold_out, mix_preferences, read_heldout
from tasks.quality import measure_quality
from tasks.stages.context import Cell, workspace
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageStore
from tasks.tracking.registry import Registry, Version
from tasks.tracking.tracker import Tracker

NAME = "check-champion"
FELL = "qadapter.champion.fell"


@flow(name=NAME)
def check_champion(config: str = "smoke") -> State[Any]:
    """Measure the champion on today's held-out preferences and the retention tasks; nothing is trained or promoted.

    The result is compared with the measurements at registration. A drop on new held-out rows shows that the preferences
    changed; a drop on the same rows, that files, libraries or the machine changed. A champion with damaged files counts
    as fallen and is not measured. Ends as `NoChampion` or `Steady`, or fails as `Fell`, with the event
    `qadapter.champion.fell`.

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
        champion = registry.champion()
        assert champion is not None  # an alias may move, but is never removed
        reasons = _damage(customization, champion) or _what_fell(config, customization, registry, champion)
    if not reasons:
        return ended("Steady", f"version {champion.number} of {customization.model_name} is as good as it was")
    message = f"version {champion.number} of {customization.model_name}: " + "; ".join(reasons)
    emit(FELL, f"qadapter.model.{customization.model_name}", {"version": champion.number, "reasons": reasons})
    return ended("Fell", message)


def _damage(customization: Customization, champion: Version) -> list[str]:
    """Problems of the registered files. Training may fall back to a stage with the same files; serving cannot."""
    from tasks.tracking.models import check_files

    try:
        check_files(f"{customization.model_name}/{champion.number}")
    except DamagedError as error:
        return [str(error)]
    return []


def _what_fell(config: str, customization: Customization, registry: Registry, champion: Version) -> list[str]:
    checks = workspace() / ".qadapter" / "checks" / customization.model_name
    shutil.rmtree(checks, ignore_errors=True)  # of a check that was killed
    with prepared(config, customization, NAME) as (run, step):
        x = run.experiment
        world = step(generate_toy_world) if x.toy_world else None
        heldout = _heldout(step, customization, registry, champion, world)
        ground = lay_ground(x, step, world, champion, customization.model_name)
        adapter = fetch(step, customization, champion)
        base_row = measuring(step, ground, heldout, world)(Cell(customization.domain, "base"), None, None)

        # Cached measurements would make the check pointless, so the champion is always measured anew.
        fresh = run.storing_in(StageStore(checks))

        def again(task: Any, **inputs: Any) -> Any:
            return fresh.result(fresh(task, **inputs))

        cell = Cell(customization.domain, METHOD, customization.seed)
        now = measured(measuring(again, ground, heldout, world)(cell, adapter, base_row))
        then = Measured.read(registry.files(champion, "adaptation"), registry.files(champion, "retention"))
        reasons = fallen(then, now, customization.gate)
    shutil.rmtree(checks, ignore_errors=True)
    return reasons


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
