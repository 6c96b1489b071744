"""The whole experiment, cut very small, through real Prefect and real MLflow: run, repeated, changed, broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL

from flows.full_paper_repro import experiment_stages, full_paper_repro
from flows.running.plan import Recorder
from flows.running.prefect_run import StagesFailedError
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import MANIFEST
from qadapter.methods.table import METHODS as TABLE
from qadapter.preferences import sources
from qadapter.preferences.download import UnreachableError
from qadapter.report.page import data_uri
from tasks.data import prepare_data
from tasks.stages import prefect_artifacts
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tasks.tracking.view import VIEW_TAG
from tests.support.commands import subcommand
from tests.support.fake_judge import FakeJudge, longer, serving
from tests.support.paths import PROJECT_ROOT

main = subcommand("run")

DOMAINS = ("harmless", "academy")
METHODS = tuple(method.name for method in TABLE if method.by_default)
EXPERIMENT = "full-paper-repro"
SOURCES = {
    "helpful": {"path": "{data}/hh-rlhf/helpful.jsonl.gz", "heldout": 0.2, "max_heldout_pairs": 12},
    "harmless": {
        "path": "{data}/hh-rlhf/harmless.jsonl",
        "heldout_path": "{data}/hh-rlhf/harmless-heldout.jsonl",
        "max_heldout_pairs": 8,
    },
    "academy": {
        "path": "{data}/dsp/domain_specific_preference.json",
        "domain": "academy",
        "heldout": 0.4,
        "max_heldout_pairs": 8,
    },
}


def small(domains: tuple[str, ...] = DOMAINS, methods: tuple[str, ...] = METHODS, **changes: Any) -> dict[str, Any]:
    """Overrides that leave of `smoke` what a few seconds can train; `training__max_steps` is `training.max_steps`."""
    return {
        "parallel": 1,
        "base_threads": None,
        "toy_world.corpus_size": 300,
        "sources": {name: SOURCES[name] for name in ("helpful", *domains)},
        "domains": {name: {"source": name, "base": "helpful"} for name in domains},
        "model.from_scratch.hidden_size": 16,
        "model.from_scratch.intermediate_size": 16,
        "model.from_scratch.layers": 1,
        "model.from_scratch.heads": 2,
        "pretraining.max_steps": 3,
        "pretraining.logging_steps": 1,
        "pretraining.batch_size": 8,
        "helpful_sft.max_steps": 2,
        "helpful_sft.logging_steps": 1,
        "helpful_sft.batch_size": 4,
        "training.max_steps": 2,
        "training.logging_steps": 1,
        "training.batch_size": 2,
        "training.learning_rate": 1e-2,
        "methods.run": list(methods),
        "methods.replay.max_new_tokens": 3,
        "evaluation.retention.tasks": ["toy_facts", "toy_sums"],
        "evaluation.retention.limit": 8,
        "evaluation.retention.max_new_tokens": 3,
        "evaluation.adaptation.max_new_tokens": 3,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }


@dataclass
class Home:
    """A workspace of its own: MLflow's database, artifacts and the stage store."""

    folder: Path

    def run(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """A flow run here."""
        with self.entered():
            return dict(full_paper_repro("smoke", None, overrides))

    @contextmanager
    def entered(self) -> Iterator[pytest.MonkeyPatch]:
        """What runs in this block works here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            patch.setenv("QADAPTER_HOME", str(self.folder))
            yield patch

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def parents(self) -> list[Run]:
        """Parent runs, the oldest first."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        return list(
            self.client.search_runs(
                [experiment.experiment_id], "tags.stage = 'parent'", order_by=["attributes.start_time ASC"]
            )
        )

    def children(self, parent: Run) -> list[Run]:
        found = self.client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=500
        )
        return list(found)

    def cells(self, parent: Run) -> dict[tuple[str, str], Run]:
        """(domain, method) → its run."""
        return {
            (run.data.tags["domain"], run.data.tags["method"]): run
            for run in self.children(parent)
            if run.data.tags.get("method")
        }

    def stages(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Every finished stage with its files' sizes and dates; a hit renews a manifest's date, and nothing else."""
        return {
            f"{folder.parent.name}/{folder.name}": {
                str(file.relative_to(folder)): (
                    file.stat().st_size,
                    0 if file.name == MANIFEST else file.stat().st_mtime_ns,
                )
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            for folder in sorted((self.folder / ".qadapter" / "stages").glob("*/*"))
        }

    @staticmethod
    def artifact_folder(run: Run) -> Path:
        """Where a run's artifacts lie."""
        return Path(run.info.artifact_uri.removeprefix("file://"))

    def artifacts(self, run: Run) -> set[str]:
        """Paths of a run's artifact files."""
        root = self.artifact_folder(run)
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@dataclass
class Ran:
    """A flow run and what the store held when it had ended."""

    home: Home
    summary: dict[str, Any]
    parent: Run
    stages: dict[str, Any]
    printed: str = ""

    @property
    def flow_run_id(self) -> UUID:
        return UUID(self.parent.data.tags["prefect.flow_run_id"])


@pytest.fixture(scope="session")
def first(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The experiment from nothing."""
    home = Home(tmp_path_factory.mktemp("home"))
    summary = home.run(small())
    (parent,) = home.parents()
    return Ran(home, summary, parent, home.stages())


@pytest.fixture(scope="session")
def second(first: Ran) -> Ran:
    """The same again, by the command that `make repro` calls."""
    home = first.home
    arguments = ["--profile", "smoke", *(f"{key}={json.dumps(value)}" for key, value in small().items())]
    code, printed, _ = command(home, arguments)
    assert code == 0
    parents = home.parents()
    assert len(parents) == 2
    return Ran(home, {}, parents[1], home.stages(), printed)


def command(home: Home, arguments: list[str]) -> tuple[int, str, str]:
    """`qadapter run` in this process, on the harness's server: exit code, output, errors."""
    out, errors = StringIO(), StringIO()
    with home.entered() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        code = main(arguments)
    return code, out.getvalue(), errors.getvalue()


def task_states(ran: Ran, expected: int) -> dict[str, str]:
    """Name → state of every task run; Prefect records them a moment later."""
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 60
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [ran.flow_run_id]}), limit=200)
            states = {run.name: str(run.state_name) for run in runs}
            done = all(run.state is not None and run.state.is_final() for run in runs)
            if (len(states) >= expected and done) or time.monotonic() > deadline:
                return states
            time.sleep(0.5)


