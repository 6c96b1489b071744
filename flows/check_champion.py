"""Regression monitoring: measure the champion again, from the registry's own files, and raise an event if it fell.

prefect deployment run check-champion/smoke
"""

from __future__ import annotations

import shutil
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from flows.announce import emit
from flows.customize import fetch, lay_ground, measuring, prepared
from qadapter.customization import load_customization
from qadapter.gate import Measured, fallen
from tasks.candidate import METHOD, measured, registry_of
from tasks.context import Customisation, workspace
from tasks.data import generate_toy_world
from tasks.preferences import Seen, collect_preferences, hold_out, mix_preferences
from tasks.stage import StageStore

FELL = "qadapter.champion.fell"


@flow(name="check-champion")
def check_champion(config: str = "smoke") -> State[Any]:
    """Measure the champion on today's held-out preferences and the retention tasks; nothing is trained or promoted.

    Compared with what was measured when it was registered: new held-out rows show that the preferences moved on, the
    same rows that files, libraries or the machine changed. Ends as `NoChampion`, `Steady` or `Fell`; with `Fell` goes
    the event `qadapter.champion.fell`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    registry = registry_of(customization)
    champion = registry.champion()
    if champion is None:
        return _ended("NoChampion", f"the registered model {customization.model_name!r} has no champion to check")
    checks = workspace() / ".qadapter" / "checks" / customization.model_name
    shutil.rmtree(checks, ignore_errors=True)
    with prepared(config, customization, "check-champion") as (run, step):
        x = run.experiment
        world = step(generate_toy_world) if x.toy_world else None
        seen = Seen.read(customization)
        ledger = step(collect_preferences, customization=customization, previous=seen.ledger, world=world)
        mixture = step(mix_preferences, customization=customization, ledger=ledger, world=world, first=False)
        heldout = step(hold_out, mixture=mixture)
        ground = lay_ground(x, step, world, champion, customization.model_name)
        adapter = fetch(step, customization, champion)
        base_row = measuring(step, ground, heldout, world)(Customisation(customization.domain, "base"), None, None)

        # A check that finds last week's answer checks nothing: the champion's own measurements are not looked up.
        fresh = run.storing_in(StageStore(checks))

        def again(task: Any, **inputs: Any) -> Any:
            return fresh.result(fresh(task, **inputs))

        cell = Customisation(customization.domain, METHOD, customization.seed)
        now = measured(measuring(again, ground, heldout, world)(cell, adapter, base_row))
        then = Measured.read(registry.files(champion, "adaptation"), registry.files(champion, "retention"))
        reasons = fallen(then, now, customization.gate)
    shutil.rmtree(checks, ignore_errors=True)
    if not reasons:
        return _ended("Steady", f"version {champion.number} of {customization.model_name} is as good as it was")
    message = f"version {champion.number} of {customization.model_name}: " + "; ".join(reasons)
    emit(FELL, f"qadapter.model.{customization.model_name}", {"version": champion.number, "reasons": reasons})
    return _ended("Fell", message)


def _ended(name: str, message: str) -> State[Any]:
    (get_run_logger().warning if name == "Fell" else get_run_logger().info)("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})
