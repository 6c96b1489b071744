"""Real flow runs in processes of their own, with real servers: to be killed, stopped, and looked at from outside.

The processes are forked from one that has imported everything (`forked_run.py`): a real process each, started in
a moment.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_host.access import AUTH_VARIABLE, SERVER_AUTH_VARIABLE
from flows.running.forking import forking
from qadapter.files.artifacts import MANIFEST, Manifest, read_json
from qadapter.toyworld.world import ToyWorld
from tests.support.forked_process import ForkedProcess
from tests.support.own_servers import serve_mlflow, serve_prefect
from tests.support.paths import PROJECT_ROOT
from tests.support.prefect_tables import prefect_tables, shared_folder

OVERRIDES: dict[str, Any] = {
    "parallel": 1,
    "base_threads": None,
    "toy_world.corpus_size": 300,
    "sources": {
        "helpful": {"path": "{data}/hh-rlhf/helpful.jsonl.gz", "heldout": 0.2, "max_heldout_pairs": 8},
        "harmless": {
            "path": "{server}/harmless.jsonl?token=${QADAPTER_DATA_TOKEN}",
            "heldout_path": "{data}/hh-rlhf/harmless-heldout.jsonl",
            "max_heldout_pairs": 8,
        },
    },
    "domains": {"harmless": {"source": "harmless", "base": "helpful"}},
    "model.from_scratch.hidden_size": 16,
    "model.from_scratch.intermediate_size": 16,
    "model.from_scratch.layers": 1,
    "model.from_scratch.heads": 2,
    "pretraining": {
        "learning_rate": 2e-3, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "batch_size": 8, "max_length": 64
    },
    "helpful_sft": {
        "source": "helpful", "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "logging_steps": 1,
        "batch_size": 4, "max_length": 64,
    },
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},  # resuming has to restore the random state too
    "training": {
        "learning_rate": 1e-2, "max_steps": 5, "save_steps": 2, "logging_steps": 1, "batch_size": 2, "max_length": 64
    },
    "methods.run": ["q-adapter", "replay"],
    "methods.replay.max_new_tokens": 3,
    "evaluation.retention": {"tasks": ["toy_facts"], "limit": 8, "max_new_tokens": 3, "answers": 2},
    "evaluation.adaptation": {"batch_size": 64, "max_new_tokens": 3},
}  # fmt: skip
"""The smoke profile, cut to what seconds can train, with checkpoints, and one source behind a token."""

SECRETS = {
    "HF_TOKEN": "hf_canaryAbCdEf0123456789",
    "OPENAI_API_KEY": "sk-canary-0123456789abcdef",
    "QADAPTER_DATA_TOKEN": "canary-of-the-data-server",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflows-password",
    "MLFLOW_TRACKING_TOKEN": "canary-of-mlflows-token",
    AUTH_VARIABLE: "canary-of-prefects-auth-string",
}
"""In the environment of every run; `test_security.py` looks for them in all that the undisturbed runs wrote."""


_PLACES = {
    "metrics.json", "sweep.csv", "continual.md", "continual.html", "adapter_config.json", "README.md"
}  # fmt: skip
"""Files with costs; and PEFT's two, which name the base's folder."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Server:
    """A server as a process, which can be killed and started again on the same port and files."""

    command: list[str]
    url: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | ForkedProcess | None = None
    target: Callable[..., None] | None = None
    """What a forked process does, given the command; without it the command starts a process."""

    def start(self) -> Server:
        """Start it and wait until it answers."""
        environment = os.environ | self.environment
        if self.target is not None:
            self.process = ForkedProcess(
                self.target, *self.command, cwd=PROJECT_ROOT, env=environment, stdout=self.log, own_group=True
            )
        else:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=PROJECT_ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        wait_for(self._answers, 240, f"an answer of {self.url}", lambda: self.log.read_text(errors="replace")[-3000:])
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and all it started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


def wait_for(condition: Callable[[], Any], seconds: float, what: str, more: Callable[[], str] = str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:.0f} s\n{more()}"
        time.sleep(0.05)


def mlflow_server(folder: Path, files: str | None = None) -> Server:
    """MLflow's own server, not started yet, with its database in a folder, its files there or at the URL `files`."""
    port = free_port()
    destination = files or str(folder / "files")
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", destination]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = folder / "mlflow-server.log"
    return Server([*store, *where], f"http://127.0.0.1:{port}", log, environment, target=serve_mlflow)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server with its database, for all real runs of the session."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    command = ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_UI_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        AUTH_VARIABLE: SECRETS[AUTH_VARIABLE],
        SERVER_AUTH_VARIABLE: SECRETS[AUTH_VARIABLE],
    }
    server = Server(command, f"http://127.0.0.1:{port}/api", folder / "server.log", environment, target=serve_prefect)
    with prefect_tables(folder / "prefect.db", shared_folder(tmp_path_factory)):
        server.start()
    try:
        yield server
    finally:
        server.send(signal.SIGCONT)
        server.send(signal.SIGKILL)


