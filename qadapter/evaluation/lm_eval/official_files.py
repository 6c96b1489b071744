"""lm-eval's own tasks on local files: their official definitions, their items from a folder in place of the hub.

A task `T` of lm-eval is left as it is but for where its items come from: a file that includes the installed definition
and names a reader of local files. Below the folder that the user names, the items of a data set are looked for as

    <owner>/<dataset>/…  or  <dataset>/…  or  <short name>/…      folders, as the hub has them or flattened
    <short name>.jsonl | .json                                      a data set of one configuration and split

and in a folder as `<configuration>/<split>.jsonl`, `<configuration>/<split>-*.parquet`, `<configuration>.json`, or
`<split>.jsonl`, `data/<split>-*.parquet` where there is one configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.lm_eval.catalog import TaskFolders, expand_suites, find_tasks
from qadapter.evaluation.lm_eval.definitions import render_definitions
from qadapter.files.folders import refuse_links_out

if TYPE_CHECKING:
    from datasets import Dataset

READABLE = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class _Source:
    """What is known of a data set: a short name for its local folder or file, and the fields its tasks read."""

    short_name: str
    fields: tuple[str, ...]


_SOURCES = {
    "openai/gsm8k": _Source("gsm8k", ("question", "answer")),
    "SaylorTwift/bbh": _Source("bbh", ("input", "target")),
    "cais/mmlu": _Source("mmlu", ("question", "choices", "answer")),
    "TIGER-Lab/MMLU-Pro": _Source("mmlu_pro", ("question", "options", "answer", "answer_index")),
    "wis-k/instruction-following-eval": _Source("ifeval", ("key", "prompt", "instruction_id_list", "kwargs")),
}


def write_definitions(
    found: TaskFolders, names: Sequence[str], data: Path | None, official_data: Path | None, into: Path
) -> None:
    """Write the task definitions that lm-eval does not have, or that read their items from local files.

    Args:
        found: where the tasks are defined (`find_tasks`).
        names: the tasks.
        data: folder whose `benchmarks/` holds the items of the project's own tasks.
        official_data: folder with items of lm-eval's own tasks, by default `<data>/benchmarks`.
        into: an existing folder; lm-eval must search it after its own.

    Raises:
        QAdapterError: see `redirect`.
    """
    from lm_eval.tasks import TaskManager

    render_definitions(into, found.local, data)
    folder = official_data or (data / "benchmarks" if data else None)
    if found.official and folder is not None and folder.is_dir():
        own = TaskManager(include_path=list(found.official), include_defaults=False)
        redirect(own.task_index, names, folder, into)


def check_files(names: Sequence[str], folder: Path) -> None:
    """Preflight: what lies in the folder for lm-eval's own tasks is all they need (lm-eval takes seconds to import).

    Args:
        names: of tasks, groups and suites.
        folder: see `write_definitions`.

    Raises:
        QAdapterError: see `redirect` and `qadapter.evaluation.benchmarks.items.read_items`.
    """
    from lm_eval.tasks import TaskManager

    tasks, _ = expand_suites(names)
    if not tasks:
        return
    found = find_tasks(tasks)
    if not found.official:
        return
    index = TaskManager(include_path=list(found.official), include_defaults=False).task_index
    needed: dict[Path, tuple[str, ...]] = {}  # several tasks can read one file
    for name in dict.fromkeys(leaf for task in tasks for leaf in leaves(task, index)):
        settings = index[name].cfg or {}
        for file in (file for files in local_files(settings, folder).values() for file in files):
            needed[file] = _source(settings["dataset_path"]).fields
    for file, fields in needed.items():
        read_items(file, fields)


def redirect(index: Mapping[str, Any], names: Sequence[str], folder: Path, into: Path) -> list[str]:
    """Write, for each task whose items lie in `folder`, a definition that reads them there.

    Args:
        index: lm-eval's index of the tasks (`TaskManager.task_index`).
        names: tasks and groups that will be asked for.
        folder: where local benchmark files are.
        into: folder for the definitions; lm-eval must search it after its own.

    Returns:
        Names of the tasks that were found locally.

    Raises:
        QAdapterError: the questions of a task are there, but not the worked examples it shows.
    """
    found = []
    for name in dict.fromkeys(leaf for requested in names for leaf in leaves(requested, index)):
        entry = index[name]
        settings = entry.cfg or {}
        files = local_files(settings, folder)
        if not files:
            continue
        definition = {
            "include": str(entry.yaml_path),
            "task": name,
            "dataset_kwargs": {
                "files": {split: [str(file) for file in some] for split, some in files.items()},
                "fields": list(_source(settings["dataset_path"]).fields),
            },
        }
        reader = f"custom_dataset: !function {__name__}.lm_eval_dataset\n"
        (into / f"{name}.yaml").write_text(reader + yaml.safe_dump(definition), encoding="utf-8")
        found.append(name)
    return found


def local_files(settings: Mapping[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Files of each split that a task reads; empty if its questions are not in the folder.

    A split that is not needed (worked examples of a task that shows none) has no files.

    Raises:
        QAdapterError: see `redirect`; or a file is a link that leads out of the folder.
    """
    asked = settings.get("test_split") or settings.get("validation_split")
    if "dataset_path" not in settings or asked is None:
        return {}
    configuration = settings.get("dataset_name")
    places = _places(folder, settings["dataset_path"], configuration)
    files = {asked: _find(places, asked) or _single_file(folder, settings["dataset_path"], configuration)}
    if not files[asked]:
        return {}
    refuse_links_out(folder, files[asked])
    shown = settings.get("fewshot_split") or settings.get("training_split")
    own_examples = isinstance(settings.get("fewshot_config"), dict) and settings["fewshot_config"].get("samples")
    if shown and shown != asked:
        files[shown] = _find(places, shown)
        refuse_links_out(folder, files[shown])
        if not files[shown] and settings.get("num_fewshot") and not own_examples:
            raise QAdapterError(
                f"Task {settings['task']} shows {settings['num_fewshot']} worked examples from the split {shown!r} of "
                f"{settings['dataset_path']}. Its questions are in {files[asked][0]}, the examples are not there: "
                f"expected {places[0]}/{shown}.jsonl."
            )
    return files