def planned(overrides: dict[str, Any]) -> list[str]:
    """Names of the stages that `make plan` shows."""
    recorder = Recorder()
    experiment_stages(load_experiment("smoke", overrides), recorder)
    return [stage.name for stage in recorder.stages]


def measured(run: Run) -> dict[str, float]:
    """What was measured, without what it cost."""
    kept = ("adaptation/", "retention/", "forgetting/", "train/")
    return {name: value for name, value in run.data.metrics.items() if name.startswith(kept)}


# ---- the first run


def test_the_plan_is_what_runs(first: Ran) -> None:
    names = planned(small())
    assert len(names) == 1 + 2 * 3 + 1 + 1 + 1 + 2 * (1 + 1 + 4 * 2) + 1
    states = task_states(first, len(names))
    assert sorted(states) == sorted(names)
    assert set(states.values()) == {"Completed"}


def test_the_parent_run(first: Ran) -> None:
    parent = first.parent
    assert parent.info.status == "FINISHED"
    assert parent.info.run_id == first.summary["mlflow_run"]
    assert parent.data.tags["profile"] == "smoke"
    assert parent.data.params["training.max_steps"] == "2"
    assert parent.data.params["methods.run"] == '["q-adapter","sft","dpo","replay"]'
    assert parent.data.params["methods.q-adapter.preset"] == load_experiment("smoke").methods.q_adapter.preset
    for method in ("base", *METHODS):
        assert {f"mean/adaptation/score/{method}", f"mean/retention/mean/{method}"} <= set(parent.data.metrics)
    assert {"report/report.md", "report/comparison.csv", "report/retention_adaptation.png"} <= first.home.artifacts(
        parent
    )


