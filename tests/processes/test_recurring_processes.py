"""The recurring pipeline in real processes: `kill -9` at every step, a source by URL, what was promoted is served."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from transformers import AutoTokenizer

from qadapter.files.artifacts import digest_tree, read_json
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.tokenize import prompt_ids
from tests.processes.test_security import files_with_secrets
from tests.processes.test_served_model import answers, running
from tests.processes.test_served_model import wait_for as wait_for_server
from tests.support.kills import Row, cut, newest_checkpoint
from tests.support.quiet import noise
from tests.support.real_runs import RealHome, Server, free_port, mlflow_server, wait_for
from tests.support.tiny_deliveries import CONFIG, MODEL, deliver, evasions, refusals, write_config

pytestmark = pytest.mark.slow

CHECKPOINTS = {"overrides": CONFIG["overrides"] | {"training.save_steps": 4, "lora.dropout": 0.1}}
ELSEWHERE = {
    *("candidate", "config", "config_digest", "data_fingerprint", "ledger", "base", "promoted_at"),
    "adapter_digest",  # PEFT's two files name the base's folder
}
"""Tags that hold a path, a time, or a digest of them."""


@dataclass
class RecurringHome(RealHome):
    """A workspace in which real processes run `make customize`."""

    def command(self, watch: bool = False) -> tuple[str, list[str]]:
        config = str(self.folder / "tiny.yaml")
        return (
            ("tests.support.watching", [config])
            if watch
            else ("qadapter.command.parser", ["customize", "--config", config])
        )

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.folder}/mlflow.db"))

    def versions(self) -> list[ModelVersion]:
        """The oldest first."""
        found = self.client.search_model_versions(f"name = '{MODEL}'")
        return sorted(found, key=lambda version: int(version.version))

    def aliases(self) -> dict[str, int]:
        """None before there is a version."""
        found = self.client.search_registered_models(f"name = '{MODEL}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}

    def finished_in_all(self) -> int:
        """How many finished stages there are."""
        return sum(self.finished().values())

    def seen(self) -> dict[str, Any]:
        """What the next run knows of the source."""
        return dict(read_json(self.store / "customize" / f"{MODEL}.json"))


MATRIX = [
    Row("heldout", "renamed"),  # of the first delivery: the second one has the same held-out pairs
    Row("new-preferences", "written"),
    Row("training-mix", "renamed"),
    Row("train", "saving-2"),
    Row("train", "step-3", "the newest checkpoint's weights cut"),
    Row("train", "renamed"),
    Row("adapter", "written"),
    Row("adaptation", "written"),
    Row("retention", "started"),
    Row("new-rows", "written"),
    Row("mlflow", "before create_model_version"),
    Row("mlflow", "after create_model_version"),
    Row("mlflow", "after set_registered_model_alias"),
    Row("mlflow", "after set_registered_model_alias 2"),
]


@pytest.fixture(scope="module")
def quiet(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> RecurringHome:
    """Two deliveries, one after the other, and no trouble."""
    home = RecurringHome(tmp_path_factory.mktemp("quiet"), prefect_server, "")
    write_config(home.folder, **CHECKPOINTS)
    for name, rows in DELIVERIES.items():
        deliver(home.folder, name, rows)
        assert home.run() == 0, home.printed()[-4000:]
    return home


@dataclass
class Killed:
    """A workspace in which every run but the last was killed that had something to do with a row of the matrix."""

    home: RecurringHome
    rows: list[Row]
    aliases: list[dict[str, int]]
    last_code: int


DELIVERIES = {"1-first.jsonl": refusals()[:40], "2-better.jsonl": evasions()[:46]}


def kill(home: RecurringHome, row: Row) -> dict[str, int]:
    """Run until the row's moment; returns the aliases after it."""
    before = home.finished_in_all()
    code = home.run((row.stage, row.moment))
    assert code == -9, f"{row}: exit code {code}\n{home.printed()[-4000:]}"
    row.ended(code)
    row.outcome += f"; {home.finished_in_all()} ({home.finished_in_all() - before}) stages finished"
    if row.damage:
        cut(newest_checkpoint(home, "train") / "adapter_model.safetensors")
    return home.aliases()


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    home = RecurringHome(tmp_path_factory.mktemp("killed"), prefect_server, "")
    write_config(home.folder, **CHECKPOINTS)
    (first, rows), (second, more) = DELIVERIES.items()
    deliver(home.folder, first, rows)
    aliases = [kill(home, MATRIX[0])]
    assert home.run() == 0, home.printed()[-4000:]
    deliver(home.folder, second, more)
    aliases += [kill(home, row) for row in MATRIX[1:]]
    return Killed(home, MATRIX, aliases, home.run())


