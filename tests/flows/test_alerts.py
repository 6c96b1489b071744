"""Alerts: what fires them, and that each kind arrives: a real Prefect server, local HTTP and SMTP."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import State

from flows.check_champion import NAME as CHECK
from flows.check_champion import check_champion
from flows.commands.alerts import ADDRESS_VARIABLE, FOLDER, kinds
from flows.continual import continual
from flows.customize import NAME as CUSTOMIZE
from flows.full_paper_repro import full_paper_repro
from flows.running.outcomes import OUTCOMES, ended
from flows.sweep import sweep
from flows.watch_preferences import watch_preferences
from qadapter.command.parser import main

UNFINISHED = {"Failed", "Crashed", "TimedOut"}


def automation(kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{kind}.yaml").read_text(encoding="utf-8"))
    return settings


@pytest.mark.parametrize("kind", kinds())
def test_an_alert_fires_on_what_needs_attention(kind: str) -> None:
    """The outcomes with an exit code, and runs that did not get to their end; of every flow of the project."""
    trigger = automation(kind)["trigger"]
    wanted = {name for name, outcome in OUTCOMES.items() if outcome.exit_code} | UNFINISHED
    assert set(trigger["expect"]) == {f"prefect.flow-run.{name}" for name in wanted}
    every = [CUSTOMIZE, *(one.name for one in (check_champion, watch_preferences, full_paper_repro, sweep, continual))]
    assert sorted(trigger["match_related"]["prefect.resource.name"]) == sorted(every)
    assert (FOLDER / f"{kind}.yaml").read_text().startswith(f"# qadapter alerts {kind} --url ")


class _Hook(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Mail(socketserver.StreamRequestHandler):
    """As much of SMTP as a client needs to deliver; keeps the messages."""

    def handle(self) -> None:
        self.wfile.write(b"220 test\r\n")
        while line := self.rfile.readline():
            word = line.split()[0].upper() if line.split() else b""
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = []
                while (line := self.rfile.readline()) != b".\r\n":
                    lines.append(line)
                self.server.heard.append(b"".join(lines).decode())  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 OK\r\n")


@contextmanager
def listening(handler: type[socketserver.BaseRequestHandler]) -> Iterator[tuple[int, list[Any]]]:
    """A port of loopback, and what arrives there."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.heard = []  # type: ignore[attr-defined]
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], server.heard  # type: ignore[attr-defined]
        server.shutdown()


def arrived(heard: list[Any], *words: str) -> Any:
    """The first message with these words in it."""
    deadline = time.monotonic() + 60
    while not (found := [message for message in heard if all(word in str(message) for word in words)]):
        assert time.monotonic() < deadline, heard
        time.sleep(0.1)
    return found[0]


@flow(name=CUSTOMIZE)
def rejecting() -> State[Any]:
    return ended("Rejected", 'facts down by "0.2"')


@flow(name=CHECK)
def falling() -> State[Any]:
    return ended("Fell", "version 2: retention fell")


@flow(name=CHECK)
def failing() -> None:
    raise ValueError("no space")


@flow(name="somebody-elses")
def foreign() -> None:
    raise ValueError("not ours")


def test_each_kind_arrives(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", str(prefect_client.api_url))
    with listening(_Hook) as (port, posted), listening(_Mail) as (smtp, mailed):
        assert main(["alerts", "slack", "--url", f"http://127.0.0.1:{port}/slack"]) == 0
        monkeypatch.setenv(ADDRESS_VARIABLE, f"http://127.0.0.1:{port}/hook?token=secret")
        assert main(["alerts", "webhook"]) == 0
        monkeypatch.delenv(ADDRESS_VARIABLE)
        mail = f"mailto://127.0.0.1:{smtp}?from=bot@example.org&to=me@example.org&mode=insecure"
        assert main(["alerts", "email", "--url", mail]) == 0
        said = capsys.readouterr()
        assert said.out.count("; the first message was sent") == 3, said.err
        assert [path for path, _ in posted] == ["/slack", "/hook?token=secret"]
        assert "alerts are on" in mailed[0]
        foreign(return_state=True)
        rejecting(return_state=True)
        _, body = arrived(posted, "/slack", "Rejected")
        assert body["text"].startswith("customize-on-new-preferences: Rejected\n")
        assert body["text"].endswith(': facts down by "0.2"')
        _, body = arrived(posted, "/hook", "Rejected")
        assert body["subject"] == "customize-on-new-preferences: Rejected"
        assert "Rejected" in arrived(mailed, "Rejected")
        falling(return_state=True)
        failing(return_state=True)
        assert "version 2: retention fell" in arrived(posted, "/hook", "Fell")[1]["body"]
        assert "no space" in arrived(posted, "/hook", "check-champion: Failed")[1]["body"]
        assert not [message for message in [*posted, *mailed] if "not ours" in str(message)]
        # The address is in no automation and in no block that can be read; the command again replaces the alert.
        assert main(["alerts", "slack", "--url", f"http://127.0.0.1:{port}/other"]) == 0
        (entry,) = prefect_client.read_automations_by_name("qadapter-slack")
        assert f":{port}" not in entry.model_dump_json()
        for kind in kinds():
            assert main(["alerts", kind, "--remove"]) == 0
            assert prefect_client.read_automations_by_name(f"qadapter-{kind}") == []


def test_what_cannot_be_sent_creates_nothing(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", str(prefect_client.api_url))
    for arguments, expected in (
        (["slak", "--url", "https://x"], "there is no alert 'slak', did you mean 'slack'?"),
        (["slack"], "where should the alert go? Give --url"),
        (["email", "--url", "me@example.org"], "of email alerts should begin with mailtos:// or mailto://"),
        (["webhook", "--url", "http://127.0.0.1:9/x"], "the first message could not be sent to http://127.0.0.1:9/x"),
        (["webhook", "--remove"], "there is no webhook alert on the server"),
    ):
        assert main(["alerts", *arguments]) == 2
        assert expected in capsys.readouterr().err.splitlines()[-1]
    assert prefect_client.read_automations_by_name("qadapter-webhook") == []