def test_one_child_a_cell(first: Ran) -> None:
    children = first.home.children(first.parent)
    assert {run.info.status for run in children} == {"FINISHED"}
    cells = [
        (r.data.tags["domain"], r.data.tags["method"], r.data.tags["seed"]) for r in children if "method" in r.data.tags
    ]
    assert sorted(cells) == sorted(
        (domain, method, "None" if method == "base" else "0") for domain, method in product(DOMAINS, ("base", *METHODS))
    )
    names = {run.info.run_name for run in children}
    assert {"academy · dpo · seed 0", "academy · base", "harmless · replay · seed 0", "pretrain"} <= names
    for run in first.home.cells(first.parent).values():
        assert run.data.tags["stage"] == "customise"
    stages = {run.data.tags["stage"] for run in children}
    data = {"toy-world", "prepare", "quality"}
    assert stages == data | {"pretrain", "helpful-sft", "retention", "answers", "customise", "report"}


def test_metrics_have_the_same_names_for_each_method(first: Ran) -> None:
    """What the compare page lines up; only the curves of a method's own loss are its own."""
    for domain in DOMAINS:
        cells = first.home.cells(first.parent)
        names = {
            method: {
                name
                for name in cells[domain, method].data.metrics
                if not name.startswith("train/") or name in ("train/final_loss", "train/steps", "train/loss")
                if name != "adaptation/reply_nll"  # there is none where every reply is empty
            }
            for method in METHODS
        }
        assert names["q-adapter"] == names["sft"] == names["dpo"] == names["replay"]
        assert {
            "adaptation/score",
            "adaptation/exact_rule",
            "adaptation/implied_reward_accuracy",
            "retention/mean",
            "retention/toy_facts/exact_match",
            "forgetting/mean",
            "forgetting/toy_sums/exact_match",
            "forgetting/kl_per_token",
            "cost/train_seconds",
            "cost/train_tokens",
            "cost/trainable_parameters",
            "cost/decoding_tokens_per_second",
            "train/loss",
        } <= names["sft"]
        assert ("adaptation/well_formed" in names["sft"]) == (domain == "academy")
        base = set(cells[domain, "base"].data.metrics)
        assert {name for name in base if name.startswith(("adaptation/", "retention/"))} - {"adaptation/reply_nll"} == {
            name for name in names["sft"] if name.startswith(("adaptation/", "retention/"))
        }
        assert cells[domain, "base"].data.metrics["adaptation/implied_reward_accuracy"] == 0.5


def test_curves_and_parameters_of_a_cell(first: Ran) -> None:
    run = first.home.cells(first.parent)["academy", "dpo"]
    curve = first.home.client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == [1, 2]
    assert curve[0].value == pytest.approx(0.6931, abs=1e-4)
    parameters = run.data.params
    assert (parameters["domain"], parameters["method"], parameters["base"]) == ("academy", "dpo", "helpful")
    assert (parameters["dpo.beta"], parameters["training.max_steps"], parameters["lora.rank"]) == ("1.0", "2", "8")
    objective = first.home.cells(first.parent)["academy", "q-adapter"].data.params
    assert float(objective["objective.alpha_tilde"]) == 1.0


def test_adapters_are_artifacts_without_a_pickle(first: Ran) -> None:
    for (_, method), run in first.home.cells(first.parent).items():
        files = first.home.artifacts(run)
        assert ("train/adapter/adapter_model.safetensors" in files) == (method != "base")
        assert ("train/adapter/q_adapter.json" in files) == (method == "q-adapter")
        assert {"adaptation/answers.jsonl", "adaptation/pairs.jsonl", "answers.json"} <= files
    every = {file for run in first.home.children(first.parent) for file in first.home.artifacts(run)}
    assert "pretrain/model/model.safetensors" in every
    assert not {file for file in every if file.endswith((".bin", ".pt", ".pkl", ".pth"))}


