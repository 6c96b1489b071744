"""The project's own task definitions: found, read as data, filled in, and written for lm-eval."""

from __future__ import annotations

import functools
import glob
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qadapter.evaluation.benchmarks.own.items import CHOICE, read_own
from qadapter.files.folders import refuse_links_out

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
"""Folder of the project's own benchmarks, one folder each with its task definitions."""

_OWN = BENCHMARKS / "own"
"""Folder of the tasks that files of the user's own become."""

SUITES = Path(__file__).resolve().parent / "suites"
"""Folder of the suites: lists of lm-eval's own tasks, asked as a paper asks them."""

DATA = "{data}"
"""Stands in a template for the absolute path of the data folder."""

NAME = "{name}"
"""Stands in a template for a benchmark's name: `{name}_bits_per_byte` defines `dsp_bits_per_byte` and all others."""

_PLACEHOLDER = re.compile(f"{re.escape(NAME)}|{re.escape(DATA)}")

DEFINES = re.compile(r"""^["']?(?:task|group)["']?\s*:\s*["']?([^\s"'#\[\]]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
WORD = re.compile(r"[\w.-]*\w[\w.-]*")


class _TolerantLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


class FunctionName(str):
    """The dotted name of a function behind YAML's `!function`."""

    __slots__ = ()


_TolerantLoader.add_constructor("!function", lambda _loader, node: FunctionName(node.value))


class _TaskDumper(yaml.SafeDumper):
    """Writes task files in which every string is read back unchanged."""


_TaskDumper.add_representer(FunctionName, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


@functools.cache
def local_tasks() -> dict[str, Path]:
    """Name and file of every task and group of the project's own; a name may hold the placeholder `NAME`."""
    found: dict[str, Path] = {}
    for file in [*sorted(BENCHMARKS.glob("*/*.yaml")), *sorted(SUITES.glob("*.yaml"))]:
        for name in DEFINES.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, file)
    return found


def template_of(name: str) -> tuple[Path, str] | None:
    """The template that defines a task, and the benchmark's name that fills its placeholder."""
    local = local_tasks()
    if name in local:
        return local[name], ""
    for pattern, file in local.items():
        before, placeholder, after = pattern.partition(NAME)
        if placeholder and name.startswith(before) and name.endswith(after):
            benchmark = name[len(before) : len(name) - len(after)]
            if WORD.fullmatch(benchmark):
                return file, benchmark
    return None


def settings_of(file: Path) -> dict[str, Any]:
    """A task file with what it includes, local keys winning."""
    own: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_TolerantLoader)
    include = own.pop("include", None)
    merged: dict[str, Any] = {}
    for other in [include] if isinstance(include, str) else include or []:
        merged |= settings_of(file.parent / other)
    return merged | own


def render_definitions(into: Path, names: Sequence[str], data: Path | None) -> None:
    """Write the project's own tasks as files for lm-eval to read.

    Each is built as data, includes and placeholders filled in, and dumped: no folder's name can become YAML.

    Args:
        into: an existing folder; each benchmark gets a folder in it, with the modules beside its definitions.
        names: tasks that will be asked for, those of lm-eval are left out.
        data: the data folder.

    Raises:
        QAdapterError: a benchmark file is a link that leads out of the data folder.
    """
    for name in names:
        found = template_of(name)
        if found is None:
            continue
        settings = definition(name, data)
        if data is not None:
            refuse_links_out(data, [file for file in named_files(settings) if file.is_relative_to(data.resolve())])
        folder = into / found[0].parent.name
        if not folder.exists():
            folder.mkdir()
            for module in found[0].parent.glob("[!_]*.py"):  # for `!function module.function` beside the definition
                shutil.copy(module, folder)
        text = yaml.dump(settings, Dumper=_TaskDumper, sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def render_own(into: Path, own: Mapping[str, Path]) -> None:
    """Write the user's own benchmarks as tasks for lm-eval to read.

    Args:
        into: an existing folder.
        own: task's name → file of questions.

    Raises:
        QAdapterError: see `qadapter.evaluation.benchmarks.own.items.read_own`.
    """
    for name, file in own.items():
        settings = own_definition(name, file) | {"dataset_kwargs": {"file": str(file.absolute())}}
        text = yaml.dump(settings, Dumper=_TaskDumper, sort_keys=False, allow_unicode=True)
        (into / f"{name}.yaml").write_text(text, encoding="utf-8")


def own_definition(name: str, file: Path) -> dict[str, Any]:
    """The task that a benchmark of the user's own is, without its file."""
    template = "_choice.yaml" if read_own(file, name).kind == CHOICE else "_reply.yaml"
    return {"task": name, **settings_of(_OWN / template)}


def definition(name: str, data: Path | None, *, anchored: bool = True) -> dict[str, Any]:
    """One of the project's own tasks as lm-eval reads it.

    Args:
        name: of the task.
        data: the data folder; without it its placeholder stays.
        anchored: make each path in `dataset_path` and `dataset_kwargs` that exists beside the definition absolute.

    Raises:
        KeyError: the project has no such task.
    """
    found = template_of(name)
    if found is None:
        raise KeyError(name)
    file, benchmark = found
    values = {NAME: benchmark, DATA: str(data.resolve()) if data is not None else DATA}

    def filled(value: Any) -> Any:
        if isinstance(value, FunctionName) or not isinstance(value, str | list | dict):
            return value
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        return _PLACEHOLDER.sub(lambda match: values[match[0]], value)

    settings: dict[str, Any] = filled(settings_of(file))
    for key in ("dataset_path", "dataset_kwargs") if anchored else ():
        if key in settings:
            settings[key] = _anchored(settings[key], file.parent)
    return settings


def _anchored(value: Any, folder: Path, key: str = "") -> Any:
    """Paths and patterns of files that exist relative to a folder as absolute ones.

    A bare word is a path only if it is a file, or a folder under a key that says so: `main` may be a split.
    """
    if isinstance(value, dict):
        return {name: _anchored(entry, folder, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_anchored(entry, folder, key) for entry in value]
    if not isinstance(value, str) or not value or value.startswith(("/", "~")) or "://" in value or "\0" in value:
        return value
    path = folder / value
    try:
        there = path.is_file() or (path.is_dir() and ("/" in value or key.endswith("dir")))
        if there or (_has_pattern(value) and any(folder.glob(value))):
            return str(path)
    except (OSError, ValueError, NotImplementedError):  # too long for a name, or no pattern that pathlib takes
        pass
    return value


def _has_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def named_files(settings: Mapping[str, Any]) -> list[Path]:
    """Files and folders of this machine that a task's `dataset_kwargs` and `dataset_path` name, in order, each once."""
    found: dict[Path, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for entry in value.values():
                look(entry)
        elif isinstance(value, list):
            for entry in value:
                look(entry)
        elif isinstance(value, str) and not isinstance(value, FunctionName) and "\0" not in value:
            path = Path(value).expanduser()
            if len(value) < 4096 and path.exists():
                found[path.absolute()] = None
            elif _has_pattern(value) and "://" not in value:
                found.update((Path(match).absolute(), None) for match in sorted(glob.glob(value, recursive=True)))  # noqa: PTH207

    look(settings.get("dataset_kwargs") or {})
    if "/" in str(settings.get("dataset_path", "")) or str(settings.get("dataset_path", "")).endswith(".py"):
        look(settings["dataset_path"])
    return list(found)


def needs_data(names: Iterable[str]) -> list[str]:
    """Those of the project's own tasks that read a file of the data folder."""
    return [name for name in names if template_of(name) and DATA in str(definition(name, None).get("dataset_kwargs"))]
