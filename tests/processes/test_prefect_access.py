"""Who gets at the Prefect servers of this project: web pages, other users' servers, orphans, readers of its files."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from flows import environment as flow_environment
from flows.prefect_host import server_process
from flows.prefect_host.access import (
    AUTH_FILE,
    AUTH_VARIABLE,
    PROOF_PATH,
    SERVER_AUTH_VARIABLE,
    Standing,
    auth_string,
    proof,
    standing,
)
from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from tests.support.browser import opened, page_of_another_origin
from tests.support.modes import others_modes
from tests.support.own_servers import serve_prefect
from tests.support.paths import PROJECT_ROOT
from tests.support.prefect_tables import prefect_tables, shared_folder
from tests.support.real_runs import Server, free_port

AUTH = "the-auth-string-of-this-test"
HEADERS = {"Authorization": f"Basic {base64.b64encode(AUTH.encode()).decode()}"}
SECRET = "the-value-of-a-secret-block"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of `make serve`, pages and all, with a deployment and a secret block on it."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "DO_NOT_TRACK": "1",
        AUTH_VARIABLE: AUTH,
        SERVER_AUTH_VARIABLE: AUTH,
    }
    command, log = ["--host", "127.0.0.1", "--port", str(port)], folder.parent / "server.log"
    started = Server(command, environment["PREFECT_API_URL"], log, environment, target=serve_prefect)
    with prefect_tables(folder / "prefect.db", shared_folder(tmp_path_factory)):
        started.start()
    try:
        with httpx.Client(base_url=started.url, headers=HEADERS, timeout=60) as client:
            flow = client.post("/flows/", json={"name": "victim"}).raise_for_status().json()["id"]
            pool = {"name": "victim", "type": "process"}
            client.post("/work_pools/", json=pool).raise_for_status()
            deployment = {"name": "victim", "flow_id": flow, "work_pool_name": "victim"}
            client.post("/deployments/", json=deployment).raise_for_status()
            kind = client.get("/block_types/slug/secret").raise_for_status().json()["id"]
            schema = client.post("/block_schemas/filter", json={"block_schemas": {"block_type_id": {"any_": [kind]}}})
            block = {"name": "victim", "block_type_id": kind, "block_schema_id": schema.json()[0]["id"]}
            client.post("/block_documents/", json=block | {"data": {"value": SECRET}}).raise_for_status()
        yield started
    finally:
        started.send(signal.SIGKILL)


ATTACKS = """<html><body><pre></pre><script>
(async () => {
  const said = [], api = API, headers = HEADERS;
  async function ask(what, method, path, body, options = {}) {
    try {
      const answer = await fetch(api + path, {method, body: body && JSON.stringify(body), headers, ...options});
      const text = await answer.text();
      said.push(what + ": " + answer.type + " " + answer.status + " " + text.slice(0, 300));
      return JSON.parse(text);
    } catch (error) { said.push(what + ": " + error); return []; }
  }
  const listed = await ask("list", "POST", "/deployments/filter", {});
  const id = (listed[0] || {id: DEPLOYMENT}).id, run = `/deployments/${id}/create_flow_run`;
  const variables = {state: {type: "SCHEDULED"}, job_variables: {command: "touch /tmp/owned"}};
  await ask("run", "POST", run, variables);
  await ask("run without asking", "POST", run, variables, {mode: "no-cors", headers: {"Content-Type": "text/plain"}});
  await ask("block", "GET", "/block_types/slug/secret/block_documents/name/victim?include_secrets=true");
  await ask("proof", "GET", "/../qadapter/proof?challenge=0");
  document.querySelector("pre").textContent = said.join("\\n") + "\\nthe end";
})();
</script></body></html>"""


def runs_of(server: Server) -> int:
    answer = httpx.post(f"{server.url}/flow_runs/count", json={}, headers=HEADERS, timeout=30).raise_for_status()
    return int(answer.json())


def deployment_of(server: Server) -> str:
    found = httpx.post(f"{server.url}/deployments/filter", json={}, headers=HEADERS, timeout=30).raise_for_status()
    return str(found.json()[0]["id"])


def attack(server: Server, headers: dict[str, str]) -> str:
    page = ATTACKS.replace("API", json.dumps(server.url)).replace("DEPLOYMENT", json.dumps(deployment_of(server)))
    return page.replace("HEADERS", json.dumps({"Content-Type": "application/json", **headers}))


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, HEADERS], ids=["knows nothing", "knows the auth string"])
def test_a_page_of_another_origin_gets_nothing(server: Server, headers: dict[str, str], tmp_path: Path) -> None:
    """A real browser: a page on another port lists, starts a run with a command, reads a block; the guard refuses all.

    It refuses by origin, before the auth string is looked at.
    """
    before = runs_of(server)
    with page_of_another_origin(attack(server, headers)) as url:
        said = opened(url, tmp_path / "profile")
    lines = said.splitlines()
    assert lines[-1] == "the end", said
    refused = "TypeError: Failed to fetch"
    asked = ("list", "run", "run without asking", "block", "proof")
    assert lines[:-1] == [f"{what}: {refused}" for what in asked], said
    assert runs_of(server) == before


@pytest.mark.slow
def test_a_page_under_a_rebound_name_gets_nothing(server: Server, tmp_path: Path) -> None:
    """DNS rebinding: the attacker's name means 127.0.0.1, so the browser takes the server for the page's own."""
    port = server.url.split(":")[2].split("/")[0]
    said = opened(f"http://evil.test:{port}/api/health", tmp_path / "profile", names="MAP evil.test 127.0.0.1")
    assert said == "This server does not answer under that Host name."


@pytest.mark.slow
def test_its_own_page_asks_for_the_auth_string(server: Server, tmp_path: Path) -> None:
    """Prefect's pages pass the guard; they load their settings and show the login form."""
    assert "Login" in opened(server.url.removesuffix("/api") + "/", tmp_path / "profile")