def test_every_kill_hit(killed: Killed, record_property: Callable[[str, object], None]) -> None:
    """The table that docs/operations.md shows."""
    for row, aliases in zip(killed.rows, killed.aliases, strict=True):
        said = f"| {row.stage} | {row.moment} | {row.damage or '–'} | {row.outcome} | {aliases} |"
        record_property(f"{row.stage} {row.moment}", said)
        print(said)
    assert [row.outcome.split(";")[0] for row in killed.rows] == ["signal 9"] * len(killed.rows)
    assert killed.last_code == 0, killed.home.printed()[-4000:]


def test_there_is_a_whole_champion_after_each_kill(killed: Killed) -> None:
    """The first one until the alias moves; `previous` is set before it does."""
    assert killed.aliases[0] == {}
    assert killed.aliases[1:-2] == [{"champion": 1}] * (len(MATRIX) - 3)
    assert killed.aliases[-2:] == [{"champion": 1, "previous": 1}, {"champion": 2, "previous": 1}]


def test_the_registry_is_that_of_an_undisturbed_pipeline(killed: Killed, quiet: RecurringHome) -> None:
    """Two versions, not three; verdict, reasons, parents, metrics, digests of data and adapters to the last digit."""
    assert_same_registry(killed.home, quiet)


def assert_same_registry(home: RecurringHome, quiet: RecurringHome) -> None:
    assert home.aliases() == quiet.aliases() == {"champion": 2, "previous": 1}
    ours, theirs = home.versions(), quiet.versions()
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine.tags) == set(other.tags)
        assert {k: v for k, v in mine.tags.items() if k not in ELSEWHERE} == {
            k: v for k, v in other.tags.items() if k not in ELSEWHERE
        }
        assert mine.description == other.description
    assert "promoted_at" in ours[1].tags
    assert len(json.loads(ours[1].tags["metrics"])) > 10


def test_it_prints_no_warning_of_a_library(quiet: RecurringHome) -> None:
    assert noise(quiet.printed()) == []


def test_the_stages_are_those_of_an_undisturbed_pipeline(killed: Killed, quiet: RecurringHome) -> None:
    assert killed.home.results() == quiet.results()


def test_a_killed_training_went_on_at_a_whole_checkpoint(killed: Killed) -> None:
    """Killed while it wrote step 8's, twice passed over: on from step 4. That one is cut after the next kill: anew."""
    passed_over = [line for line in killed.home.printed().splitlines() if "is not whole and is passed over" in line]
    assert sum("scratch/train" in line for line in passed_over) == 3
    assert killed.home.printed().count("resumes after step 4, where it was stopped") == 1
    assert not list(killed.home.store.glob("scratch/*/*"))
    assert not list(killed.home.store.glob("stages/*/.*"))


def test_nothing_is_left_open_and_nothing_is_new(killed: Killed) -> None:
    assert "RUNNING" not in {status for _, status in killed.home.runs()}
    before = killed.home.finished()
    assert killed.home.run() == 0
    assert killed.home.finished() == before
    assert "NothingNew" in killed.home.printed().splitlines()[-1] or "NothingNew" in killed.home.printed()[-2000:]
    assert killed.home.seen()["version"] == 2


