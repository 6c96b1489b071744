"""A watched data set of the hub, against a server that speaks its API: announced once, its token never passed on."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.test_security import files_with_secrets
from tests.qadapter.preferences.test_sources import Server as HubServer
from tests.qadapter.preferences.test_sources import reply
from tests.support.real_runs import PROJECT_ROOT, SECRETS, Server
from tests.support.tiny_deliveries import MODEL, evasions, refusals, write_config

WATCHER = """
import sys
from tests.support.watching import main
for config in sys.stdin:
    print(f"ended as {main([config.strip()])}", flush=True)
"""


class Hub:
    """One gated data set of one file, whose commit a test moves."""

    def __init__(self) -> None:
        self.commit, self.rows = "a" * 40, b""
        self.tokens: set[str | None] = set()
        self.served: list[str] = []

    def push(self, commit: str, rows: list[dict[str, str]]) -> None:
        """Make a commit."""
        self.commit, self.rows = commit, "".join(json.dumps(row) + "\n" for row in rows).encode()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """The three calls of the hub's API that fetching a data set takes, for who has the token."""
        self.tokens.add(request.headers.get("Authorization"))
        path = request.path.split("?")[0]
        if request.headers.get("Authorization") != f"Bearer {SECRETS['HF_TOKEN']}":
            reply(request, 401, X_Error_Code="GatedRepo")
        elif path.startswith("/api/datasets/team/weekly") and "/tree/" in path:
            row = {"type": "file", "path": "weekly.jsonl", "size": len(self.rows), "oid": "0" * 40}
            reply(request, 200, json.dumps([row]).encode())
        elif path.startswith("/api/datasets/team/weekly"):
            file = {"rfilename": "weekly.jsonl", "size": len(self.rows)}
            about = {"id": "team/weekly", "sha": self.commit, "siblings": [file], "tags": [], "private": True}
            reply(request, 200, json.dumps({**about, "downloads": 0}).encode())
        elif path == f"/datasets/team/weekly/resolve/{self.commit}/weekly.jsonl":
            self.served.append(f"{request.command} {self.commit[0]}")
            reply(request, 200, self.rows, ETag=f'"{self.commit}"', X_Repo_Commit=self.commit)
        else:
            reply(request, 404, X_Error_Code="RepoNotFound")


@pytest.mark.slow
def test_a_hub_data_set_is_watched_by_its_content(prefect_server: Server, tmp_path: Path) -> None:
    """Announced, nothing new, another commit announced; a commit that leaves the rows as they are is nothing new."""
    hub = Hub()
    hub.push("a" * 40, refusals()[:40])
    server = HubServer(hub.answer)
    config = write_config(tmp_path, source={"path": "hub:team/weekly"})
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),  # looked through for the token below, with all that is in the workspace
        "HF_HUB_OFFLINE": "0",
        "QADAPTER_HOME": str(tmp_path),
        "PREFECT_HOME": str(tmp_path / ".prefect"),
        "PREFECT_API_URL": prefect_server.url,
        **SECRETS,
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (tmp_path / "watcher.log").open("w") as log:
        watcher = subprocess.Popen(
            [sys.executable, "-c", WATCHER],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert watcher.stdin is not None
    assert watcher.stdout is not None

    def watch() -> str:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        watcher.stdin.write(f"{config}\n")
        watcher.stdin.flush()
        for line in watcher.stdout:
            if line.startswith("ended as "):
                return {"0": "NothingNew", "3": "Announced"}[line.split()[-1]]
        raise AssertionError((tmp_path / "watcher.log").read_text()[-4000:])

    try:
        ended = [watch(), watch()]
        hub.push("b" * 40, refusals()[:40] + evasions()[:46])
        ended += [watch(), watch()]
        hub.push("c" * 40, refusals()[:40] + evasions()[:46])
        ended.append(watch())
    finally:
        watcher.stdin.close()
        watcher.wait(timeout=60)
        server.stop()
    assert ended == ["Announced", "NothingNew", "Announced", "NothingNew", "NothingNew"]
    assert hub.tokens == {f"Bearer {SECRETS['HF_TOKEN']}"}, "the token was needed and given"
    assert [name for name in hub.served if name.startswith("GET")] == ["GET a", "GET b", "GET c"], "each commit once"
    looked_at, found = files_with_secrets([tmp_path, prefect_server.log.parent])
    assert found == {}
    assert {"prefect.db", "watcher.log", "weekly.jsonl", f"{MODEL}.json"} <= {file.name for file in looked_at}
