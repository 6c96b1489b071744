"""Whether a process is gone, judged from where it ran, from elsewhere, and where the system tells little."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from qadapter.files import process_tags
from qadapter.files.process_tags import ProcessTag
from tests.support.paths import PROJECT_ROOT

ABOVE_ALL = 4_194_305
"""No process of Linux has a number above 2^22."""
ID = "0123456789abcdef" * 2

linux = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="without /proc a start is known by the clock")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with this machine's id."""
    file = tmp_path / "machine-id"
    file.write_text(f"{ID}\n")
    monkeypatch.setattr(process_tags, "_MACHINE_ID", file)
    return file


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], ProcessTag]]:
    """Another process and its tag, as it wrote it."""
    program = (
        "import sys, time; from pathlib import Path; from qadapter.files import process_tags\n"
        "process_tags._MACHINE_ID, process_tags._PROC = map(Path, sys.argv[1:])\n"
        "print(process_tags.ProcessTag.own().text(), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(process_tags._MACHINE_ID), str(process_tags._PROC)]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        tag = ProcessTag.read(process.stdout.readline())
        assert tag is not None
        assert tag.pid == process.pid
        yield process, tag
    finally:
        process.kill()
        process.wait()


def proc_with(folder: Path, boot: str = "boot", namespace: str = "pid:[1]", **stats: str) -> Path:
    """A `/proc` in which there are these processes."""
    (folder / "sys/kernel/random").mkdir(parents=True)
    (folder / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
    (folder / "self/ns").mkdir(parents=True)
    (folder / "self/ns/pid").symlink_to(namespace)
    for name, stat in {str(os.getpid()): f"{os.getpid()} (me) R {'0 ' * 18}100 0", **stats}.items():
        (folder / name.strip("p")).mkdir()
        (folder / name.strip("p") / "stat").write_text(stat)
    return folder


def test_a_tag_is_read_as_it_was_written() -> None:
    own = ProcessTag.own()
    assert ProcessTag.read(own.text()) == own
    assert own.machine == ID
    assert own.is_dead() is False


@pytest.mark.parametrize("text", ["", "machine 1234 1719858862.12", "1234", "[1]", '{"host": "machine"}'])
def test_what_an_earlier_version_wrote_is_no_tag(text: str) -> None:
    assert ProcessTag.read(text) is None


@linux
def test_a_process_is_dead_once_it_was_killed(other: tuple[subprocess.Popen[str], ProcessTag]) -> None:
    process, tag = other
    assert tag.is_dead() is False
    process.kill()
    deadline = time.monotonic() + 10
    while tag.is_dead() is False and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.returncode is None, "its end was not asked for yet, it is a zombie"
    assert tag.is_dead() is True
    process.wait()
    assert tag.is_dead() is True


@linux
def test_the_clock_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves when it is set and when a machine wakes up: psutil's start of every process moves with it."""
    own = ProcessTag.own()
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 2.0)
    assert ProcessTag.own() == own
    assert own.is_dead() is False


@linux
def test_another_process_with_the_same_number_is_another() -> None:
    own = ProcessTag.own()
    assert replace(own, start=own.start - 1).is_dead() is True
    assert replace(own, pid=ABOVE_ALL).is_dead() is True


@linux
@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"machine": "f" * 32}, {"namespace": "pid:[1]"}])
def test_what_runs_elsewhere_is_not_judged_by_its_number(change: dict[str, Any]) -> None:
    """On another machine, on one of the same name, in another container of this one."""
    assert replace(ProcessTag.own(), pid=ABOVE_ALL, **change).is_dead() is None


@linux
def test_what_ran_before_this_machine_was_restarted_is_dead(machine: Path) -> None:
    """Its number may be another process's now, and containers count anew."""
    before = replace(ProcessTag.own(), boot="another")
    assert before.is_dead() is True
    assert replace(before, namespace="pid:[1]").is_dead() is True
    assert replace(before, machine="f" * 32).is_dead() is None, "another boot, of another machine"
    for nothing in ("", "uninitialized\n"):
        machine.write_text(nothing)
        assert ProcessTag.own().machine == ""
        assert replace(before, machine="").is_dead() is None, "without an id it may be another machine of that name"


def test_a_name_of_a_process_may_hold_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = f"7 (a) Z 5 (b)) S {'0 ' * 18}100 0"
    monkeypatch.setattr(process_tags, "_PROC", proc_with(tmp_path / "proc", p7=stat))
    own = ProcessTag.own()
    assert (own.boot, own.namespace, own.start) == ("boot", "pid:[1]", 100.0)
    assert replace(own, pid=7).is_dead() is False
    assert replace(own, pid=7, start=99.0).is_dead() is True


def test_a_process_that_may_not_be_seen_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hidepid` hides another user's processes; their numbers are known to be taken all the same."""
    monkeypatch.setattr(process_tags, "_PROC", proc_with(tmp_path / "proc"))
    hidden = replace(ProcessTag.own(), pid=os.getppid())
    assert hidden.is_dead() is None

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert hidden.is_dead() is None


def test_without_proc_the_number_and_roughly_the_clock_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with_proc = ProcessTag.own()
    monkeypatch.setattr(process_tags, "_PROC", tmp_path / "none")
    process, tag = request.getfixturevalue("other")
    assert (tag.boot, tag.namespace) == ("", "")
    assert tag.start == pytest.approx(psutil.Process(process.pid).create_time(), abs=1.0)
    assert tag.is_dead() is False
    assert replace(tag, start=tag.start + 120).is_dead() is False, "the clock was set"
    assert replace(tag, start=tag.start - 86_400).is_dead() is True, "the number was given to another one"
    if with_proc.boot:
        assert replace(with_proc, pid=ABOVE_ALL).is_dead() is None, "a container of this name, say"
    process.kill()
    process.wait()
    assert tag.is_dead() is True
