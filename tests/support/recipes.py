"""CONTRIBUTING.md's recipes, followed literally in a copy of the project; for tests only."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

from tests.support.forked_process import be_script, completed
from tests.support.paths import PROJECT_ROOT


def code_blocks(heading: str, language: str) -> list[str]:
    """The code blocks of one section of CONTRIBUTING.md, in order, without their indentation."""
    text = (PROJECT_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    assert section, f"CONTRIBUTING.md has no section {heading!r}"
    return [dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)]


def copy_project(to: Path) -> Path:
    """The project's code and configs in another folder."""
    for name in ("qadapter", "tasks", "flows", "configs"):
        shutil.copytree(PROJECT_ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def add_line(file: Path, after: str, line: str) -> None:
    """Write a line behind the one line of a file that reads so."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [i for i, each in enumerate(lines) if each.rstrip("\n") == after]
    file.write_text("".join([*lines[: place + 1], line.rstrip("\n") + "\n", *lines[place + 1 :]]), encoding="utf-8")


def run_in(project: Path, script: str, *arguments: str) -> list[Any]:
    """The JSON values that a script prints, one per line, when it runs on a copy of the project."""
    done = completed(be_script, script, str(project), *arguments, cwd=project, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