def test_data_sets_are_inputs_with_their_digests(first: Ran) -> None:
    runs = {run.info.run_name: run for run in first.home.children(first.parent)}
    for source in ("helpful", *DOMAINS):
        run = runs[f"prepare · {source}"]
        summary = json.loads((first.home.artifact_folder(run) / "prepare" / "summary.json").read_text())
        inputs = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
        assert set(inputs) == {f"{source}-train", f"{source}-heldout"}
        assert inputs[f"{source}-train"].digest == summary["train_sha256"][:36]
        assert inputs[f"{source}-heldout"].digest == summary["heldout_sha256"][:36]
        assert json.loads(inputs[f"{source}-train"].profile)["pairs"] == summary["train_pairs"]
    assert runs["prepare · harmless"].data.metrics["data/read"] == 256
    trained = {entry.dataset.name for entry in runs["academy · dpo · seed 0"].inputs.dataset_inputs}
    assert "academy-train" in trained


def test_the_report(first: Ran) -> None:
    report = Path(first.summary["report"])
    text = report.read_text(encoding="utf-8")
    for domain, method in product((*DOMAINS, "MEAN"), ("base", *METHODS)):
        assert any(
            line.split("|")[1:3] and [part.strip() for part in line.split("|")[1:3]] == [domain, method]
            for line in text.splitlines()
            if line.startswith("|")
        ), (domain, method)
    assert (report.parent / "retention_adaptation.png").stat().st_size > 10_000
    artifact = Artifact.get("report-smoke")
    assert artifact is not None
    lines = text.splitlines(keepends=True)
    for alternative, file in (
        ("retention against adaptation", "retention_adaptation"),
        ("training curves", "training_curves"),
    ):
        lines[lines.index(f"![{alternative}]({file}.png)\n")] = f"*Figure beside this page: {alternative}*\n"
        figure = Artifact.get(f"{file}-smoke".replace("_", "-"))
        assert figure is not None
        assert figure.data == data_uri(report.parent / f"{file}.png")
    assert artifact.data == "".join(lines)


def test_a_figure_too_large_for_prefects_database_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(prefect_artifacts, "show", lambda _, **content: shown.append(content))
    fits, large = tmp_path / "small.png", tmp_path / "large.png"
    fits.write_bytes(b"P" * prefect_artifacts.LARGEST_IMAGE)
    large.write_bytes(b"P" * (prefect_artifacts.LARGEST_IMAGE + 1))
    for file in (fits, large, tmp_path / "missing.png"):
        prefect_artifacts.show_figure(file, file.stem, "a figure")
    assert shown == [{"key": "small", "image_url": data_uri(fits), "description": "a figure"}]


# ---- the second run


def test_a_second_run_computes_nothing(first: Ran, second: Ran) -> None:
    assert second.stages == first.stages
    states = task_states(second, len(planned(small())))
    assert set(states.values()) == {"Cached"}
    assert sorted(states) == sorted(planned(small()))
    for run in second.home.children(second.parent):
        cached = {name: value for name, value in run.data.tags.items() if name.startswith("cached.")}
        assert set(cached.values()) == {"True"}, run.info.run_name


def test_a_second_run_shows_the_same_in_runs_of_its_own(first: Ran, second: Ran) -> None:
    before, after = first.home.cells(first.parent), second.home.cells(second.parent)
    assert before.keys() == after.keys()
    assert second.parent.info.run_id != first.parent.info.run_id
    for cell, run in after.items():
        old = before[cell]
        assert run.info.run_id != old.info.run_id
        assert run.data.metrics == old.data.metrics, cell
        assert run.data.params == old.data.params
        assert second.home.artifacts(run) == first.home.artifacts(old)
        assert [e.dataset.digest for e in run.inputs.dataset_inputs] == [
            e.dataset.digest for e in old.inputs.dataset_inputs
        ]
    assert second.parent.data.metrics == first.parent.data.metrics
    assert second.home.artifacts(second.parent) == first.home.artifacts(first.parent)


