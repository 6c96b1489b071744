"""`kill -9` in every stage, power cuts, damage: the next run goes on, and comes to the same numbers, bit for bit."""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType

from flows.prefect_host.access import AUTH_VARIABLE
from flows.running.runners import task_runner
from flows.running.workers import ForkedWorkers
from qadapter.config.experiment import load_experiment
from qadapter.training.checkpoints import SEAL, last_checkpoint, seal
from tests.support.kills import Row, cut, newest_checkpoint, zero
from tests.support.real_runs import PROJECT_ROOT, SECRETS, RealHome, Server, Undisturbed

# ---- checkpoints


@pytest.mark.parametrize(
    "harm",
    [cut, zero, Path.unlink, lambda file: (file.parent / SEAL).unlink(), lambda file: cut(file.parent / SEAL)],
    ids=["cut", "zeroed", "lost", "killed before the seal", "seal cut"],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, file: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / name).write_text(name * 10)
        seal(folder)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    harm(tmp_path / "checkpoint-4" / file)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is not whole" in caplog.text


# ---- processes


def test_worker_processes_end_with_their_flow_run(tmp_path: Path) -> None:
    """`parallel: 2` works in processes; `kill -9` of the flow run alone must not leave them behind."""
    assert isinstance(task_runner(load_experiment("smoke", {"parallel": 2})), ForkedWorkers)
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(PROJECT_ROOT)!r})\n"
        "import os, time\n"
        "from flows.running.workers import ForkedWorkers\n"
        "if __name__ == '__main__':\n"
        "    with ForkedWorkers(max_workers=1) as pool:\n"
        "        print(pool._executor.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(600)\n"
    )
    flow_run = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    assert flow_run.stdout is not None
    worker = psutil.Process(int(flow_run.stdout.readline()))
    family = psutil.Process(flow_run.pid).children(recursive=True)
    assert worker in family
    flow_run.kill()
    flow_run.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []


# ---- the matrix


MATRIX = [
    Row("toy-world", "started"),
    Row("prepare", "written"),
    Row("quality", "written"),
    Row("pretrain", "saving-2"),
    Row("pretrain", "step-4", "the newest checkpoint's weights cut"),
    Row("helpful-sft", "step-3"),
    Row("retention", "written", "its files cut"),
    Row("adaptation", "batch-2"),
    Row("answers", "written"),
    Row("train", "saving-2"),
    Row("train", "step-3", "the newest checkpoint's optimiser zeroed"),
    Row("train", "renamed"),
    Row("report", "written", "a finished stage cut, another zeroed"),
]


@dataclass
class Killed:
    """A workspace in which every run but the last was killed."""

    home: RealHome
    rows: list[Row]
    last_code: int
    went_on_at: dict[str, int] = field(default_factory=dict)


def damage(home: RealHome, row: Row) -> None:
    if "weights cut" in row.damage:
        cut(newest_checkpoint(home, row.stage) / "model.safetensors")
    elif "optimiser zeroed" in row.damage:
        zero(newest_checkpoint(home, row.stage) / "optimizer.pt")
    elif row.damage == "its files cut":
        (half,) = home.store.glob(f"stages/{row.stage}/.*.tmp")
        for file in half.iterdir():
            cut(file)
    elif row.damage:
        cut(next(home.store.glob("stages/answers/*/answers.json")))
        zero(next(home.store.glob("stages/prepare/*/train.jsonl")))


