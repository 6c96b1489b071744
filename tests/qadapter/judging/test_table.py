"""The table of judges: complete rows, and a judge added by CONTRIBUTING.md's recipe, which changes no other key."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from qadapter.config.base import Settings
from qadapter.judging.table import JUDGES, NO_JUDGE, find_judge, judge_names
from tests.support.paths import PROJECT_ROOT
from tests.support.recipes import add_line, code_blocks, copy_project, run_in


@pytest.mark.parametrize("kind", JUDGES, ids=lambda kind: kind.name)
def test_every_row_is_complete(kind) -> None:
    module = import_module(kind.open.__module__)
    assert module.JUDGE is kind, "a judge's row stands in its own file, with the function that opens it"
    assert re.fullmatch(r"[a-z][a-z-]*", kind.name)
    assert (kind.section is None) == (kind.settings is None)
    if kind.settings is not None:
        assert issubclass(kind.settings, Settings)
    if kind.training is not None:
        assert callable(import_module(kind.training).train_judge)
    docs = (PROJECT_ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert f"`{kind.name}`" in docs
    tests = [file.read_text(encoding="utf-8") for file in (PROJECT_ROOT / "tests").rglob("test_*.py")]
    assert any(f'"{kind.name}"' in text or f"={kind.name}" in text for text in tests)


def test_names_are_distinguished() -> None:
    assert len(set(judge_names())) == len(JUDGES) + 1
    assert find_judge(NO_JUDGE) is None
    with pytest.raises(KeyError):
        find_judge("oracle")


KEYS = """
import importlib, json, sys
from pathlib import Path
from types import SimpleNamespace
import tasks.evaluate, tasks.judge
from qadapter.config.experiment import load_experiment
from tasks.stages.code_version import code_digest
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.train import Base

class Found(Exception): pass
def found(context, name, *, module, config, compute, **_):
    raise Found(code_digest(module, compute), json.dumps(config, sort_keys=True))
tasks.evaluate.run_stage = tasks.judge.run_stage = found
tasks.evaluate.heldout_data = lambda *_: ("", "")  # no part of a key
stage = SimpleNamespace(path=Path("x"), output=Path("x"), run_id="")
row = SimpleNamespace(adaptation=stage)
endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_variable": None}
pairs = {f"sources.{name}.judge_pairs": 5 for name in load_experiment("smoke").domains}
keys = {}
for judge in sys.argv[1].split(","):
    changes = {"evaluation.adaptation.judge": judge, "evaluation.adaptation.endpoint": endpoint, **pairs}
    experiment = load_experiment("smoke", changes)
    context = RunContext(experiment, StageStore(Path("s")), None, "", None)
    cell = SimpleNamespace(domain="harmless", method="dpo", seed=0, name="", tags=lambda: {})
    base = Base("base", None, "helpful")
    try:
        tasks.evaluate.evaluate.fn(context, cell, base, stage, row, stage, stage, None, None, stage, stage)
    except Found as key:
        keys[judge] = key.args
    try:
        tasks.judge.train_judge.fn(context, "harmless", base, stage)
    except Found as key:
        keys[judge + " training"] = key.args
    except ValueError:
        pass
print(json.dumps(keys))
"""

NEW_JUDGE = """
from qadapter.judging.plan import case_of, judge_of
from qadapter.judging.verdicts import comparison
adaptation = "evaluation.adaptation"
experiment = load_experiment("smoke", [f"{adaptation}.judge=shorter", adaptation + ".shorter={margin: 5}"])
kind = judge_of(experiment, "harmless")
judge = kind.open(case_of(experiment, "harmless", kind), None)
prompts = [[{"role": "user", "content": "?"}]] * 4
base, replies = ["a long answer", "brief", "equal", "six"], ["brief", "a long answer", "equal", "short"]
rows, metrics = comparison(judge, 1)(prompts, base, replies)
print(json.dumps([[row["verdict"] for row in rows], metrics["adaptation/win_rate"]]))
"""


def test_a_judge_added_by_the_recipe_changes_no_other_key(tmp_path: Path) -> None:
    """CONTRIBUTING.md's file and line, in a copy: the new judge judges, and every other stage's key stays."""
    project = copy_project(tmp_path / "project")
    (before,) = run_in(project, KEYS, "rule,reward-model,endpoint,none")
    assert set(before) == {"rule", "reward-model", "reward-model training", "endpoint", "none"}
    assert len({code for code, _ in before.values()}) == 5, "each judge's evaluation has that judge's code in its key"
    (file,), (line,) = code_blocks("Add a judge", "python"), code_blocks("Add a judge", "text")
    table = project / "qadapter/judging/table.py"
    (project / "qadapter/judging/shorter.py").write_text(file, encoding="utf-8")
    add_line(table, "    endpoint.JUDGE,", f"    {line}")
    add_line(table, "from qadapter.judging import endpoint, reward_model, rule", "from qadapter.judging import shorter")
    after, (verdicts, win_rate) = run_in(project, KEYS + NEW_JUDGE, "rule,reward-model,endpoint,none,shorter")
    assert {name: after[name] for name in before} == before
    assert after["shorter"] not in before.values()
    assert verdicts == ["win", "loss", "tie", "tie"]  # 13 against 5 characters, the reverse, none, three against five
    assert win_rate == (1 + 0 + 0.5 + 0.5) / 4