class _Data(http.server.SimpleHTTPRequestHandler):
    """Hands out files to those who have the token."""

    def do_GET(self) -> None:
        if SECRETS["QADAPTER_DATA_TOKEN"] not in self.path:
            self.send_error(403)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `data_server` hands out."""
    folder = tmp_path_factory.mktemp("data")
    ToyWorld(0).write(folder, corpus_size=300)
    return folder / "hh-rlhf"


@pytest.fixture(scope="session")
def data_server(data_folder: Path) -> Iterator[str]:
    """Address of a server with the toy world's harmless pairs, behind a token."""
    handler = partial(_Data, directory=str(data_folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@dataclass
class RealHome:
    """A workspace in which real processes run flows."""

    folder: Path
    prefect: Server
    data: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What all runs printed."""
        return self.folder / "runs.log"

    @property
    def store(self) -> Path:
        return self.folder / ".qadapter"

    def command(self, **changes: Any) -> tuple[str, list[str]]:
        """The module that a process runs, and its arguments; `changes` are overrides, `__` for the dot."""
        overrides = OVERRIDES | {name.replace("__", "."): value for name, value in changes.items()}
        texts = (f"{key}={json.dumps(value)}" for key, value in overrides.items())
        return "qadapter.command.parser", [
            "run",
            "--profile",
            "smoke",
            *(text.replace("{server}", self.data) for text in texts),
        ]

    def start(self, doom: tuple[str, str] | None = None, **changes: Any) -> Any:
        """Start the command's work in a process.

        Args:
            doom: (stage, moment) at which it kills itself with its whole group; see `tests/support/forked_run.py`.
            changes: as `command` takes them.
        """
        module, arguments = self.command(**changes)
        environment = {
            "QADAPTER_HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / ".prefect"),
            "PREFECT_API_URL": self.prefect.url,
            **SECRETS,
        } | self.environment
        from tests.support.forked_run import run

        with _environment(environment):
            process = forking().Process(target=run, args=(module, arguments, environment, str(self.log), doom))
            process.start()
        return process

    def run(self, doom: tuple[str, str] | None = None, **changes: Any) -> int:
        """Run to the end, or to its doom; returns the exit code, negative for a signal."""
        process = self.start(doom, **changes)
        process.join(timeout=500)
        assert process.exitcode is not None, self.printed()[-4000:]
        return int(process.exitcode)

    def printed(self) -> str:
        """All that the runs printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def finished(self) -> dict[str, int]:
        """How many finished stages there are, by name."""
        found: dict[str, int] = defaultdict(int)
        for manifest in self.store.glob(f"stages/*/[!.]*/{MANIFEST}"):
            found[manifest.parent.parent.name] += 1
        return dict(found)

    def results(self) -> dict[str, list[str]]:
        """All that was computed, byte for byte, but for costs and paths: by stage, in no particular order."""
        found: dict[str, list[str]] = defaultdict(list)
        for file in self.store.glob(f"stages/*/[!.]*/{MANIFEST}"):
            folder, manifest = file.parent, Manifest.read(file.parent)
            assert manifest.verify(folder) == []
            files = {name: entry["sha256"] for name, entry in manifest.files.items() if Path(name).name not in _PLACES}
            metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
            measured = {name: value for name, value in metrics.items() if "cost/" not in name}
            # A report shows costs in every file; its metrics say the rest.
            about = {"metrics": measured, "files": {} if manifest.stage == "report" else files}
            found[manifest.stage].append(json.dumps(about, sort_keys=True))
        return {stage: sorted(entries) for stage, entries in found.items()}

    def runs(self) -> list[tuple[str, str]]:
        """(name, status) of all MLflow runs of the workspace's own database, oldest first."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            return list(database.execute("SELECT name, status FROM runs ORDER BY start_time"))

    def measured(self) -> dict[str, dict[str, float]]:
        """What MLflow shows of the newest flow run: run name → metrics, costs left out."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            ((parent,),) = database.execute(
                "SELECT run_uuid FROM runs WHERE run_uuid NOT IN (SELECT run_uuid FROM tags WHERE key = "
                "'mlflow.parentRunId') ORDER BY start_time DESC LIMIT 1"
            )
            rows = database.execute(
                "SELECT r.name, m.key, m.value FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
                "JOIN latest_metrics m ON m.run_uuid = r.run_uuid "
                "WHERE t.key = 'mlflow.parentRunId' AND t.value = ? AND m.key NOT LIKE 'cost/%'",
                (parent,),
            )
            found: dict[str, dict[str, float]] = defaultdict(dict)
            for name, key, value in rows:
                found[name][key] = value
        return dict(found)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in changes.items():
            patch.setenv(name, value)
        yield


@dataclass
class Undisturbed:
    """Two runs of the same experiment that were started at the same moment in one workspace, and had no trouble."""

    home: RealHome
    codes: tuple[int, int]


@pytest.fixture(scope="session")
def undisturbed(prefect_server: Server, data_server: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What every disturbed run has to come to."""
    home = RealHome(tmp_path_factory.mktemp("undisturbed"), prefect_server, data_server)
    both = [home.start(), home.start()]
    for process in both:
        process.join(timeout=500)
    assert all(process.exitcode is not None for process in both), home.printed()[-4000:]
    return Undisturbed(home, (both[0].exitcode, both[1].exitcode))
