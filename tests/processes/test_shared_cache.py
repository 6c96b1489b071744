"""Two flow runs at the same time on one machine, as real processes: they share what they compute and spoil nothing."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.support.quiet import noise
from tests.support.real_runs import Undisturbed

STAGES = {
    "toy-world": 1,
    "prepare": 2,
    "quality": 2,
    "pretrain": 1,
    "helpful-sft": 1,
    "retention": 3,
    "adaptation": 3,
    "answers": 1,
    "train": 2,
    "report": 1,
}


@pytest.mark.slow
def test_both_finish_and_each_stage_is_computed_once(undisturbed: Undisturbed) -> None:
    home = undisturbed.home
    assert undisturbed.codes == (0, 0), home.printed()[-4000:]
    assert home.finished() == STAGES
    computed = Counter(re.findall(r"^.*?: (done in|found) ", home.printed(), re.MULTILINE))
    assert computed == {"done in": sum(STAGES.values()), "found": sum(STAGES.values())}
    assert not list(home.store.glob("stages/*/.*")), "nothing half-written is left"
    assert not (home.store / "damaged").exists()


@pytest.mark.slow
def test_the_cache_is_whole_and_mlflow_shows_both(undisturbed: Undisturbed) -> None:
    home = undisturbed.home
    assert sum(len(entries) for entries in home.results().values()) == sum(STAGES.values())  # verifies every byte
    runs = home.runs()
    assert Counter(status for _, status in runs) == {"FINISHED": len(runs)}
    names = Counter(name for name, _ in runs if not name.startswith("smoke"))
    assert set(names.values()) == {2}, "each run shows every stage, computed or found"


@pytest.mark.slow
def test_a_normal_run_prints_no_warning_of_a_library(undisturbed: Undisturbed) -> None:
    assert noise(undisturbed.home.printed()) == []
