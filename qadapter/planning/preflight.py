"""The checks before a run: data, tasks, the model, files of benchmarks, and the judge's key and price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qadapter.config.experiment import Experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.build import QUESTION_FIELDS
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.benchmarks.table import tasks_made
from qadapter.evaluation.lm_eval.catalog import (
    better_when_lower,
    check_own,
    check_tasks,
    expand_suites,
    find_tasks,
)
from qadapter.evaluation.lm_eval.definitions import needs_data
from qadapter.files.folders import resolve_path
from qadapter.judging.plan import plan_judges
from qadapter.preferences import sources
from qadapter.preferences.building import Choices
from qadapter.preferences.stream import check_usable


def check_experiment(
    experiment: Experiment,
    folder: Path | None,
    *,
    fixed: Mapping[str, Source],
    rows: int,
    downloads: Path,
    remote: bool = True,
) -> None:
    """Look at everything that can be looked at without computing.

    Args:
        experiment: the config.
        folder: the data folder, an existing one.
        fixed: the sources whose data have to be there now; none of a growing source, which may still be empty.
        rows: policies whose answers the whole run judges.
        downloads: where files of sources are kept.
        remote: ask for sources and models on the network too; without it only those on this machine are looked at.

    Raises:
        QAdapterError: with all that is needed to put it right.
    """
    for section in (experiment.training, experiment.pretraining, experiment.helpful_sft):
        if section is not None:
            section.check_trackers()
    if experiment.toy_world is None:
        _check_sources(experiment, fixed, folder, downloads, remote)
    retention = experiment.evaluation.retention
    if retention.tasks or not retention.own:
        check_tasks(retention.tasks)
    check_own(retention.own_files(folder))
    if experiment.evaluation.curve is not None:
        require_accuracy(experiment, "a budget of forgetting is one of the mean of accuracies")
    if experiment.lora.further():
        from qadapter.policy.loading import lora_config  # transformers takes seconds to import

        lora_config(experiment.lora)
    if (pretrained := experiment.model.pretrained) and (remote or Path(pretrained).exists()):
        from qadapter.policy.loading import check_pretrained, lora_config

        names, plain = expand_suites([*retention.tasks, *retention.own], retention.plain_tasks)
        templated = [name for name in names if name not in plain]
        check_pretrained(experiment.model, templated, lora_config(experiment.lora))
    _check_official_data(experiment, folder)
    _check_benchmarks(experiment)
    plan_judges(experiment, rows)


def require_accuracy(experiment: Experiment, why: str) -> None:
    """Refuse retention tasks whose scores are all better when lower: nothing is averaged of them.

    Args:
        experiment: whose tasks are known.
        why: what needs the mean.

    Raises:
        QAdapterError: no task has an accuracy.
    """
    retention = experiment.evaluation.retention
    tasks, _ = expand_suites(retention.tasks)
    if better_when_lower(tasks) == tasks and not retention.own:
        raise QAdapterError(
            f"evaluation.retention.tasks has no task with an accuracy, only {', '.join(tasks) or 'none'}: {why}. Add "
            "such a task, for example <name>_word_order."
        )


def _check_sources(
    experiment: Experiment, fixed: Mapping[str, Source], folder: Path | None, downloads: Path, remote: bool
) -> None:
    """Each source is there, of a known format, and has a usable pair.

    Raises:
        QAdapterError: naming each one that is not.
    """
    problems = []
    for name, source in fixed.items():
        sides = [(source.path, source.split)]
        if source.heldout_path or source.heldout_split:
            sides.append((source.heldout_path or source.path, source.heldout_split))
        for path, split in sides:
            try:
                where = resolve_path(path, folder)
                options = {"split": split, "revision": source.revision, "config_name": source.config_name}
                away = "://" in where or where.startswith("hub:")
                if remote or not away:
                    sources.check(where, **options)
                if not away:
                    files = sources.locate(where, cache_dir=downloads, **options)
                    choices = Choices.of(source)
                    if choices.pairing == "none" and (path, split) != sides[0]:
                        choices = replace(choices, pairing=None)  # the held-out side is always of pairs
                    check_usable(files, source.domain, source.max_chars, choices)
            except QAdapterError as error:
                problems.append(f"  sources.{name}: {error}")
    if experiment.built_benchmarks:
        for name, path in experiment.built_benchmarks.questions.items():
            try:
                read_items(resolve_path(path, folder), QUESTION_FIELDS)
            except QAdapterError as error:
                problems.append(f"  built_benchmarks.questions.{name}: {error}")
    if problems:
        raise QAdapterError("the data cannot be used:\n" + "\n".join(dict.fromkeys(problems)))


def _check_official_data(experiment: Experiment, data: Path | None) -> None:
    """The files for lm-eval's own tasks, where the user names a folder of them.

    Raises:
        QAdapterError: there is no such folder, or a file in it is not what its task needs.
    """
    retention = experiment.evaluation.retention
    if retention.official_data is None:
        return
    folder = Path(resolve_path(retention.official_data, data))
    if not folder.is_dir():
        raise QAdapterError(
            f"evaluation.retention.official_data: {retention.official_data!r} is no folder; give the folder with the "
            "files of lm-eval's own tasks (docs/evaluation.md), or leave it out for those of the hub"
        )
    from qadapter.evaluation.lm_eval.official_files import check_files  # lm-eval takes seconds to import

    check_files(retention.tasks, folder)


def _check_benchmarks(experiment: Experiment) -> None:
    """Each of the project's own retention tasks has a benchmark that this experiment makes.

    Raises:
        QAdapterError: naming those that have none.
    """
    made = tasks_made(experiment.built_benchmarks, experiment.toy_world is not None)
    tasks, _ = expand_suites(experiment.evaluation.retention.tasks)
    if not tasks:
        return
    if lacking := [task for task in needs_data(find_tasks(tasks).local) if task not in made]:
        known = f"; those it makes are for {', '.join(sorted(made))}" if made else ""
        raise QAdapterError(
            f"evaluation.retention.tasks names {', '.join(lacking)}, but this experiment makes no benchmark for that"
            f"{known}. Leave it out or add to built_benchmarks."
        )
