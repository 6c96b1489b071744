"""Identify the process of a run, so that a later process can check whether it has ended.

A process id is meaningless on another machine, after a restart, or in another container, and a start time by the clock
moves when the clock is set. A tag therefore holds the machine, its boot, the PID namespace, and the start in ticks
since that boot.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_PROC = Path("/proc")
_MACHINE_ID = Path("/etc/machine-id")
_CLOCK_STEP = 3600.0  # seconds; without /proc a start is known by the clock alone, and that may have been set since


@dataclass(frozen=True)
class ProcessTag:
    """The identity of a process on its machine.

    Attributes:
        host: the machine's name.
        machine: the machine's id; empty where it has none, as in most containers.
        boot: id of the boot; empty where there is no `/proc` (macOS).
        namespace: the PID namespace; empty where there is no `/proc`.
        pid: the process id in that namespace.
        start: the process's start in clock ticks since the boot; in seconds by the clock where there is no `/proc`.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    start: float

    @classmethod
    def own(cls) -> ProcessTag:
        """The tag of this process."""
        boot, namespace = _boot_and_namespace()
        pid = os.getpid()
        start = float(_stat(pid)[1]) if boot else psutil.Process(pid).create_time()
        return cls(socket.gethostname(), _machine(), boot, namespace, pid, start)

    @classmethod
    def read(cls, text: str) -> ProcessTag | None:
        """Parse what `text` wrote; None for anything else, such as a tag of an older version without the boot."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def text(self) -> str:
        """The tag as a string, to be stored."""
        return json.dumps(asdict(self))

    def is_dead(self) -> bool | None:
        """Whether the process has ended; None where this cannot be decided here."""
        boot, namespace = _boot_and_namespace()
        if self.host != socket.gethostname() or self.machine != _machine():
            return None
        if self.boot != boot:
            # Machines may share a name but not an id: only an equal id shows the same machine after a restart.
            return True if self.machine and self.boot and boot else None
        if self.namespace != namespace:
            return None
        return self._is_gone() if boot else self._is_gone_by_the_clock()

    def _is_gone(self) -> bool | None:
        try:
            state, start = _stat(self.pid)
        except OSError:  # no such process, or it belongs to another user and is hidden
            return None if _exists(self.pid) else True
        return state in "ZX" or float(start) != self.start

    def _is_gone_by_the_clock(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            return ended or abs(process.create_time() - self.start) > _CLOCK_STEP
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def _boot_and_namespace() -> tuple[str, str]:
    """The boot id and the PID namespace; both empty where the system does not provide them."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.readlink(_PROC / "self/ns/pid")  # noqa: PTH115 - it leads to no file
    except OSError:
        return "", ""


def _machine() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = _MACHINE_ID.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{32}", found):  # a machine image may contain "uninitialized", or nothing
            return found
    return ""


def _stat(pid: int) -> tuple[str, str]:
    """A process's state and start: fields 3 and 22 of `stat`. Field 2, its name, may itself contain spaces."""
    fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