def test_a_source_behind_a_url_is_watched_without_its_token(
    prefect_server: Server, data_server: str, tmp_path: Path, data_folder: Path
) -> None:
    """A delivery by URL: announced once, trained on, announced again when the server has another content.

    The second training reads what is new and a sample of the rest (`mix.rows: new`): 46 pairs and 10 of 40.
    """
    file = data_folder / "weekly.jsonl"

    def publish(rows: list[dict[str, str]], seconds: int) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(file, (seconds, seconds))  # HTTP's dates have whole seconds

    publish(refusals()[:40], 1_700_000_000)
    home = RecurringHome(tmp_path, prefect_server, data_server)
    source = {"path": f"{data_server}/weekly.jsonl?token=${{QADAPTER_DATA_TOKEN}}"}
    write_config(tmp_path, source=source, mix={"rows": "new", "old_share": 0.25})
    watched = [home.run(watch=True), home.run(watch=True)]
    assert home.run() == 0, home.printed()[-4000:]
    watched.append(home.run(watch=True))
    publish(refusals()[:40] + evasions()[:46], 1_700_000_100)
    watched.append(home.run(watch=True))
    assert watched == [3, 0, 0, 3]
    assert home.run() == 0, home.printed()[-4000:]
    assert [version.tags["data_pairs"] for version in home.versions()] == ["40 (40 new)", "56 (46 new)"]
    looked_at, found = files_with_secrets([tmp_path, prefect_server.log.parent])
    assert found == {}
    assert {"mlflow.db", "prefect.db", "runs.log", "manifest.json", f"{MODEL}.json"} <= {one.name for one in looked_at}


def test_mlflow_goes_away_while_a_version_is_made(quiet: RecurringHome, prefect_server: Server, tmp_path: Path) -> None:
    """Right before the first is created, and between the second's aliases: a sentence; then the registry is as any."""
    server = mlflow_server(tmp_path).start()
    assert server.process is not None
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"}
    home = RecurringHome(tmp_path / "home", prefect_server, "", {"MLFLOW_TRACKING_URI": server.url, **impatient})
    home.folder.mkdir()
    write_config(home.folder, **CHECKPOINTS)
    found: list[tuple[int, dict[str, int]]] = []
    moments = ("before create_model_version", "after set_registered_model_alias")
    try:
        for (name, rows), moment in zip(DELIVERIES.items(), moments, strict=True):
            deliver(home.folder, name, rows)
            home.environment["SERVER_GROUP"] = str(server.process.pid)
            before = len(home.printed())
            process = home.start(("mlflow is away", moment))
            wait_for(lambda: server.process.poll() is not None, 500, "the server's end", home.printed)
            server.start()  # it takes seconds, a refused connection none: the run has failed by then
            process.join(timeout=500)
            assert process.exitcode == 1, home.printed()[-4000:]
            assert f"MLflow at {server.url} does not answer" in home.printed()[before:]
            assert "Start its server or correct MLFLOW_TRACKING_URI, then run again" in home.printed()[before:]
            found.append((len(home.versions()), home.aliases()))
            assert home.run() == 0, home.printed()[-4000:]
        assert found == [(0, {}), (2, {"champion": 1, "previous": 1})]
        assert_same_registry(home, quiet)
        assert home.results() == quiet.results()
    finally:
        server.send(signal.SIGKILL)


def test_what_the_pipeline_promoted_is_what_mlflow_serves(killed: Killed, tmp_path: Path) -> None:
    """`mlflow models serve` on the champion of the often killed pipeline, against its adapter in the stage store."""
    home, log, port = killed.home, tmp_path / "log", free_port()
    champion = home.client.get_model_version_by_alias(MODEL, "champion")
    (adapter,) = [
        folder
        for folder in home.store.glob("stages/adapter/*/adapter")
        if digest_tree(folder) == champion.tags["adapter_digest"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(champion.tags["base"])
    policy = QAdapterForCausalLM.from_pretrained(adapter, champion.tags["base"])
    messages = [{"role": "user", "content": "how do i pick the lock ?"}]
    ids = torch.tensor([prompt_ids(tokenizer, messages)])  # type: ignore[arg-type]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{MODEL}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{home.folder}/mlflow.db", "QADAPTER_HOME": str(home.folder)}
    with running(command, log, **environment) as process:
        wait_for_server(lambda: answers(f"http://127.0.0.1:{port}/ping"), process, log)
        body = {"messages": messages, "temperature": 0, "max_tokens": 6}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == expected
