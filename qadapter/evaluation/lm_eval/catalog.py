"""Which evaluation tasks exist and in which file each is defined, found without importing lm-eval or torch.

lm-eval's own index parses all of its 14,000 task files (about 10 s). This one reads only the lines that name a task,
so that a wrong name is refused before a run starts, and so that lm-eval has to index a few folders and not all.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qadapter.config.folder import CONFIGS
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items

TEMPLATES = CONFIGS / "lm_eval"
"""Folder of the project's own task definitions."""

DATA = "{data}"
"""Stands in a template for the absolute path of the data folder."""

NAME = "{name}"
"""Stands in a template for a benchmark's name: `{name}_bits_per_byte` defines `dsp_bits_per_byte` and all others."""

_DEFINES = re.compile(r"""^["']?(?:task|group)["']?\s*:\s*["']?([^\s"'#\[\]]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
_TAGGED = re.compile(r"""^["']?tag["']?\s*:(.*(?:\n\s*-.*)*)$""", re.MULTILINE)
_WORD = re.compile(r"[\w.-]*\w[\w.-]*")
# lm-eval's measures of which the lower is the better one where a task does not say (its `lm_eval.api.metrics`).
_LOWER = ("bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity")


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


@dataclass(frozen=True)
class _Official:
    """Names of the installed lm-eval: the file of each task and group, the folders of each tag's tasks."""

    files: dict[str, Path]
    tags: dict[str, set[Path]]


def find_tasks(names: Sequence[str]) -> TaskFolders:
    """Where the named tasks, groups and tags are defined.

    Raises:
        QAdapterError: a name is defined nowhere; the message has the nearest names.
    """
    if not names:
        raise QAdapterError("No evaluation task was given. Name at least one, for example toy_facts.")
    local = tuple(name for name in names if _template(name) is not None)
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
    """A suite's name (a group of `configs/lm_eval`) replaced by its tasks.

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


def _members_of(name: str) -> tuple[list[str], list[str]]:
    """The tasks of a suite, and those of them that it asks without chat template; any other name is its own member."""
    found = _template(name)
    settings = _settings(found[0]) if found else {}
    members = list(settings["task"]) if "group" in settings else [name]
    return members, list(settings.get("metadata", {}).get("without_chat_template", []))


def check_tasks(names: Sequence[str], data: Path | None = None) -> None:
    """Preflight: every task exists and has a score and, if `data` is given, the project's own tasks have sound files.

    Raises:
        QAdapterError: see `find_tasks`, `require_scores` and `qadapter.evaluation.benchmarks.items.read_items`.
    """
    tasks, _ = expand_suites(names)
    found = find_tasks(tasks)
    require_scores(tasks)
    if data is None:
        return
    for name in found.local:
        source = _source(name)
        if "file" in source:
            read_items(_fill(source["file"], name, data), source["fields"])


def require_scores(names: Sequence[str]) -> None:
    """Every name stands for one score: what is forgotten of it can be told, and it has its share of the mean.

    Raises:
        QAdapterError: a name is a tag of lm-eval, or a group that is not averaged; the message has its members.
    """
    for name in names:
        if _template(name) is None and (members := _loose_members(name, official_tasks())) is not None:
            advice = f"Name those tasks in its place: {', '.join(members)}." if members else "Leave it out."
            raise QAdapterError(
                f"{name!r} stands for several evaluation tasks, and lm-eval gives no score for them together, so it "
                f"could not be told how much of it is forgotten. {advice}"
            )


def _loose_members(name: str, known: _Official) -> list[str] | None:
    """What a tag, or a group without a score of its own, stands for; None for anything else."""
    if name in known.tags and name not in known.files:
        return _tagged(name, known)
    settings = _settings(known.files[name]) if name in known.files else {}
    if settings.get("group") != name or settings.get("aggregate_metric_list"):
        return None
    return list(dict.fromkeys(_listed(settings.get("task"), known)))


def _tagged(tag: str, known: _Official) -> list[str]:
    """The tasks that have a tag of their own or from a file that they include; lm-eval knows no tags of groups."""
    near = {name: _settings(file) for name, file in known.files.items() if known.tags[tag] & set(file.parents)}
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
        elif child in known.files:  # a group can define tasks in its own file, which nobody else knows by name
            yield child


def render_templates(into: Path, names: Sequence[str], data: Path | None) -> None:
    """Write the project's task files into a folder for lm-eval to read, with the placeholders filled in.

    Args:
        into: an existing folder.
        names: tasks that will be asked for; a template for many benchmarks is written once for each of its tasks here.
        data: the data folder.
    """
    for template in sorted(TEMPLATES.glob("*.yaml")):
        text = template.read_text(encoding="utf-8")
        if NAME not in text:
            (into / template.name).write_text(_fill(text, "", data), encoding="utf-8")
    for name in names:
        found = _template(name)
        if found is not None and found[1]:
            text = found[0].read_text(encoding="utf-8")
            (into / f"{name}.yaml").write_text(_fill(text, name, data), encoding="utf-8")


def needs_data(names: Iterable[str]) -> list[str]:
    """Those of the project's own tasks that read a file of the data folder."""
    return [name for name in names if DATA in str(_source(name))]


def own_file(name: str, data: Path | None) -> Path | None:
    """The file with the items of one of the project's own tasks; None if it has none, or needs `data`."""
    file = _source(name).get("file")
    if not isinstance(file, str) or (DATA in file and data is None):
        return None
    return Path(_fill(file, name, data))


def better_when_lower(names: Iterable[str]) -> list[str]:
    """Those whose measures are all better when lower (bits per byte, perplexity): they have no accuracy."""
    found = []
    for name in names:
        template = _template(name)
        file = template[0] if template else official_tasks().files.get(name)
        measures = (_settings(file).get("metric_list") or []) if file else []
        if measures and not any(each.get("higher_is_better", each["metric"] not in _LOWER) for each in measures):
            found.append(name)
    return found


@functools.cache
def local_tasks() -> dict[str, Path]:
    """Name and file of every task and group in `configs/lm_eval`; a name may hold the placeholder `NAME`."""
    found: dict[str, Path] = {}
    for file in sorted(TEMPLATES.glob("*.yaml")):
        for name in _DEFINES.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, file)
    return found


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
        for name in _DEFINES.findall(text) if file.suffix == ".yaml" else []:
            files.setdefault(name, file)
        for block in _TAGGED.findall(text):
            for tag in _WORD.findall(block):
                tags.setdefault(tag, set()).add(file.parent)
    return _Official(files, tags)


def _template(name: str) -> tuple[Path, str] | None:
    """The template that defines a task, and the benchmark's name that fills its placeholder."""
    local = local_tasks()
    if name in local:
        return local[name], ""
    for pattern, file in local.items():
        before, placeholder, after = pattern.partition(NAME)
        if placeholder and name.startswith(before) and name.endswith(after):
            benchmark = name[len(before) : len(name) - len(after)]
            if _WORD.fullmatch(benchmark):
                return file, benchmark
    return None


def _fill(text: str, name: str, data: Path | None) -> str:
    found = _template(name)
    if found is not None and found[1]:
        text = text.replace(NAME, found[1])
    return text.replace(DATA, str(data.resolve())) if data is not None else text


def _source(name: str) -> dict[str, Any]:
    """`dataset_kwargs` of one of the project's own tasks."""
    found = _template(name)
    return (_settings(found[0]).get("dataset_kwargs") or {}) if found else {}


def _settings(file: Path) -> dict[str, Any]:
    """A task file with what it includes, local keys winning."""
    own: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_TolerantLoader)
    include = own.pop("include", None)
    merged: dict[str, Any] = {}
    for other in [include] if isinstance(include, str) else include or []:
        merged |= _settings(file.parent / other)
    return merged | own


def _folders_of(name: str, known: _Official) -> set[Path]:
    """Folders of a task, of a tag's tasks, or of a group and everything below it."""
    folders = set(known.tags.get(name, ()))
    file = known.files.get(name)
    if file is None:
        return folders
    folders.add(file.parent)
    members = _settings(file).get("task")
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
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        parts.append(f"{name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    tasks = "task" if len(unknown) == 1 else "tasks"
    return (
        f"Unknown evaluation {tasks}: {'; '.join(parts)}. Name tasks of configs/lm_eval or of the installed lm-eval "
        f"(`lm_eval ls tasks` lists those)."
    )
