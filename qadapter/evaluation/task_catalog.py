"""Which evaluation tasks exist and in which file each is defined, found without importing lm-eval or torch.

lm-eval's own index parses all of its 14,000 task files (about 10 s). This one reads only the lines that name a task,
so that a wrong name is refused before a run starts, and so that lm-eval has to index a few folders and not all.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks import read_items

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "lm_eval"
"""Folder of the project's own task definitions."""

DATA_PLACEHOLDER = "{data}"
"""Stands in a template for the absolute path of the data folder."""

_NAME = re.compile(r"""^["']?(?:task|group)["']?\s*:\s*["']?([^\s"'#\[\]]+)["']?\s*(?:#.*)?$""", re.MULTILINE)


class _TolerantLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


_TolerantLoader.add_constructor("!function", lambda _loader, node: str(node.value))


@dataclass(frozen=True)
class TaskFolders:
    """Where lm-eval has to look for a set of tasks.

    Attributes:
        local: names defined in the project's templates.
        official: folders of lm-eval's installation that define the other names and what their groups contain.
    """

    local: tuple[str, ...]
    official: tuple[Path, ...]


def find_tasks(names: Sequence[str]) -> TaskFolders:
    """Where the named tasks and groups are defined.

    Raises:
        QAdapterError: a name is defined nowhere; the message has the nearest names.
    """
    if not names:
        raise QAdapterError("No evaluation task was given. Name at least one, for example toy_facts.")
    local = local_tasks()
    missing = [name for name in names if name not in local]
    if not missing:
        return TaskFolders(tuple(names), ())
    official = official_tasks()
    unknown = [name for name in missing if name not in official]
    if unknown:
        raise QAdapterError(_unknown(unknown, [*local, *official]))
    folders: dict[Path, None] = {}
    for name in missing:
        for file in _files_of(name, official):
            folders.setdefault(file.parent)
    return TaskFolders(tuple(name for name in names if name in local), _outermost(folders))


def check_tasks(names: Sequence[str], data: Path | None = None) -> None:
    """Preflight: every task exists and, if `data` is given, the benchmark files of the project's own tasks are sound.

    Raises:
        QAdapterError: see `find_tasks` and `qadapter.evaluation.benchmarks.read_items`.
    """
    found = find_tasks(names)
    if data is None:
        return
    for name in found.local:
        settings = _settings(local_tasks()[name])
        source = settings.get("dataset_kwargs") or {}
        if "file" in source:
            read_items(source["file"].replace(DATA_PLACEHOLDER, str(data.resolve())), source["fields"])


def render_templates(into: Path, data: Path | None) -> None:
    """Write the project's task files into a folder, with the data folder's absolute path in the placeholder's place."""
    replacement = str(data.resolve()) if data is not None else DATA_PLACEHOLDER
    for template in sorted(TEMPLATES.glob("*.yaml")):
        text = template.read_text(encoding="utf-8").replace(DATA_PLACEHOLDER, replacement)
        (into / template.name).write_text(text, encoding="utf-8")


def needs_data(names: Iterable[str]) -> list[str]:
    """Those of the project's own tasks that read a file of the data folder."""
    local = local_tasks()
    return [n for n in names if n in local and DATA_PLACEHOLDER in str(_settings(local[n]).get("dataset_kwargs"))]


def local_tasks() -> dict[str, Path]:
    """Name and file of every task and group in `configs/lm_eval`."""
    return _names_in(TEMPLATES)


@functools.cache
def official_tasks() -> dict[str, Path]:
    """Name and file of every task and group that the installed lm-eval brings."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise QAdapterError("lm-eval is not installed. Install it with `pip install lm-eval`.")
    return _names_in(Path(package.submodule_search_locations[0]) / "tasks")


def _names_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("**/*.yaml")):
        for name in _NAME.findall(file.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, file)
    return found


def _settings(file: Path) -> dict[str, Any]:
    """A task file with what it includes, local keys winning."""
    own: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_TolerantLoader)
    include = own.pop("include", None)
    merged: dict[str, Any] = {}
    for other in [include] if isinstance(include, str) else include or []:
        merged |= _settings(file.parent / other)
    return merged | own


def _files_of(name: str, known: dict[str, Path]) -> list[Path]:
    """The file of a task, or of a group and everything below it. A tag among the members has no file of its own."""
    file = known.get(name)
    if file is None:
        return []
    files = [file]
    members = _settings(file).get("task")
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(child, str) and child != name:
            files += _files_of(child, known)
    return files


def _outermost(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Folders that lie in no other of them: lm-eval searches a folder with all below it."""
    every = set(folders)
    return tuple(sorted(folder for folder in every if not every & set(folder.parents)))


def _unknown(unknown: Sequence[str], known: Sequence[str]) -> str:
    parts = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        parts.append(f"{name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    tasks = "task" if len(unknown) == 1 else "tasks"
    return (
        f"Unknown evaluation {tasks}: {'; '.join(parts)}. Name tasks of configs/lm_eval or of the installed lm-eval "
        f"(`lm_eval ls tasks` lists those)."
    )
