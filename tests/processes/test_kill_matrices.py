"""No stage without a `kill -9`: a list that is compared with the code, and the stages that only a sweep has."""

from __future__ import annotations

import ast
import csv
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from qadapter.config.experiment import load_experiment
from qadapter.methods.table import METHODS
from tests.support.kills import Killed, Row, cut, killed_at_each, newest_checkpoint
from tests.support.real_runs import OVERRIDES, PROJECT_ROOT, RealHome, Server

SWEEP = {
    "name": "tiny",
    "profile": "smoke",
    "seeds": [0],
    "domains": ["harmless"],
    "settings": {},
    "groups": {"residual": {"method": "q-adapter", "centre": {"preset": "residual"}, "alpha_0_at_inference": [0.5]}},
    "seconds": {"base": 1, "q-adapter": 1, "dial": 1},
}
TRAINING = {"learning_rate": 1e-2, "max_steps": 5, "save_steps": 2, "batch_size": 2, "max_length": 64}
CHANGES: dict[str, Any] = {
    "sources": {
        "helpful": OVERRIDES["sources"]["helpful"],
        "harmless": {"path": "{data}/hh-rlhf/harmless.jsonl", "heldout": 8, "judge_pairs": 12},
    },
    "domains": {"harmless": {"source": "harmless", "base": "pretrained"}},
    "helpful_sft": None,
    "built_benchmarks": {"replies": {"helpful": "helpful"}, "max_items": 8},
    "training": TRAINING,
    "evaluation.retention": {"tasks": ["helpful_word_order"], "limit": 8, "answers": 2, "max_new_tokens": 3},
    "evaluation.adaptation": {
        "batch_size": 64, "max_new_tokens": 3, "generate": 4, "judge": "reward-model", "reward_model": TRAINING
    },
}  # fmt: skip
"""A sweep of one adapter with a second α0, with benchmarks made from the data and a judge that is trained."""

MATRIX = [
    Row("benchmarks", "written"),
    Row("judge", "step-4", "the newest checkpoint's weights cut"),
    Row("judge", "renamed"),
    Row("dial", "written", "its files cut"),
    Row("sweep-report", "written"),
]


# ---- every stage


def stages_of_the_code() -> set[str]:
    """Names of all stages: what `run_stage` is called with, and the table of what methods need."""
    sections = load_experiment("smoke").methods
    found = set()
    for method in METHODS:
        settings = getattr(sections, method.attribute, None) or method.settings()
        found |= {need.name for need in method.needs(settings)}
    for file in (PROJECT_ROOT / "tasks").glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "ruled.run":
                name = call.args[0]
            elif isinstance(call.func, ast.Name) and call.func.id == "run_stage":
                name = call.args[1]
                if ast.unparse(name) in {"need.name", "name"}:  # `_Ruled.run` passes on what it is called with
                    continue
            else:
                continue
            assert isinstance(name, ast.Constant), f"{file.name}:{call.lineno}: a stage without a name of its own"
            found.add(str(name.value))
    return found


def all_matrices() -> tuple[list[Row], ...]:
    """Of all files that kill; some of them import from this file."""
    from tests.processes import test_kill_continual, test_kill_needs, test_killed, test_recurring_processes

    files = (test_killed, test_recurring_processes, test_kill_needs, test_kill_continual)
    return MATRIX, *(file.MATRIX for file in files)


def test_every_stage_is_killed_somewhere() -> None:
    """A new stage needs a line in one of the five matrices."""
    matrices = all_matrices()
    killed = {row.stage for matrix in matrices for row in matrix} - {"mlflow"}
    assert killed == stages_of_the_code()
    assert len(killed) == 28


def test_the_documentation_shows_every_kill() -> None:
    """docs/operations.md has a line for each row, by stage."""
    lines = (PROJECT_ROOT / "docs/operations.md").read_text(encoding="utf-8").splitlines()
    shown = [line.split("|")[1].split("(")[0].strip() for line in lines if line.startswith("| ")]
    for matrix in all_matrices():
        for row in matrix:
            if row.stage != "mlflow":  # that table says registering and promoting
                assert shown.count(row.stage) >= sum(other.stage == row.stage for other in matrix), row


# ---- a sweep


@dataclass
class SweepHome(RealHome):
    """A workspace in which real processes run `make sweep`."""

    def command(self, **changes: Any) -> tuple[str, list[str]]:
        file = self.folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
        _, (_, _, _, *overrides) = super().command(**CHANGES)
        return "qadapter.command.parser", [
            "sweep",
            "--sweep",
            str(file),
            *(o for o in overrides if "methods.run" not in o),
        ]


def damage(home: SweepHome, row: Row) -> None:
    if "weights" in row.damage:
        cut(newest_checkpoint(home, row.stage) / "adapter_model.safetensors")
        return
    for file in next(home.store.glob(f"stages/{row.stage}/.*.tmp")).rglob("*.json"):
        cut(file)


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed[SweepHome]:
    home, quiet = (
        SweepHome(tmp_path_factory.mktemp(f"{name}-sweep"), prefect_server, "") for name in ("killed", "quiet")
    )
    return killed_at_each(home, quiet, MATRIX, damage)


@pytest.mark.slow
def test_every_kill_hit(killed: Killed[SweepHome], record_property: Callable[[str, object], None]) -> None:
    """The third table of docs/operations.md."""
    killed.every_kill_hit(record_property)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_sweep(killed: Killed[SweepHome]) -> None:
    assert killed.home.finished() == killed.quiet.finished()
    assert set(killed.home.finished()) >= {row.stage for row in MATRIX}
    assert killed.home.results() == killed.quiet.results()
    table = measured_table(killed.home)
    assert table == measured_table(killed.quiet)
    assert [row["variant"] for row in table] == ["base", "residual", "residual, then α0=0.5"]
    assert killed.home.measured() == killed.quiet.measured()


def measured_table(home: SweepHome) -> list[dict[str, str]]:
    """The report's table, a row a setting, without costs."""
    (file,) = home.store.glob("stages/sweep-report/[!.]*/sweep.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if not k.startswith("cost/")} for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_nothing_is_left_half_written_or_open(killed: Killed[SweepHome]) -> None:
    home = killed.home
    assert home.printed().count(": done in ") == sum(home.finished().values()) - 1, "but for the judge that was renamed"
    assert not list(home.store.glob("stages/*/.*"))
    assert not list(home.store.glob("scratch/*/*"))
    statuses = [status for _, status in home.runs()]
    assert set(statuses) == {"FINISHED", "KILLED"}
    passed_over = [line for line in home.printed().splitlines() if "is not whole and is passed over" in line]
    assert sum("scratch/judge" in line for line in passed_over) == 1