@pytest.mark.slow
def test_the_same_requests_with_the_auth_string_work(server: Server) -> None:
    """And without it, none of them does (401)."""
    block = "/block_types/slug/secret/block_documents/name/victim?include_secrets=true"
    run = f"/deployments/{deployment_of(server)}/create_flow_run"
    variables = {"state": {"type": "SCHEDULED"}, "job_variables": {"command": "true"}}
    before = runs_of(server)
    for method, path, body in (("POST", "/deployments/filter", {}), ("POST", run, variables), ("GET", block, None)):
        for headers, expected in (({}, {401}), ({"Authorization": "Basic d3Jvbmc="}, {401}), (HEADERS, {200, 201})):
            answer = httpx.request(method, server.url + path, json=body, headers=headers, timeout=30)
            assert answer.status_code in expected, (path, answer.text)
    assert SECRET in answer.text
    assert runs_of(server) == before + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.test"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1.evil.test:{port}"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}.evil.test"}, 403),
        ({"Host": "LOCALHOST:{port}", "Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({}, 200),
    ],
)
def test_hosts_and_origins(server: Server, headers: dict[str, str], status: int) -> None:
    port = server.url.split(":")[2].split("/")[0]
    filled = {name: value.replace("{port}", port) for name, value in headers.items()}
    answer = httpx.get(f"{server.url}/health", headers=filled, timeout=30)
    assert answer.status_code == status
    assert answer.headers["x-frame-options"] == "DENY"
    if status == 403:
        assert "access-control-allow-origin" not in answer.headers
    socket_headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    socket_headers["Sec-WebSocket-Protocol"] = "prefect"  # which then asks for the auth string
    upgrade = socket_headers | {"Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(), **filled}
    with httpx.stream("GET", f"{server.url}/events/in", headers=upgrade, timeout=30) as answer:
        assert answer.status_code == (101 if status == 200 else 403)


# ---- MLflow's pages

_MLFLOW_ATTACK = """<html><body><pre></pre><script>
(async () => {
  const said = [], path = URL + "/ajax-api/2.0/mlflow/experiments/";
  for (const [what, method, body] of [["search?max_results=5", "GET", null], ["create", "POST", {name: "theirs"}]]) {
    try { said.push(await (await fetch(path + what, {method, body: body && JSON.stringify(body),
        headers: body ? {"Content-Type": "application/json"} : {}})).text()); }
    catch (error) { said.push(what + ": " + error); }
  }
  document.querySelector("pre").textContent = said.join("\\n") + "\\nthe end";
})();
</script></body></html>"""


@pytest.mark.slow
def test_a_page_on_another_port_gets_nothing_of_mlflow(tmp_path: Path) -> None:
    """MLflow itself lets every page on this machine read and write; `make ui` starts it behind the guard."""
    (line,) = re.findall(r"(?s)\$\(BIN\)/mlflow (server .*?)\n\n", (PROJECT_ROOT / "Makefile").read_text())
    port = free_port()
    line = line.replace("\\\n", " ").replace("5000", str(port)).replace("$(CURDIR)", str(tmp_path))
    metadata = tmp_path / "qadapter_ui-0.dist-info"  # the entry point as setup.py has it, installed or not
    metadata.mkdir()
    (point,) = re.findall(r'"mlflow.app": \["(.*?)"\]', (PROJECT_ROOT / "setup.py").read_text())
    (metadata / "entry_points.txt").write_text(f"[mlflow.app]\n{point}\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qadapter-ui\nVersion: 0\n")
    environment = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT_ROOT}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", *shlex.split(line), "--workers", "1"]
    server = Server(command, f"http://127.0.0.1:{port}", tmp_path / "mlflow.log", environment).start()
    try:
        with page_of_another_origin(_MLFLOW_ATTACK.replace("URL", json.dumps(server.url))) as url:
            said = opened(url, tmp_path / "profile").splitlines()
        refused = "TypeError: Failed to fetch"
        assert said == [f"search?max_results=5: {refused}", f"create: {refused}", "the end"]
        search = f"{server.url}/ajax-api/2.0/mlflow/experiments/search?max_results=5"
        for headers, status in (({}, 200), ({"Origin": server.url}, 200), ({"Host": "evil.test"}, 403)):
            assert httpx.get(search, headers=headers, timeout=30).status_code == status
        names = [experiment["name"] for experiment in httpx.get(search, timeout=30).json()["experiments"]]
        assert names == ["Default"]
        pages = httpx.get(server.url, timeout=30)
        assert (pages.status_code, pages.headers["x-frame-options"]) == (200, "DENY")
        # The side bar is that of model training; that of GenAI, MLflow's own choice, has no registry of models.
        assert "Model registry" in opened(f"{server.url}/#/experiments/0/runs", tmp_path / "profile")
    finally:
        server.send(signal.SIGKILL)


