"""A Prefect plugin: provides the auth string to Prefect's processes in this folder, and completes deployment names.

Prefect's public plugin hook runs when Prefect is imported, before its command line reads the arguments. Prefect loads
this one through the entry point in `pyproject.toml`, where plugins are switched on (`prefect.toml`).

- `prefect deployment run full-paper-repro` means its default deployment; Prefect requires `<flow>/<deployment>`.
- The server of `make serve` requires an auth string, which is stored in Prefect's home folder. It is sent only to a
  server on this machine that proves to know it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.plugins import HookContext, SetupResult, register_hook
from prefect.settings import get_current_settings

from flows.prefect_host.access import (
    AUTH_FILE,
    AUTH_VARIABLE,
    SERVER_AUTH_VARIABLE,
    Standing,
    generated_auth_string,
    is_loopback,
    not_ours,
    standing,
)
from qadapter.errors import QAdapterError
from qadapter.files.private import keep_private

DEFAULT_DEPLOYMENTS = {"full-paper-repro": "smoke"}
"""Flow → its default deployment. A test compares it with `prefect.yaml`."""

_PROGRAMS = {"prefect", "prefect.exe"}
_GLOBAL_OPTIONS_WITH_VALUE = {"--profile"}
_RUN_FLAGS = {"--watch", "--no-watch", "--help", "-h"}
_WITHOUT_SERVER = {"config", "profile", "profiles", "server", "plugins", "version", "cloud", "dev"}


def expand(arguments: Sequence[str]) -> list[str]:
    """Complete the name in `prefect deployment run NAME` if it is a bare flow name of this project.

    Args:
        arguments: a command line, the program first (`sys.argv`).

    Returns:
        The command line, with at most one word changed.
    """
    words = list(arguments)
    position = _skip_options(words, 1, flags_end=True)
    if words[position : position + 2] not in (["deployment", "run"], ["deployments", "run"]):
        return words
    position = _skip_options(words, position + 2, flags_end=False)
    if position < len(words) and words[position] in DEFAULT_DEPLOYMENTS:
        words[position] = f"{words[position]}/{DEFAULT_DEPLOYMENTS[words[position]]}"
    return words


def _skip_options(words: Sequence[str], position: int, *, flags_end: bool) -> int:
    """The index of the next word that is neither an option nor an option's value.

    Before the command nearly all options are flags; after `run` nearly all take a value.
    """
    while position < len(words) and words[position].startswith("-"):
        word = words[position]
        takes_value = word in _GLOBAL_OPTIONS_WITH_VALUE if flags_end else word not in _RUN_FLAGS
        position += 2 if takes_value and "=" not in word else 1
    return position


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Prefect's hook: runs in every process that imports Prefect in this folder.

    Raises:
        SystemExit: a command of Prefect's command line would contact a server that does not know the auth string.
    """
    is_command_line = bool(sys.argv) and _is_prefect(Path(sys.argv[0]))
    if is_command_line:
        sys.argv[:] = expand(sys.argv)
        keep_private()  # flow runs of a worker that was started by hand inherit it
    try:
        found = _auth_of(ctx.api_url, sys.argv if is_command_line else ())
    except QAdapterError as error:
        if not is_command_line:
            raise
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    return SetupResult(env=found) if found else None


def _is_prefect(program: Path) -> bool:
    """Whether a program is Prefect's command line, rather than another `python -m`."""
    return program.name in _PROGRAMS or (program.name == "__main__.py" and program.parent.name == "prefect")


def _auth_of(url: str | None, command_line: Sequence[str]) -> dict[str, str]:
    """The variables that a process needs for the server at an address.

    Args:
        url: of the API; None: Prefect starts a server in the process itself.
        command_line: of a command of Prefect; empty for other processes.

    Raises:
        QAdapterError: the command would contact a server that does not know the auth string.
    """
    home = Path(get_current_settings().home).absolute()
    position = _skip_options(command_line, 1, flags_end=True)
    words = list(command_line[position : position + 2])
    if words == ["server", "start"] or url is None:
        auth = os.environ.get(SERVER_AUTH_VARIABLE) or generated_auth_string(home)
        return {SERVER_AUTH_VARIABLE: auth, AUTH_VARIABLE: auth}
    if AUTH_VARIABLE in os.environ or not is_loopback(url) or not (home / AUTH_FILE).exists():
        return {}
    found = standing(url.rstrip("/"), home)
    if found is Standing.FOREIGN:
        if words and words[0] not in _WITHOUT_SERVER:
            raise QAdapterError(not_ours(url))
        return {}
    if found is Standing.ABSENT and not words:
        return {}  # no server has proved that it knows the string; a command that waits for one checks it later
    return {AUTH_VARIABLE: generated_auth_string(home)}