@pytest.fixture(scope="module")
def killed(
    undisturbed: Undisturbed, prefect_server: Server, data_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    """One workspace, killed at each moment of the matrix in turn; each run goes on where the one before it was."""
    home = RealHome(tmp_path_factory.mktemp("killed"), prefect_server, data_server)
    for row in MATRIX:
        before = sum(home.finished().values())
        code = home.run((row.stage, row.moment))
        after = home.finished()
        statuses = [status for _, status in home.runs()]
        row.ended(code)
        row.outcome += f"; {sum(after.values())} stages finished, {sum(after.values()) - before} of them now"
        row.outcome += f"; {statuses.count('RUNNING')} MLflow runs open, {statuses.count('KILLED')} closed as killed"
        row.finished_before = before
        damage(home, row)
    shutil.copy(home.log, home.folder / "killed.log")
    return Killed(home, MATRIX, home.run())


@pytest.mark.slow
def test_every_kill_hit(killed: Killed, record_property: Callable[[str, object], None]) -> None:
    """The table that docs/operations.md shows (`pytest --junit-xml` keeps it; `-s` prints it)."""
    for place, row in enumerate(killed.rows):
        record_property(f"kill {place + 1}", str(row))
        print(f"| {row.stage} | {row.moment} | {row.damage or '–'} | {row.outcome} |")
    assert [row.outcome.split(";")[0] for row in killed.rows] == ["signal 9"] * len(killed.rows)
    assert killed.last_code == 0, killed.home.printed()[-4000:]


@pytest.mark.slow
def test_finished_stages_are_not_computed_again(killed: Killed) -> None:
    before = [row.finished_before for row in killed.rows]
    assert before == sorted(before)
    computed = killed.home.printed().count(": done in ")
    # One was finished when it was killed before it could say so, and two damaged ones were computed twice.
    assert computed == sum(killed.home.finished().values()) - 1 + 2
    assert len(list(killed.home.store.glob("damaged/*/*"))) == 2


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_run(killed: Killed, undisturbed: Undisturbed) -> None:
    assert killed.home.results() == undisturbed.home.results()
    measured = killed.home.measured()
    assert measured == undisturbed.home.measured()
    assert sum(len(metrics) for metrics in measured.values()) > 100


@pytest.mark.slow
def test_trainings_went_on_at_their_last_whole_checkpoint(killed: Killed) -> None:
    """Each resumed training says where it goes on; damaged and half-written checkpoints are passed over."""
    passed_over = [line for line in killed.home.printed().splitlines() if "is not whole and is passed over" in line]
    assert sum("scratch/pretrain" in line for line in passed_over) == 2
    assert sum("scratch/train" in line for line in passed_over) == 2
    assert not list(killed.home.store.glob("scratch/*/*"))


@pytest.mark.slow
def test_an_evaluation_went_on_behind_its_last_batch(killed: Killed) -> None:
    """Retention was killed behind its two batches, adaptation in its second: no run computes one of them again."""
    kept = re.findall(r"(\d) batch\w* of an interrupted run", killed.home.printed())
    assert kept == ["2", "1", "3"], "and the base's answers, which were killed behind their three"


@pytest.mark.slow
def test_nothing_half_written_is_left_or_used(killed: Killed) -> None:
    assert not list(killed.home.store.glob("stages/*/.*"))


@pytest.mark.slow
def test_prefect_shows_no_run_as_running(killed: Killed) -> None:
    """The next run of the experiment reports them."""
    killed_then_ended = []
    with sqlite3.connect(killed.home.folder / "mlflow.db") as database:
        ids = database.execute(
            "SELECT t.value FROM tags t JOIN runs r ON r.run_uuid = t.run_uuid WHERE t.key = 'prefect.flow_run_id' "
            "ORDER BY r.start_time"
        )
        flow_runs = [name for (name,) in ids]
    with SyncPrefectClient(killed.home.prefect.url, auth_string=SECRETS[AUTH_VARIABLE]) as client:
        for name in flow_runs:
            killed_then_ended.append(client.read_flow_run(UUID(name)).state_type)
    assert killed_then_ended == [StateType.CRASHED] * len(killed.rows) + [StateType.COMPLETED]


@pytest.mark.slow
def test_mlflow_shows_no_run_as_running(killed: Killed) -> None:
    runs = killed.home.runs()
    statuses = [status for _, status in runs]
    assert set(statuses) == {"FINISHED", "KILLED"}
    parents = [status for name, status in runs if name.startswith("smoke")]
    assert parents == ["KILLED"] * len(killed.rows) + ["FINISHED"]
