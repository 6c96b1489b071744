"""Modes of what the project writes, and locks between processes that are named when they are held for long."""

from __future__ import annotations

import ast
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json
from qadapter.files.locks import held, holder, private_lock
from qadapter.files.private import close_to_others, keep_private, private_folder
from tests.support.paths import PROJECT_ROOT


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def wide() -> Iterator[None]:
    """The umask that most systems have."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_new_files_are_their_users_alone(wide: None, tmp_path: Path) -> None:
    keep_private()
    write_json(tmp_path / "folder" / "file.json", {})
    child = "from pathlib import Path; import sys; Path(sys.argv[1]).write_text('')"
    subprocess.run([sys.executable, "-c", child, str(tmp_path / "child")], check=True)
    assert mode(tmp_path / "folder") == 0o700
    assert mode(tmp_path / "folder" / "file.json") == mode(tmp_path / "child") == 0o600


def test_wider_modes_are_narrowed(wide: None, tmp_path: Path) -> None:
    """Nothing of the owner's own is taken off, and what a link leads to is left alone."""
    outside = tmp_path / "outside"
    outside.write_text("")
    home = tmp_path / "home"
    (home / "a").mkdir(parents=True)
    (home / "a" / "file").write_text("")
    (home / "script").write_text("")
    (home / "script").chmod(0o755)
    (home / "link").symlink_to(outside)
    assert close_to_others(home) == 4
    assert [mode(path) for path in (home, home / "a", home / "a" / "file", home / "script")] == [
        0o700,
        0o700,
        0o600,
        0o700,
    ]
    assert mode(outside) == 0o644
    (home / "script").chmod(0o744)
    assert close_to_others(home) == 0, "no other user can reach it"
    assert close_to_others(home, thorough=True) == 1
    assert close_to_others(tmp_path / "absent") == 0
    (tmp_path / "elsewhere").symlink_to(home)
    home.chmod(0o755)
    assert private_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    assert mode(home) == 0o700


def test_what_cannot_be_narrowed_is_refused(wide: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's folder; simulated, because tests may run as root."""

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(QAdapterError, match=r"theirs is open to other users \(mode 0755\).*Operation not permitted"):
        close_to_others(tmp_path / "theirs")


_HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_held_lock_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the process that holds it; when that dies, the lock is free."""
    file = tmp_path / "locks" / "mlflow.db.lock"
    with held(file, guards="this", seconds=1):
        assert mode(file) == 0o600
        assert f"process {os.getpid()} (" in holder(file)
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        caplog.set_level(logging.WARNING)
        start = time.monotonic()
        named = rf"The lock {file}, which guards MLflow's database, was held for 0 s by process {process.pid} \("
        with pytest.raises(QAdapterError, match=named), held(file, guards="MLflow's database", seconds=0.3):
            pass
        assert time.monotonic() - start < 5
        assert f"Waiting for {file}, which guards MLflow's database and is held by process {process.pid}" in caplog.text
    finally:
        process.kill()
        process.wait()
    with held(file, guards="this", seconds=5):
        pass


def test_a_lock_file_of_another_user_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be opened: no waiting, a sentence with its name."""

    def refuse(*arguments: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.lock"))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(QAdapterError, match=r"x\.lock: permission was denied"),
        held(tmp_path / "x.lock", guards="this", seconds=60),
    ):
        pass


@pytest.mark.slow
def test_every_lock_of_the_project_is_private() -> None:
    """`FileLock` gives its file mode 0644 under any umask; only `private_lock` makes one here."""
    assert private_lock(Path("x")).mode == 0o600
    for floor in ("qadapter", "tasks", "flows"):
        for file in (PROJECT_ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("FileLock"):
                    modes = [ast.unparse(word.value) for word in node.keywords if word.arg == "mode"]
                    assert modes == ["384"], f"{file}:{node.lineno}"