def test_no_file_of_the_server_is_open_to_others(server: Server) -> None:
    folder = Path(server.environment["PREFECT_HOME"])
    assert (folder / "prefect.db").exists()
    assert others_modes(folder) == {}


# ---- other users' servers


class _Other(http.server.BaseHTTPRequestHandler):
    """What another user of this machine may run on the port: it says yes to everything, and notes what it is sent."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(f"{self.path} {self.headers.get('Authorization')}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"true")

    do_POST = do_GET  # noqa: N815 - the server's own name

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of such a server, named as the project's, and what it was sent."""
    handler = type("Other", (_Other,), {"seen": []})
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        yield url, handler.seen  # type: ignore[attr-defined]
        server.shutdown()


@pytest.mark.parametrize("command", ["serve", "run", "customize", "announce"])
def test_another_users_server_is_not_used(
    command: str, other: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2; and it was not sent the auth string."""
    url, seen = other
    commands = {
        "serve": lambda: main(["up"]),
        "run": lambda: main(["run", "--profile", "smoke"]),
        "customize": lambda: main(["customize"]),
        "announce": lambda: main(["announce"]),
    }
    assert commands[command]() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: The server that answers at {url} does not know this project's auth string")
    assert seen
    assert all(line.endswith(" None") for line in seen), "no Authorization was sent"
    assert auth_string(tmp_path / "prefect") not in "".join(seen)


def test_prefects_command_line_does_not_speak_to_it(other: tuple[str, list[str]], tmp_path: Path) -> None:
    """`prefect deployment ls` in the project's folder: the plugin stops it. What needs no server still works."""
    url, seen = other
    auth_string(tmp_path / "prefect")
    prefect = str(Path(sys.executable).with_name("prefect"))
    refused = subprocess.run(
        [prefect, "deployment", "ls"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=90
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.strip().splitlines()[-1].startswith(f"error: The server that answers at {url} does not know")
    assert [line.partition("?")[0] for line in seen] == [PROOF_PATH]
    subprocess.run([prefect, "config", "view"], cwd=PROJECT_ROOT, capture_output=True, check=True, timeout=90)


def test_a_proof_is_of_one_port_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that passes the challenge on to the real one, on another port, has no proof."""
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    auth = auth_string(tmp_path)
    assert proof(auth, "c", 1) != proof(auth, "c", 2)
    assert proof(auth, "c", 1) != proof(auth, "d", 1) != proof("another", "d", 1)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\x00\xff" * 200])
def test_what_is_no_server_of_prefect_is_foreign(answer: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65_536)
                    connection.sendall(answer)

        threading.Thread(target=talk, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        assert standing(url, tmp_path) is Standing.FOREIGN
        listener.shutdown(socket.SHUT_RDWR)
    assert standing("http://127.0.0.1:9/api", tmp_path) is Standing.ABSENT


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://192.0.2.1:9/api", "http://no-such-host.invalid/api"])
@pytest.mark.parametrize("command", ["run", "customize", "announce"])
def test_a_dead_address_is_one_sentence(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.prefect_host.access._PROBE_SECONDS", 0.5)
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    assert main([command]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"error: No Prefect server answers at {url}. Start it (`make serve`)")
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("command", ["run", "customize", "check"])
def test_a_dead_mlflow_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a Prefect server or a flow run is started, and without the address' password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_API_URL", "")
    assert main([command]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: MLflow at http://127.0.0.1:9 does not answer")
    assert not any("Traceback" in line or "pa55word" in line for line in said)
    assert not (tmp_path / "prefect").exists()


# ---- the auth string


def test_the_auth_string_is_generated_once_and_for_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By many threads at once; a file that others could read, or an empty one, is refused."""
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    home, found = tmp_path / "prefect", []
    threads = [threading.Thread(target=lambda: found.append(auth_string(home))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert len(found[0]) >= 43, "256 bits"
    assert others_modes(home) == {}
    assert [file.name for file in home.iterdir()] == [AUTH_FILE]
    (home / AUTH_FILE).chmod(0o640)
    with pytest.raises(QAdapterError, match=r"auth-string has mode 0640: other users may have read"):
        auth_string(home)
    (home / AUTH_FILE).chmod(0o600)
    (home / AUTH_FILE).write_text("\n")
    with pytest.raises(QAdapterError, match="is empty"):
        auth_string(home)


# ---- a temporary server ends with the process that started it

_RUN = """
import os, sys, time
from flows.environment import prepare_environment
prepare_environment()
from flows.prefect_host.server import prefect_server
with prefect_server():
    from prefect.client.orchestration import get_client
    with get_client(sync_client=True) as client:
        assert client.api_healthcheck() is None
        client.read_flow_runs(limit=1)
    print(os.environ["PREFECT_API_URL"], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_temporary_server_ends_with_its_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One run is stopped (TERM), one killed, one ends as a file that shrinks does (BUS); they share a database."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGBUS):
        with ExitStack() as tables:
            if not (tmp_path / "prefect.db").exists():
                tables.enter_context(prefect_tables(tmp_path / "prefect.db", shared_folder(tmp_path_factory)))
            process = start_a_run(tmp_path)
            assert process.stdout is not None
            url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        (server,) = psutil.Process(process.pid).children(recursive=True)
        assert httpx.post(f"{url}/flow_runs/filter", json={}, timeout=30).status_code == 401
        assert httpx.get(f"{url}/health", headers={"Origin": "http://evil.test"}, timeout=30).status_code == 403
        assert others_modes(tmp_path) == {}
        os.kill(process.pid, number)
        assert process.wait(timeout=30) == -number
        _, alive = psutil.wait_procs([server], timeout=server_process.SECONDS_TO_END + 5)
        assert alive == [], number.name


def start_a_run(home: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_API_URL": ""}
    for name in (AUTH_VARIABLE, SERVER_AUTH_VARIABLE):
        environment.pop(name, None)
    command = [sys.executable, "-c", _RUN]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, text=True)


# ---- what Prefect keeps of a failed run


@flow
def failing() -> None:
    raise QAdapterError("what went wrong")


def test_a_failed_run_leaves_no_pickle(harness: None, tmp_path: Path) -> None:
    """Prefect stores the exception of every failed flow run; as JSON, in the project's folder and in its commands."""
    assert flow_environment._ENVIRONMENT["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        state = failing(return_state=True)
    assert state.is_failed()
    (file,) = [file for file in tmp_path.iterdir() if file.is_file()]
    expected = {"__exc_type__": "qadapter.errors.QAdapterError", "message": "what went wrong"}
    assert json.loads(file.read_text()) == expected
    with pytest.raises(QAdapterError, match="what went wrong"):
        state.result()
