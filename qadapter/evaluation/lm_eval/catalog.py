"""Index of evaluation tasks and their files, built without importing lm-eval or torch.

lm-eval's own index parses all of its 14,000 task files (about 10 s). This one reads only the lines that name a task,
so that a wrong name is refused before a run starts, and so that lm-eval has to index a few folders and not all.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError, nearest
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.benchmarks.own.items import describe, read_own
from qadapter.evaluation.items import known_by
from qadapter.evaluation.lm_eval.definitions import (
    DATA,
    DEFINES,
    WORD,
    definition,
    local_tasks,
    settings_of,
    template_of,
)
from qadapter.files.folders import refuse_links_out

_TAGGED = re.compile(r"""^["']?tag["']?\s*:(.*(?:\n\s*-.*)*)$""", re.MULTILINE)
# lm-eval's measures of which the lower is the better one where a task does not say (its `lm_eval.api.metrics`).
_LOWER = ("bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity")
_CORPUS = ("bleu", "chrf", "ter")  # sacreBLEU's: of a whole corpus, from 0 to 100


@dataclass(frozen=True)
class TaskFolders:
    """The locations of a set of tasks.

    Attributes:
        local: names defined in the project's templates.
        official: folders of lm-eval's installation that define the other names and what their groups contain.
    """

    local: tuple[str, ...]
    official: tuple[Path, ...]


@dataclass(frozen=True)
class _Official:
    """Names of the installed lm-eval: the file of each task and group, the folders of each tag's tasks."""

    files: dict[str, Path]
    tags: dict[str, set[Path]]


def find_tasks(names: Sequence[str]) -> TaskFolders:
    """Find the definitions of tasks, groups and tags.

    Raises:
        QAdapterError: a name is unknown; the message lists the nearest names.
    """
    if not names:
        raise QAdapterError("No evaluation task was given. Name at least one, for example toy_facts.")
    local = tuple(name for name in names if template_of(name) is not None)
    missing = [name for name in names if name not in local]
    if not missing:
        return TaskFolders(local, ())
    official = official_tasks()
    unknown = [name for name in missing if name not in official.files and name not in official.tags]
    if unknown:
        raise QAdapterError(_unknown(unknown, [*local_tasks(), *official.files, *official.tags]))
    folders = {folder for name in missing for folder in _folders_of(name, official)}
    return TaskFolders(local, _outermost(folders))


def expand_suites(names: Sequence[str], plain_tasks: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """A suite's name (a group of the project's own) replaced by its tasks.

    Args:
        names: of tasks, groups and suites.
        plain_tasks: those that the user wants asked without chat template.

    Returns:
        All tasks in order, each once, and those that are asked without chat template: the user's and the suites' own.
    """
    tasks: dict[str, None] = {}
    plain: dict[str, None] = {}
    for name in names:
        members, without = _members_of(name)
        tasks |= dict.fromkeys(members)
        plain |= dict.fromkeys(members if name in plain_tasks else without)
    return list(tasks), [task for task in tasks if task in plain or task in plain_tasks]


def _members_of(name: str, above: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """The tasks of a suite, and those of them that it asks without chat template; any other name is its own member.

    Raises:
        QAdapterError: the suite contains itself, or something that is not a name.
    """
    found = template_of(name)
    settings = settings_of(found[0]) if found else {}
    if "group" not in settings:
        return [name], []
    group = settings["group"]
    if group in above:
        raise QAdapterError(
            f"Group {group} contains itself ({' > '.join([*above, group])}). Remove it from its own list."
        )
    listed = settings.get("task") or []
    if not isinstance(listed, list):
        raise QAdapterError(f"Group {group} has `task: {listed}`, and expected is a list: `task: [{listed}]`.")
    members: list[str] = []
    plain = list((settings.get("metadata") or {}).get("without_chat_template", []))
    for member in listed:
        if not isinstance(member, str):
            raise QAdapterError(
                f"Group {group} lists {member!r}, and expected is the name of a task. Define that task in a YAML file "
                "of its own, and list its name."
            )
        below, without = _members_of(member, (*above, group))
        members += below
        plain += [task for task in below if member in plain] + without
    return members, plain


def check_tasks(names: Sequence[str], data: Path | None = None) -> None:
    """Preflight: every task exists and has a score, and the files of the project's own tasks are sound.

    Args:
        names: of tasks, groups and suites.
        data: the data folder; without it files of a data folder are not looked at.

    Raises:
        QAdapterError: see `find_tasks`, `require_scores` and `qadapter.evaluation.benchmarks.items.read_items`.
    """
    tasks, _ = expand_suites(names)
    found = find_tasks(tasks)
    require_scores(tasks)
    for name in found.local:
        if (file := own_file(name, data)) is None:
            continue
        if data is not None and file.is_relative_to(data.resolve()):
            refuse_links_out(data, [file])
        read_items(file, definition(name, data)["dataset_kwargs"].get("fields", ()))


def check_own(own: Mapping[str, Path]) -> list[str]:
    """Preflight of the user's own benchmarks; a line that describes each.

    Args:
        own: name → file of questions.

    Raises:
        QAdapterError: a name that a task of this project or of lm-eval has; see `read_own` for the files.
    """
    lines = []
    for name, file in own.items():
        if template_of(name) is not None or name in official_tasks().files or name in official_tasks().tags:
            raise QAdapterError(f"There is a task {name!r} already; give your own benchmark {file} another name.")
        lines.append(describe(name, read_own(file, name)))
    return lines


def require_scores(names: Sequence[str]) -> None:
    """Require that every name has exactly one score, so that its forgetting can be measured and weighted in the mean.

    Raises:
        QAdapterError: a name is a tag of lm-eval, or a group that is not averaged (the message has its members); or a
            task that is known by a score of a whole corpus in percent, which has no items to compare.
    """
    for name in names:
        measures = _measures_of(name)
        if (metric := known_by(measures)) and measures[metric].get("aggregation", metric) in _CORPUS:
            raise QAdapterError(
                f"{name!r} is scored by {metric}, from 0 to 100 for all answers together. Retention compares item by "
                "item and averages scores from 0 to 1. Leave it out, or name a task with an accuracy."
            )
        if template_of(name) is None and (members := _loose_members(name, official_tasks())) is not None:
            advice = f"Name those tasks in its place: {', '.join(members)}." if members else "Leave it out."
            raise QAdapterError(
                f"{name!r} contains several evaluation tasks, and lm-eval has no common score for them, so forgetting "
                f"cannot be measured. {advice}"
            )


def _loose_members(name: str, known: _Official) -> list[str] | None:
    """The members of a tag, or of a group without its own score; None for anything else."""
    if name in known.tags and name not in known.files:
        return _tagged(name, known)
    settings = settings_of(known.files[name]) if name in known.files else {}
    if settings.get("group") != name or settings.get("aggregate_metric_list"):
        return None
    return list(dict.fromkeys(_listed(settings.get("task"), known)))


def _tagged(tag: str, known: _Official) -> list[str]:
    """The tasks that have a tag of their own or from a file that they include; lm-eval knows no tags of groups."""
    near = {name: settings_of(file) for name, file in known.files.items() if known.tags[tag] & set(file.parents)}
    tags = {name: settings.get("tag") for name, settings in near.items() if "group" not in settings}
    return sorted(name for name, own in tags.items() if tag in ([own] if isinstance(own, str) else own or []))


def _listed(members: Any, known: _Official) -> Iterator[str]:
    """The members of a group that can be named, those that have no score themselves replaced by their own."""
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        if not isinstance(child, str):
            yield from _listed(child, known)
        elif (loose := _loose_members(child, known)) is not None:
            yield from loose
        elif child in known.files:  # a group may define tasks in its own file that have no name elsewhere
            yield child


def official_leaves(name: str) -> list[str]:
    """The tasks with their own files that belong to one of lm-eval's tasks, groups or tags."""
    known = official_tasks()
    if name in known.tags and name not in known.files:
        return _tagged(name, known)
    if name not in known.files:
        return []
    settings = settings_of(known.files[name])
    if settings.get("group") != name:
        return [name]
    leaves: dict[str, None] = {}
    for member in settings.get("task") or []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        for some in [child] if isinstance(child, str) else child if isinstance(child, list) else []:
            if isinstance(some, str) and some != name:
                leaves.update(dict.fromkeys(official_leaves(some)))
    return list(leaves)


def own_file(name: str, data: Path | None) -> Path | None:
    """The file with the items of one of the project's own tasks; None if it has none, or needs `data`."""
    file = (definition(name, data).get("dataset_kwargs") or {}).get("file") if template_of(name) else None
    if not isinstance(file, str) or (data is None and DATA in file):
        return None
    return Path(file)


def better_when_lower(names: Iterable[str]) -> list[str]:
    """Those whose measures are all better when lower (bits per byte, perplexity): they have no accuracy."""
    found = []
    for name in names:
        measures = _measures_of(name).items()
        if measures and not any(each.get("higher_is_better", metric not in _LOWER) for metric, each in measures):
            found.append(name)
    return found


def _measures_of(name: str) -> dict[str, dict[str, Any]]:
    """Metric → its entry in the file of one task; nothing for a group."""
    template = template_of(name)
    file = template[0] if template else official_tasks().files.get(name)
    return {str(each["metric"]): each for each in (settings_of(file).get("metric_list") or [])} if file else {}


@functools.cache
def official_tasks() -> _Official:
    """What the installed lm-eval defines (about 2 s, once)."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise QAdapterError("lm-eval is not installed. Install it with `pip install lm-eval`.")
    files: dict[str, Path] = {}
    tags: dict[str, set[Path]] = {}
    for file in sorted((Path(package.submodule_search_locations[0]) / "tasks").glob("**/*")):
        # Files without ending are only included by others; they define no task, but tag those that include them.
        if file.suffix not in (".yaml", "") or not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in DEFINES.findall(text) if file.suffix == ".yaml" else []:
            files.setdefault(name, file)
        for block in _TAGGED.findall(text):
            for tag in WORD.findall(block):
                tags.setdefault(tag, set()).add(file.parent)
    return _Official(files, tags)


def _folders_of(name: str, known: _Official) -> set[Path]:
    """Folders of a task, of a tag's tasks, or of a group and everything below it."""
    folders = set(known.tags.get(name, ()))
    file = known.files.get(name)
    if file is None:
        return folders
    folders.add(file.parent)
    members = settings_of(file).get("task")
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(child, str) and child != name:
            folders |= _folders_of(child, known)
    return folders


def _outermost(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Folders that lie in no other of them: lm-eval searches a folder with all below it."""
    every = set(folders)
    return tuple(sorted(folder for folder in every if not every & set(folder.parents)))


def _unknown(unknown: Sequence[str], known: Sequence[str]) -> str:
    parts = []
    for name in unknown:
        near = nearest(name, known, 3)
        parts.append(f"{name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    tasks = "task" if len(unknown) == 1 else "tasks"
    return (
        f"Unknown evaluation {tasks}: {'; '.join(parts)}. Name tasks of qadapter/evaluation/benchmarks or of the "
        f"installed lm-eval (`lm_eval ls tasks` lists those)."
    )