def lm_eval_dataset(files: Mapping[str, Sequence[str]], fields: Sequence[str], **_metadata: Any) -> dict[str, Dataset]:
    """What a redirected task gets: each split's items; a split without files has the columns and no rows."""
    from datasets import Dataset

    splits = {
        split: Dataset.from_list([item for file in some for item in read_items(file, fields)])
        for split, some in files.items()
        if some
    }
    empty = next(iter(splits.values())).select([])
    return {split: splits.get(split, empty) for split in files}


def leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks behind a task, tag or group of lm-eval's index."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        yield from _members((entry.cfg or {}).get("task"), index)
    else:
        yield name


def _members(members: Any, index: Mapping[str, Any]) -> Iterator[str]:
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(child, str):
            yield from leaves(child, index)
        else:
            yield from _members(child, index)


def _source(dataset: str) -> _Source:
    return _SOURCES.get(dataset) or _Source(dataset.rpartition("/")[2].lower(), ())


def _places(folder: Path, dataset: str, configuration: str | None) -> list[Path]:
    """Folders in which a split's files may lie, the preferred first."""
    roots = [folder / _source(dataset).short_name, folder / dataset.rpartition("/")[2], folder / dataset]
    if configuration in (None, "main", "default"):
        return [place for root in roots for place in (root, root / "data", root / "main", root / "default")]
    return [root / configuration for root in roots]


def _find(places: Sequence[Path], split: str) -> list[Path]:
    for place in places:
        for pattern in (f"{split}.*", f"{split}-*.parquet"):
            if files := sorted(file for file in place.glob(pattern) if file.suffix in READABLE):
                return files
    return []


def _single_file(folder: Path, dataset: str, configuration: str | None) -> list[Path]:
    """A file that holds all there is: of the data set, or of one of its configurations."""
    short = folder / _source(dataset).short_name
    stem = short if configuration in (None, "main", "default") else short / configuration
    return [file for suffix in READABLE if (file := stem.with_name(stem.name + suffix)).is_file()][:1]
