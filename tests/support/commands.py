"""The command `qadapter` in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qadapter.command.parser import main


def subcommand(name: str) -> Callable[[Sequence[str]], int]:
    """A function that runs `qadapter <name>` with arguments and gives its exit code."""
    return lambda arguments: main([name, *arguments])
