"""What an evaluation's tasks read: definitions, modules, files, and the commits of data sets on the hub.

A score depends on all of it as much as on the policy, so a stage's key has to. What a task's own code opens by itself
cannot be seen from here; the code can, and is named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.catalog import expand_suites, official_leaves, official_tasks
from qadapter.evaluation.lm_eval.definitions import (
    BENCHMARKS,
    FunctionName,
    definition,
    named_files,
    own_definition,
    settings_of,
    template_of,
)
from qadapter.evaluation.lm_eval.official_files import local_files
from qadapter.evaluation.lm_eval.task_code import code_of

_PACKAGED = {"arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "webdataset", "xml"}
"""What `datasets` reads files with; such a `dataset_path` names no data set."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class TaskReads:
    """What one task reads.

    Attributes:
        settings: its definition as JSON values; no path of this machine but those that the definition itself has.
        modules: dotted names of this project's modules that it calls.
        files: of this machine: items, folders, and modules that are none of this project's.
        datasets: data set on the hub → its commit, "unknown" where neither the hub nor the cache tells.
    """

    settings: Mapping[str, Any]
    modules: tuple[str, ...]
    files: tuple[Path, ...]
    datasets: Mapping[str, str]


def reads_of(
    names: Sequence[str], data: Path | None, official_data: Path | None, own: Mapping[str, Path] | None = None
) -> dict[str, TaskReads]:
    """What the named tasks read.

    lm-eval's own definitions are those of its installed version, which is part of every stage's key, so of them only
    the items are looked for.

    Args:
        names: of tasks, groups and suites.
        data: folder whose `benchmarks/` holds the items of the project's own tasks.
        official_data: folder with items of lm-eval's own tasks, by default `<data>/benchmarks`.
        own: benchmarks of the user's own, name → file of questions.

    Raises:
        QAdapterError: a task of the project's own reads from a URL, whose content has no digest before it is read.
    """
    tasks, _ = expand_suites(names)
    folder = official_data or (data / "benchmarks" if data else None)
    found = {name: _local(name, data) if template_of(name) else _official(name, folder) for name in tasks}
    return found | {name: _of_user(name, file) for name, file in (own or {}).items()}


def _of_user(name: str, file: Path) -> TaskReads:
    settings = own_definition(name, file)
    modules, files = code_of(_functions(settings), BENCHMARKS / "own")
    return TaskReads(_plain(settings), modules, (file.absolute(), *files), {})


def _local(name: str, data: Path | None) -> TaskReads:
    found = template_of(name)
    assert found is not None
    filled = definition(name, data)
    if away := [text for text in _texts(filled.get("dataset_kwargs")) if "://" in text]:
        raise QAdapterError(
            f"Task {name} reads its items from {away[0]}, whose content can change unseen. Download it, and "
            "name the file."
        )
    modules, files = code_of(_functions(filled), found[0].parent)
    settings = _plain(definition(name, None, anchored=False))  # no folder of this machine: a store can be shared
    return TaskReads(settings, modules, tuple(dict.fromkeys([*named_files(filled), *files])), _datasets([filled]))


def _official(name: str, folder: Path | None) -> TaskReads:
    known = official_tasks()
    files: dict[Path, None] = {}
    away = []
    for leaf in official_leaves(name):
        settings = settings_of(known.files[leaf])
        local = local_files({"task": leaf, **settings}, folder) if folder is not None and folder.is_dir() else {}
        if local:
            files.update((file, None) for split in local.values() for file in split)
        else:
            away.append(settings)
            files.update((file, None) for file in named_files(settings))
    return TaskReads({}, (), tuple(files), _datasets(away))


def _datasets(definitions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for settings in definitions:
        path = settings.get("dataset_path")
        if not isinstance(path, str) or path in _PACKAGED or "custom_dataset" in settings or Path(path).exists():
            continue
        wanted = (settings.get("dataset_kwargs") or {}).get("revision")
        found[path if wanted is None else f"{path}@{wanted}"] = _commit(path, wanted)
    return found


@functools.lru_cache
def _commit(dataset: str, wanted: str | None) -> str:
    """The commit that a data set is read at now: the hub's word, else the one in the cache."""
    from huggingface_hub import HfApi, constants

    if wanted is not None and _COMMIT.fullmatch(wanted):
        return wanted
    try:
        return str(HfApi().dataset_info(dataset, revision=wanted, timeout=10).sha)
    except Exception:  # offline, gone, private: the library raises its own errors, httpx's and OSError
        folder = f"datasets--{dataset.replace('/', '--')}"
        reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / (wanted or "main")
        return reference.read_text().strip() if reference.is_file() else "unknown"


def _functions(value: Any) -> Iterator[str]:
    yield from (str(entry) for entry in _entries(value) if isinstance(entry, FunctionName))


def _texts(value: Any) -> Iterator[str]:
    yield from (entry for entry in _entries(value) if isinstance(entry, str))


def _entries(value: Any) -> Iterator[Any]:
    """All values of nested mappings and lists that are neither."""
    if isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _entries(entry)
    else:
        yield value


def _plain(value: Any) -> Any:
    """The same as JSON: functions by their names, keys and other values as their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, FunctionName):
        return f"!function {value}"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
