"""A registered version is served on a machine that has no network but loopback, by the kernel's word."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes.test_served_model import MESSAGES, NEW, Registered, registered
from tests.support.real_runs import PROJECT_ROOT, free_port

__all__ = ["registered"]  # the fixture: a store with one version

ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "alone"]
"""Before a command: it runs in a network of its own, whose only device is loopback."""

CLIENT = """
import errno, json, socket, subprocess, sys, time
import httpx
ready, url, body, command = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
else:
    sys.exit("there is a network")
server = subprocess.Popen(command, stdout=sys.stderr)
try:
    while True:
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(ready).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.3)
    print(json.dumps(httpx.post(url, json=body, timeout=120).json()))
finally:
    server.terminate()
    server.wait(timeout=60)
"""


def can_be_alone() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("server", ["mlflow models serve", "qadapter serve-model"])
def test_it_answers_without_any_network(registered: Registered, tmp_path: Path, server: str) -> None:
    """MLflow's server and the project's: the reply is that of direct generation."""
    if not can_be_alone():
        pytest.skip("a network of its own needs Linux, root, `unshare` and `ip`")
    port = free_port()
    at = f"http://127.0.0.1:{port}"
    body: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": NEW}
    if server == "qadapter serve-model":
        command = [
            sys.executable,
            "-m",
            "qadapter",
            "serve-model",
            "policy@champion",
            "--port",
            str(port),
        ]
        ready, url, body = f"{at}/health", f"{at}/v1/chat/completions", {"model": "policy", **body}
    else:
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/policy@champion"]
        command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
        ready, url = f"{at}/ping", f"{at}/invocations"
    environment = {
        name: value for name, value in os.environ.items() if not re.fullmatch(r"HF_HUB_OFFLINE|.*_proxy", name)
    }
    environment |= {
        "MLFLOW_TRACKING_URI": registered.tracker.uri,
        "QADAPTER_HOME": str(registered.home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # MLflow looks for uvicorn there
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", CLIENT, ready, url, json.dumps(body), *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["choices"][0]["message"]["content"] == registered.expected()
    assert answer["usage"]["completion_tokens"] == NEW
