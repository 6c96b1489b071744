"""The texts of a run's benchmarks, as far as their items lie on this machine, to look for them in training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.benchmarks.own.items import read_own
from qadapter.evaluation.lm_eval.catalog import expand_suites, find_tasks, own_file
from qadapter.evaluation.lm_eval.official_files import leaves, local_files


def benchmark_items(
    names: Sequence[str], data: Path | None, official_data: Path | None, own: Mapping[str, Path] | None = None
) -> tuple[dict[str, list[list[str]]], list[str]]:
    """Task → for each item its texts (every field that is a text of its own), and the tasks whose items are elsewhere.

    Args:
        names: tasks, groups and suites.
        data: folder whose `benchmarks/` has the items of the project's own tasks.
        official_data: folder with the items of lm-eval's own tasks, by default `<data>/benchmarks`.
        own: benchmarks of the user's own, name → file of questions.
    """
    items = {name: [[item["prompt"]] for item in read_own(file, name).items] for name, file in (own or {}).items()}
    tasks, _ = expand_suites(names)
    if not tasks:
        return items, []
    found = find_tasks(tasks)
    for name in found.local:
        file = own_file(name, data)
        if file is not None and file.is_file():
            items[name] = _texts(read_items(file, ()))
    folder = official_data or (data / "benchmarks" if data else None)
    if found.official and folder is not None and folder.is_dir():
        from lm_eval.tasks import TaskManager  # takes seconds

        index = TaskManager(include_path=list(found.official), include_defaults=False).task_index
        for name in tasks:
            for leaf in leaves(name, index):
                settings: Mapping[str, Any] = index[leaf].cfg or {}
                try:
                    files = local_files(settings, folder)
                except QAdapterError:
                    continue
                asked = settings.get("test_split") or settings.get("validation_split")
                if files and asked:
                    items.setdefault(name, []).extend(
                        texts for file in files[asked] for texts in _texts(read_items(file, ()))
                    )
    return items, [name for name in tasks if name not in items]


def _texts(items: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[value for value in item.values() if isinstance(value, str)] for item in items]
