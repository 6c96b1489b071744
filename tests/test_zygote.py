"""The process that the test processes of `make test` are forked from (`tests/support/zygote.py`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_runs import wait_for
from tests.support.zygote import zygote

WHAT_IT_IS = """
import json, os, sys
print(json.dumps([os.getpid(), os.getppid(), os.getcwd(), os.environ["GIVEN"], sys.argv, "statistics" in sys.modules]))
sys.stdout.flush()
print(sys.stdin.readline(), file=sys.stderr, end="")
os.write(int(sys.argv[1]), b"through a pipe")
sys.exit(3)
"""


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    with zygote(["statistics"]) as python:
        yield str(python)


def test_a_fork_is_what_was_asked_for(python: str, tmp_path: Path) -> None:
    """Another process with the libraries, and with the caller's folder, environment, files, arguments and end."""
    read, write = os.pipe()
    done = subprocess.run(
        [python, "-u", "-c", WHAT_IT_IS, str(write)],
        cwd=tmp_path,
        env=os.environ | {"GIVEN": "ü"},
        input="a line\n",
        capture_output=True,
        text=True,
        pass_fds=[write],
        timeout=60,
    )
    os.close(write)
    pid, parent, *rest = json.loads(done.stdout)
    assert rest == [str(tmp_path), "ü", ["-c", str(write)], True]
    assert parent not in (os.getpid(), pid)
    assert (done.returncode, done.stderr) == (3, "a line\n")
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"through a pipe", "and no other process keeps the pipe open"


def test_a_fork_and_its_caller_are_killed_together(python: str) -> None:
    program = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(600)"
    for killed in ("fork", "caller"):
        caller = subprocess.Popen([python, "-c", program], stdout=subprocess.PIPE, text=True)
        assert caller.stdout is not None
        with caller.stdout:
            fork, parent = map(int, caller.stdout.readline().split())
        assert os.getpid() not in (fork, parent)
        os.kill(fork if killed == "fork" else caller.pid, signal.SIGKILL)
        assert caller.wait(60) == -signal.SIGKILL
        wait_for(lambda pid=fork: not Path(f"/proc/{pid}").exists(), 60, "the end of the fork")


def test_without_a_zygote_it_is_the_interpreter(tmp_path: Path) -> None:
    with zygote([]) as gone:
        python = tmp_path / "python"
        shutil.copy(gone, python)
    assert not gone.exists()
    for program, said in ((["-c", "import os; print(os.getppid())"], f"{os.getpid()}\n"), (["-m", "site"], "sys.path")):
        done = subprocess.run([str(python), *program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout[: len(said)]) == (0, said), done.stderr