def test_the_saved_view_shows_no_row_twice(first: Ran, second: Ran) -> None:
    """The second run's rows repeat the first's: MLflow's search with the view's filter finds the first's alone."""
    experiment = first.home.client.get_experiment(first.parent.info.experiment_id)
    wanted = json.loads(experiment.tags[VIEW_TAG])["searchFilter"]
    shown = first.home.client.search_runs([experiment.experiment_id], wanted)
    own = {run.info.run_id for run in first.home.cells(first.parent).values()}
    repeated = {run.info.run_id for run in first.home.cells(second.parent).values()}
    assert own <= {run.info.run_id for run in shown}
    assert not repeated & {run.info.run_id for run in shown}


def test_the_command_prints_table_answer_and_places(first: Ran, second: Ran) -> None:
    report = Path(first.summary["report"])
    lines = second.printed.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3 * 5  # heading, line, and five rows for each domain and their mean
    assert all(line in report.read_text(encoding="utf-8") for line in table)
    latest = second.home.folder / "reports" / "latest"
    assert f"report:  {latest / 'report.html'}" in lines
    assert latest.resolve() == report.parent.resolve()
    assert any("make ui" in line for line in lines)
    box = report.read_text(encoding="utf-8").splitlines()[2]
    assert box.removeprefix("> **Recommendation.** ") in lines


# ---- a changed setting


