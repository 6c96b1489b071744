"""A Prefect plugin: `prefect deployment run full-paper-repro` means its default deployment.

Prefect's command line wants `<flow>/<deployment>` and refuses a bare flow name. Its public plugin hook runs before the
arguments are read; this one completes the name of a flow of this project there and touches nothing else. Prefect
loads it through the entry point in `pyproject.toml`, where plugins are switched on (`prefect.toml`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.plugins import HookContext, SetupResult, register_hook

DEFAULT_DEPLOYMENTS = {"full-paper-repro": "smoke"}
"""The deployment that a bare flow name stands for. A test holds it against `prefect.yaml`."""

_PROGRAMS = {"prefect", "prefect.exe", "__main__.py"}
_GLOBAL_OPTIONS_WITH_VALUE = {"--profile"}
_RUN_FLAGS = {"--watch", "--no-watch", "--help", "-h"}


def expand(arguments: Sequence[str]) -> list[str]:
    """Complete the name in `prefect deployment run NAME` if it is a bare flow name of this project.

    Args:
        arguments: a command line, the program first (`sys.argv`).

    Returns:
        The command line, changed in one word or not at all.
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
    """The place of the next word that is no option and no option's value.

    Before the command nearly all options are flags; after `run` nearly all take a value.
    """
    while position < len(words) and words[position].startswith("-"):
        word = words[position]
        takes_value = word in _GLOBAL_OPTIONS_WITH_VALUE if flags_end else word not in _RUN_FLAGS
        position += 2 if takes_value and "=" not in word else 1
    return position


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:  # noqa: ARG001 - the hook's signature
    """Prefect's hook: runs in every Prefect process, acts in its command line only."""
    if sys.argv and Path(sys.argv[0]).name in _PROGRAMS:
        sys.argv[:] = expand(sys.argv)
    return None
