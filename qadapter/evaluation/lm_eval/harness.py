"""Run evaluation tasks through the unmodified lm-eval, for any policy in memory."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.metrics import mean as lm_eval_mean
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.items import known_by
from qadapter.evaluation.lm_eval.catalog import (
    TaskFolders,
    check_tasks,
    expand_suites,
    find_tasks,
)
from qadapter.evaluation.lm_eval.definitions import needs_data, render_own
from qadapter.evaluation.lm_eval.model import PolicyLM, require_chat_template
from qadapter.evaluation.lm_eval.official_files import write_definitions

__all__ = ["TaskScores", "check_tasks", "evaluate_tasks"]

UNNAMED_FILTER = "none"
"""lm-eval's name for the filter of a task that defines none."""


@dataclass
class TaskScores:
    """The results of lm-eval.

    Attributes:
        metrics: `<task>/<metric>` to value, groups included. A task with several answer filters has its metrics once
            for each, as `<task>/<metric>.<filter>`.
        stderr: standard error over items, for metrics that are a mean over items.
        samples: items of each task in the order of the benchmark: `doc_id`, `score` (of the one metric that the task is
            known by), `scores` (each metric's), `prompt`, `response`, `target`.
        higher_is_better: direction of each key of `metrics`.
        shortened: requests whose prompt lost its beginning because the model's context is too short.
        groups: group → its tasks, those of the groups in it among them.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    shortened: int = 0
    groups: dict[str, list[str]] = field(default_factory=dict)

    def update(self, other: TaskScores) -> None:
        """Add the tasks of another evaluation of the same policy."""
        self.metrics |= other.metrics
        self.stderr |= other.stderr
        self.samples |= other.samples
        self.higher_is_better |= other.higher_is_better
        self.shortened += other.shortened
        self.groups |= other.groups


def evaluate_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    own: Mapping[str, Path] | None = None,
    data: Path | None = None,
    official_data: Path | None = None,
    limit: int | None = None,
    limits: Mapping[str, int] | None = None,
    batch_size: int | str = 64,
    apply_chat_template: bool = True,
    plain_tasks: Sequence[str] = (),
    fewshot_as_multiturn: bool = True,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    in_words: Callable[[str], str] | None = None,
) -> TaskScores:
    """Score a policy on tasks of `qadapter/evaluation/benchmarks` and of lm-eval itself.

    Args:
        model: any policy: a causal language model, a PEFT model or a Q-Adapter; its training mode is left as it was.
        tokenizer: the policy's; its chat template is applied to every prompt if `apply_chat_template`.
        tasks: names of tasks, groups and suites (`paper_suite`).
        own: benchmarks of the user's own, name → file of questions, asked after `tasks`.
        data: folder whose `benchmarks/` holds the files of the project's own tasks.
        official_data: folder with files of lm-eval's own tasks (`qadapter.evaluation.lm_eval.official_files`), by
            default `<data>/benchmarks`; what is not there comes from the hub.
        limit: use only the first items of each task.
        limits: member of `tasks` or `own` → its own limit; the tasks of a group or suite each have the group's.
        batch_size: prompts per batch, or "auto" for the largest that fits (found by trial, so meant for a GPU).
        plain_tasks: members of `tasks` prompted without chat template, in addition to those that a suite lists.
        fewshot_as_multiturn: give worked examples as turns of the conversation; needs the chat template.
        num_fewshot: worked examples in place of each task's own number (tasks that fix 0 keep it).
        max_gen_toks: the longest answer in tokens, in place of each task's own.
        device: where to run; the model's own device by default.
        seed: seed of the choice of worked examples and of sampled answers.
        in_words: from the text of a question to the text that is asked in its place.

    Raises:
        QAdapterError: an unknown task, a benchmark file that is missing or faulty, a tokenizer without a chat template,
            an answer that cannot fit into the model's context.
    """
    if device is not None:
        model.to(device)
    was_training = model.training
    try:
        with opened_tasks(
            tokenizer,
            tasks,
            own=own,
            data=data,
            official_data=official_data,
            limit=limit,
            limits=limits,
            apply_chat_template=apply_chat_template,
            plain_tasks=plain_tasks,
            fewshot_as_multiturn=fewshot_as_multiturn,
            num_fewshot=num_fewshot,
            max_gen_toks=max_gen_toks,
            seed=seed,
            in_words=in_words,
        ) as score:
            return score(
                lambda chat: PolicyLM(model, tokenizer=tokenizer, batch_size=batch_size, apply_chat_template=chat)
            )
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class OpenedTasks:
    """Loaded tasks, which can be asked of several models.

    Attributes:
        parts: (with chat template, limit, lm-eval's loaded tasks) of the tasks that one call of lm-eval can ask.
        fewshot_as_multiturn, seed: as in `evaluate_tasks`.
    """

    parts: Sequence[tuple[bool, int | None, Any]]
    fewshot_as_multiturn: bool
    seed: int

    @property
    def generated(self) -> dict[str, bool]:
        """Each task whose answers are generated → whether it is asked with chat template; a group's one by one."""
        return {
            name: chat
            for chat, _, loaded in self.parts
            for name, task in loaded["tasks"].items()
            if task.OUTPUT_TYPE == "generate_until"
        }

    def __call__(self, make: Callable[[bool], PolicyLM]) -> TaskScores:
        """Score a model.

        Args:
            make: lm-eval's model for tasks with chat template (True) or without.
        """
        scores = TaskScores()
        for chat, most, loaded in self.parts:
            lm = make(chat)
            with _seeded(self.seed, lm.device):
                raw = evaluate(
                    lm,
                    loaded,
                    limit=most,
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=self.fewshot_as_multiturn and chat,
                )
            scores.update(_collect(raw, loaded))
            scores.shortened += lm.shortened
        return scores


@contextmanager
def opened_tasks(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    own: Mapping[str, Path] | None = None,
    data: Path | None = None,
    official_data: Path | None = None,
    limit: int | None = None,
    limits: Mapping[str, int] | None = None,
    apply_chat_template: bool = True,
    plain_tasks: Sequence[str] = (),
    fewshot_as_multiturn: bool = True,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    seed: int = 0,
    in_words: Callable[[str], str] | None = None,
) -> Iterator[OpenedTasks]:
    """Load tasks once, to score with several models.

    Args:
        tokenizer, tasks, own, data, official_data, limit, limits, apply_chat_template, plain_tasks,
            fewshot_as_multiturn, num_fewshot, max_gen_toks, seed, in_words: as in `evaluate_tasks`.

    Yields:
        The tasks; called with what makes lm-eval's model, they are asked.

    Raises:
        QAdapterError: as `evaluate_tasks`.
    """
    own = own or {}
    names, without_template = expand_suites([*tasks, *own], plain_tasks)
    plain = set(without_template if apply_chat_template else names)
    if not plain.issuperset(names):
        require_chat_template(tokenizer)
    named = [name for name in names if name not in own]
    found = find_tasks(named) if named or not own else TaskFolders((), ())
    if data is None and (without := needs_data(found.local)):
        raise QAdapterError(f"Task {without[0]} reads its items from a data folder, and none was given. Give `data`.")
    with _quiet_lm_eval(), tempfile.TemporaryDirectory(prefix="qadapter-tasks-") as rendered:
        render_own(Path(rendered), own)
        manager = _task_manager(named, found, data, official_data, Path(rendered))
        parts = []
        for (chat, most), some in _alike(names, plain, _limit_of_each([*tasks, *own], limit, limits or {})).items():
            loaded = _load(manager, some)
            for task in loaded["tasks"].values():
                _configure(task, num_fewshot=num_fewshot, max_gen_toks=max_gen_toks, seed=seed)
                if in_words is not None:
                    _ask_in(task, in_words)
            parts.append((chat, most, loaded))
        yield OpenedTasks(parts, fewshot_as_multiturn, seed)


def _limit_of_each(tasks: Sequence[str], limit: int | None, limits: Mapping[str, int]) -> dict[str, int | None]:
    """Task or group → its limit; a suite's tasks have the suite's."""
    return {name: limits.get(asked, limit) for asked in tasks for name in expand_suites([asked])[0]}


def _alike(
    names: Sequence[str], plain: Collection[str], limits: Mapping[str, int | None]
) -> dict[tuple[bool, int | None], list[str]]:
    """The tasks that one call of lm-eval can ask: (with chat template, limit) → names, those with a template first."""
    found: dict[tuple[bool, int | None], list[str]] = {}
    for name in sorted(names, key=lambda name: name in plain):
        found.setdefault((name not in plain, limits[name]), []).append(name)
    return found


def _task_manager(
    names: Sequence[str], found: TaskFolders, data: Path | None, official_data: Path | None, rendered: Path
) -> TaskManager:
    """lm-eval's view of the tasks: its own folders as far as they are needed, then ours, which win."""
    write_definitions(found, names, data, official_data, rendered)
    return TaskManager(include_path=[*found.official, rendered], include_defaults=False)


def _load(manager: TaskManager, names: Sequence[str]) -> Any:
    """The tasks with their items.

    Raises:
        QAdapterError: the items of a task come from the hub, and the hub cannot be reached or has them no more.
    """
    try:
        return manager.load(list(names))
    except (OSError, ValueError, KeyError) as error:
        # `datasets` raises an OSError or a ValueError offline, by the state of its cache.
        first_line = str(error).partition("\n")[0]
        raise QAdapterError(
            f"A task of {', '.join(names)} could not be loaded: {first_line} If its items come from the hub, allow the "
            f"network, or put them into a folder and give it as `official_data`."
        ) from error


def _configure(task: Any, *, num_fewshot: int | None, max_gen_toks: int | None, seed: int) -> None:
    """Set on a loaded task what `simple_evaluate` would set, by its own rules."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)
    if max_gen_toks is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": max_gen_toks}, update=True)


def _ask_in(task: Any, in_words: Callable[[str], str]) -> None:
    """Let a loaded task ask its questions, and its worked examples, in other words."""
    original = task.doc_to_text

    def asked(*arguments: Any, **options: Any) -> Any:
        text = original(*arguments, **options)
        return in_words(text) if isinstance(text, str) else text  # elsewhere it is the number of the right choice

    task.doc_to_text = asked


def _collect(raw: Any, loaded: Any) -> TaskScores:
    scores = TaskScores()
    for name, group in loaded["groups"].items():
        scores.groups[name] = [task.task_name for task in group.get_all_tasks()]
    for name, results in raw["results"].items():
        filters = {key.partition(",")[2] for key in results if "," in key}
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            full = f"{name}/{_metric_name(metric, filter_name, filters)}"
            scores.metrics[full] = float(value)
            scores.higher_is_better[full] = bool(raw["higher_is_better"].get(name, {}).get(metric, True))
    for name, logged in raw["samples"].items():
        scores.samples[name] = _items(loaded["tasks"][name], logged)
        for metric, aggregation in loaded["tasks"][name].aggregation().items():
            if aggregation is lm_eval_mean:
                _add_stderr(scores, name, metric)
    return scores


def _metric_name(metric: str, filter_name: str, filters: set[str]) -> str:
    return f"{metric}.{filter_name}" if len(filters) > 1 or filter_name != UNNAMED_FILTER else metric


def _items(task: Any, logged: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge lm-eval's records, one per item and filter, into one record per item."""
    filters = {record["filter"] for record in logged}
    items: dict[int, dict[str, Any]] = {}
    for record in logged:
        scores = {_metric_name(m, record["filter"], filters): record[m] for m in record["metrics"]}
        if (item := items.get(record["doc_id"])) is not None:
            item["scores"] |= scores
            continue
        response, target = _readable(task, record)
        items[record["doc_id"]] = {
            "doc_id": record["doc_id"],
            "score": None,
            "scores": scores,
            "prompt": record["arguments"][0][0],
            "response": response,
            "target": target,
        }
    for item in items.values():
        item["score"] = item["scores"][known_by(item["scores"])]
    return [items[doc_id] for doc_id in sorted(items)]


def _readable(task: Any, record: dict[str, Any]) -> tuple[str | None, str]:
    """The model's answer (the generated text, the most likely choice, nothing for plain text) and the right one."""
    target = record["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(record["doc"])
        likelihoods = [response[0][0] for response in record["resps"][: len(choices)]]
        best = choices[likelihoods.index(max(likelihoods))]
        return best, choices[target] if isinstance(target, int) else str(target)
    if task.OUTPUT_TYPE == "generate_until":
        return str(record["resps"][0][0]), str(target)
    return None, str(target)


def _add_stderr(scores: TaskScores, task: str, metric: str) -> None:
    """Standard error of a mean over items, √(Σ(x - mean)² / (n - 1) / n), for each filter of the metric."""
    for key in [k for k in scores.metrics if k == f"{task}/{metric}" or k.startswith(f"{task}/{metric}.")]:
        values = [item["scores"][key.partition("/")[2]] for item in scores.samples[task]]
        if len(values) > 1 and all(isinstance(value, int | float) for value in values):
            centre = sum(values) / len(values)
            variance = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
            scores.stderr[key] = math.sqrt(variance / len(values))


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Errors only from lm-eval's loggers: it warns that a model is 'already initialised' and of every default."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sampled answers depend on `seed` alone, and the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