def new_stages(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """How many stages of each kind were computed in between; none may have been touched."""
    assert {name: after[name] for name in before} == before
    kinds = [name.partition("/")[0] for name in after.keys() - before.keys()]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_a_changed_setting_recomputes_what_depends_on_it(second: Ran) -> None:
    """DPO's β: two adapters (a domain each), their two evaluations in two halves, and the report."""
    home = second.home
    home.run(small(methods__dpo__beta=0.7))
    after = home.stages()
    assert new_stages(second.stages, after) == {"train": 2, "adaptation": 2, "retention": 2, "report": 1}
    cells = home.cells(home.parents()[-1])
    for (_, method), run in cells.items():
        tags = {name: value for name, value in run.data.tags.items() if name.startswith("cached.")}
        assert set(tags.values()) == {"False" if method == "dpo" else "True"}
    assert cells["academy", "dpo"].data.params["dpo.beta"] == "0.7"


# ---- a stage that fails


def test_a_failing_stage_stops_only_what_needs_it(second: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    home = second.home
    overrides = small(domains=("harmless",), methods=("dpo", "sft"), seeds=[7])
    known = len(home.parents())
    before = home.stages()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the GPU fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr("trl.DPOTrainer.__init__", broken)
        with pytest.raises(StagesFailedError) as error:
            home.run(overrides)
    assert "1 of" in str(error.value)
    assert "the GPU fell off the bus" in str(error.value)
    (parent,) = home.parents()[known:]
    assert parent.info.status == "FAILED"
    cells = home.cells(parent)
    assert cells["harmless", "dpo"].info.status == "FAILED"
    assert "adaptation/score" not in cells["harmless", "dpo"].data.metrics
    assert cells["harmless", "sft"].info.status == "FINISHED"
    assert "retention/mean" in cells["harmless", "sft"].data.metrics
    statuses = {run.info.run_name: run.info.status for run in home.children(parent)}
    assert {status for name, status in statuses.items() if name != "harmless · dpo · seed 7"} == {"FINISHED"}
    middle = home.stages()
    assert new_stages(before, middle) == {"train": 1, "adaptation": 1, "retention": 1}

    home.run(overrides)  # mended
    assert new_stages(middle, home.stages()) == {"train": 1, "adaptation": 1, "retention": 1, "report": 1}
    parent = home.parents()[-1]
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in home.children(parent)} == {"FINISHED"}
    assert home.cells(parent)["harmless", "sft"].data.tags["cached.train"] == "True"


def test_the_command_says_what_failed(second: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr("qadapter.training.supervised.train_sft", broken)
    overrides = small(domains=("harmless",), methods=("sft",), seeds=[8])
    arguments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    code, printed, errors = command(second.home, arguments)
    assert code == 1
    assert printed == ""
    message = errors[errors.index("error: ") :]
    assert "stages failed (what was finished is kept)" in message
    assert "the GPU fell off the bus" in message
    assert "Traceback" not in message


# ---- judges

JUDGED = {**SOURCES["harmless"], "judge_pairs": 12}


def judged(judge: str, **changes: Any) -> dict[str, Any]:
    """One adapter of one domain, and somebody other than the rule who judges its answers."""
    overrides = small(domains=("harmless",), methods=("sft",))
    overrides["sources"] = {"helpful": SOURCES["helpful"], "harmless": JUDGED}
    return overrides | {"evaluation.adaptation.judge": judge, "evaluation.adaptation.generate": 5} | changes


def test_a_reward_model_is_trained_and_judges(second: Ran) -> None:
    home = second.home
    settings = {"learning_rate": 1e-2, "max_steps": 2, "batch_size": 4, "max_length": 64}
    home.run(judged("reward-model", **{"evaluation.adaptation.reward_model": settings}))
    parent = home.parents()[-1]
    (judge,) = [run for run in home.children(parent) if run.info.run_name == "judge · harmless"]
    accuracy = judge.data.metrics["judge/accuracy"]
    assert 0 <= judge.data.metrics["judge/accuracy_low"] <= accuracy <= judge.data.metrics["judge/accuracy_high"] <= 1
    assert judge.data.metrics["judge/train_pairs"] == 12
    assert {entry.dataset.name for entry in judge.inputs.dataset_inputs} == {"harmless-judge"}
    for (_, method), run in home.cells(parent).items():
        figures = run.data.metrics
        assert figures["adaptation/judge_accuracy"] == accuracy
        assert (figures["adaptation/win_rate"] == 0.5) or method == "sft"
        assert figures["adaptation/undecided"] == 0
        table = json.loads((home.artifact_folder(run) / "answers.json").read_text())
        assert table["columns"] == ["prompt", "base", "reply", "verdict", "judge"]
        # Eight held-out prompts are answered, for the exact rule; as many as `generate` says are judged.
        assert [row[4] for row in table["data"]] == ["reward-model"] * 5 + ["none"] * 3
        assert {row[3] for row in table["data"][:5]} <= {"win", "tie", "loss"}


def test_an_endpoint_judges_and_is_never_asked_twice(second: Ran, capfd: pytest.CaptureFixture[str]) -> None:
    """Its key stands in no file of the workspace, nor in Prefect's database with its logs, nor in what is printed."""
    home = second.home
    with serving(longer) as server:
        endpoint_judges(home, server)
    APILogHandler().flush()
    database = Path(PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition(":///")[2])
    prefect = [database, *database.parent.glob(f"{database.name}-*")]  # the latest is in SQLite's log beside it
    assert any(b"evaluate-harmless-sft-0" in file.read_bytes() for file in prefect), "it has written there"
    files = [file for file in home.folder.rglob("*") if file.is_file()]
    assert len(files) > 100
    assert not [file for file in [*files, *prefect] if b"sk-not-to-be-found" in file.read_bytes()]
    assert "sk-not-to-be-found" not in "".join(capfd.readouterr())


def endpoint_judges(home: Home, server: FakeJudge) -> None:
    endpoint = {"url": server.url, "model": "fake", "api_key_variable": "QADAPTER_TEST_KEY", "timeout": 20.0}
    overrides = judged("endpoint", **{"evaluation.adaptation.endpoint": endpoint})
    with pytest.raises(QAdapterError, match="QADAPTER_TEST_KEY, which is not set"):
        home.run(overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QADAPTER_TEST_KEY", "sk-not-to-be-found")
        home.run(overrides)
        run = home.cells(home.parents()[-1])["harmless", "sft"]
        answers = [json.loads(line) for line in (home.artifact_folder(run) / "adaptation/answers.jsonl").open()][:5]
        differ = [row for row in answers if row["reply"].strip() != row["base"].strip()]
        assert differ
        assert len(server.requests) == 2 * len(differ) == run.data.metrics["cost/judge_calls"]
        assert set(server.keys) == {"Bearer sk-not-to-be-found"}
        for row in differ:
            assert row["verdict"] == ("win" if len(row["reply"].strip()) > len(row["base"].strip()) else "loss")
        home.run(overrides | {"evaluation.adaptation.endpoint.timeout": 30.0})  # judged anew, from known answers
    again = home.cells(home.parents()[-1])["harmless", "sft"]
    assert again.data.tags["cached.adaptation"] == "False"
    assert len(server.requests) == 2 * len(differ)
    assert again.data.metrics["adaptation/win_rate"] == run.data.metrics["adaptation/win_rate"]


# ---- a source out of reach


@pytest.mark.parametrize(("error", "tries"), [(UnreachableError, 3), (QAdapterError, 1)])
def test_only_a_source_out_of_reach_is_tried_again(
    harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[QAdapterError], tries: int
) -> None:
    asked: list[Any] = []

    def locate(*places: Any, **_: Any) -> Any:
        asked.append(places)
        raise error("nobody answers")

    monkeypatch.setattr(sources, "locate", locate)
    tracker = Tracker.for_project(tmp_path)
    context = RunContext(load_experiment("smoke"), StageStore(tmp_path), tracker, "none", tmp_path)

    @flow
    def preparing() -> None:
        prepare_data.with_options(retry_delay_seconds=0)(context, "helpful", None)

    with pytest.raises(error, match="nobody answers"):
        preparing()
    assert len(asked) == tries


# ---- side by side


def test_two_at_a_time_measure_the_same(first: Ran, tmp_path: Path) -> None:
    """Each stage has a process of its own then; nothing of what is measured may depend on it."""
    home = Home(tmp_path)
    home.run(small(domains=("harmless",), methods=("q-adapter", "replay"), parallel=2))
    (parent,) = home.parents()
    assert parent.info.status == "FINISHED"
    before, after = first.home.cells(first.parent), home.cells(parent)
    assert set(after) == {("harmless", method) for method in ("base", "q-adapter", "replay")}
    for cell, run in after.items():
        assert measured(run) == measured(before[cell]), cell


# ---- bad input


@dataclass(frozen=True)
class Bad:
    """A command that cannot work, and what its message has to say."""

    arguments: Callable[[Path], list[str]]
    expected: tuple[str, ...]


def own_source(name: str, content: str) -> Callable[[Path], list[str]]:
    """`smoke` on a file of one's own in place of the toy world."""

    def arguments(folder: Path) -> list[str]:
        (folder / name).write_text(content)
        source = json.dumps({"mine": {"path": str(folder / name)}})
        return [
            "toy_world=null",
            "helpful_sft=null",
            f"sources={source}",
            "domains={mine: {source: mine}}",
            "pretraining.corpus_sources=[mine]",
            "evaluation.retention.tasks=[leaderboard_ifeval]",
        ]

    return arguments


SAME = json.dumps({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: yes"})
BAD = {
    "unknown profile": Bad(lambda _: ["--profile", "smok"], ("no profile 'smok'", "did you mean 'smoke'?")),
    "unknown key": Bad(
        lambda _: ["training.max_step=5", "lora.rnk=2"],
        ("2 problems", "training.max_step: unknown key, did you mean 'max_steps'?", "lora.rnk: unknown key"),
    ),
    "missing data folder": Bad(
        lambda folder: ["--profile", "mini", "--data", str(folder / "nowhere")],
        ("nowhere", "does not exist"),
    ),
    "unknown format": Bad(own_source("pairs.csv", "a,b\n1,2\n"), ("sources.mine", "pairs.csv")),
    "no usable pair": Bad(
        own_source("pairs.jsonl", f"{SAME}\n" * 3),
        ("No usable preference pair", "pairs.jsonl", "3 read"),
    ),
    "no data folder given": Bad(
        lambda _: ["--profile", "mini"], ("'mini' needs a data folder", "make repro PROFILE=mini DATA=path/to/folder")
    ),
    "empty data folder": Bad(
        lambda folder: ["--profile", "mini", "--data", str(folder)], ("sources.helpful", "sources.academy", "gsm8k")
    ),
    "wrong type": Bad(lambda _: ["training.max_steps=many"], ("training.max_steps: Input should be a valid integer",)),
    "no override": Bad(lambda _: ["training.max_steps"], ("not of the form key.path=value",)),
    "unknown task": Bad(lambda _: ["evaluation.retention.tasks=[toy_fact]"], ("toy_fact", "did you mean toy_facts")),
    "no key for the judge": Bad(
        lambda _: [
            "evaluation.adaptation.judge=endpoint",
            "evaluation.adaptation.endpoint={url: https://judge.example/v1, model: m, api_key_variable: QADAPTER_NONE}",
        ],
        ("evaluation.adaptation.endpoint", "environment variable QADAPTER_NONE, which is not set"),
    ),
    "a judge without pairs": Bad(
        lambda _: ["evaluation.adaptation.judge=reward-model"],
        ("sources.academy.judge_pairs: 0, but evaluation.adaptation.judge is 'reward-model'",),
    ),
    "no benchmark for a task": Bad(
        lambda _: ["evaluation.retention.tasks=[toy_facts, gsm8k_reply_matching]"],
        (
            "gsm8k_reply_matching",
            "makes no benchmark",
            "harmless_preference",
            "toy_facts, toy_howtos, toy_refusals, toy_style_academy",
        ),
    ),
}


@dataclass(frozen=True)
class Refused:
    """What a refused command left behind."""

    code: int
    printed: str
    message: str
    home: Path


def check_refusal(name: str, refused: Refused) -> None:
    assert refused.code == 2
    assert refused.printed == ""
    assert refused.message.startswith("error: ")
    assert refused.message.count("error: ") == 1
    for expected in BAD[name].expected:
        assert expected in refused.message
    assert "Traceback" not in refused.message
    assert list(refused.home.iterdir()) == []  # no run, no database, no folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_runs(
    name: str, harness: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = Home(tmp_path_factory.mktemp("home"))
    check_refusal(name, Refused(*command(home, BAD[name].arguments(tmp_path_factory.mktemp("input"))), home.folder))


def test_bad_input_is_refused_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What no library prints while it is imported either."""
    name, home = "unknown profile", tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "QADAPTER_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    found = subprocess.run(
        [sys.executable, "-m", "qadapter", "run", *BAD[name].arguments(tmp_path)],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    check_refusal(name, Refused(found.returncode, found.stdout, found.stderr, home))


def test_a_traceback_for_those_who_ask(tmp_path: Path) -> None:
    code, _, errors = command(Home(tmp_path), ["--profile", "smok", "--traceback"])
    assert code == 2
    assert errors.startswith("Traceback")
    assert "error: there is no profile 'smok'" in errors


def test_a_deployments_bad_parameters_leave_no_run(harness: None, tmp_path: Path) -> None:
    """The flow itself refuses too: a worker calls it without the command line's check."""
    with pytest.raises(QAdapterError, match="unknown key"):
        Home(tmp_path).run({"training.max_step": 5})
    assert list(tmp_path.iterdir()) == []
