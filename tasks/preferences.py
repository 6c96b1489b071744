"""Stages of a growing source: find new preferences, choose the training pairs, hold out pairs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.config.customization import Customization
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json, storage_errors, write_json
from qadapter.files.folders import resolve_path
from qadapter.files.locks import held
from qadapter.files.shown import shown
from qadapter.preferences import sources
from qadapter.preferences.building import Choices
from qadapter.preferences.ledger import RECORDS, SUMMARY, Changes
from tasks.data import unreachable
from tasks.stages.code_version import code_digest
from tasks.stages.context import RunContext, workspace
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput


@dataclass(frozen=True)
class Seen:
    """The progress of a recurring customization; stored in `.qadapter/customize/<model>.json`.

    Attributes:
        fingerprint: fingerprint of source, held-out pairs and config in the last run that ended.
        ledger: folder of the source's ledger; its records are not validated again.
        outcome: the outcome of that run, as a readable sentence.
        version: the newest registered version at that run's end; a newer one belongs to a killed run.
        started: fingerprint in the last run that started; `started_at` is its start in seconds since 1970.
        announced: fingerprint that the watcher announced last; `announced_at` is the time, 0 if no announcement
            succeeded; `announcements` is their number.
    """

    fingerprint: str = ""
    ledger: str = ""
    outcome: str = ""
    version: int = 0
    started: str = ""
    announced: str = ""
    started_at: float = 0.0
    announced_at: float = 0.0
    announcements: int = 0

    @classmethod
    def read(cls, customization: Customization) -> Seen:
        """Read the stored progress; empty before the first run."""
        file = _seen_file(customization)
        return cls(**read_json(file)) if file.exists() else cls()

    @classmethod
    def update(cls, customization: Customization, **changes: Any) -> Seen:
        """Change some fields and keep the others, safely while a run or the watcher writes too."""
        file = _seen_file(customization)
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with held(file.with_suffix(".state.lock"), guards=f"the progress of {customization.name}", seconds=60.0):
                seen = replace(cls.read(customization), **changes)
                write_json(file, seen.__dict__)
        return seen


def _seen_file(customization: Customization) -> Path:
    return workspace() / ".qadapter" / "customize" / f"{customization.model_name}.json"


@dataclass(frozen=True)
class Delivered:
    """The current files of a source.

    Attributes:
        files: its data files, downloaded if needed.
        unread: files in its folder that are not data files by their names, with their sizes.
    """

    files: list[Path]
    unread: dict[str, int]

    def digests(self) -> dict[str, str]:
        """sha256 of the contents as `files`; if there are unread files, of their names and sizes as `unread`."""
        digests = {"files": sources.fingerprint(self.files)}
        if self.unread:
            digests["unread"] = hashlib.sha256(json.dumps(self.unread).encode()).hexdigest()
        return digests


def delivered(source: Source, data: Path | None = None) -> Delivered:
    """List the current files of a source; a relative path starts at the workspace.

    Args:
        source: the source.
        data: the folder that replaces `{data}` in its path.

    Raises:
        NoDataError: there is nothing yet, which is not an error: the folder is empty, or only the last part of its path
            is missing, or it is below the workspace.
        QAdapterError: the source cannot be read, or its path is wrong.
    """
    where = _where(source.path, data)
    # A data set's card and splits determine which of its files are read.
    whole = source.split is None and source.config_name is None
    try:
        files = _files(source.path, source, source.split, data)
    except sources.NoDataError:
        if not (whole and (unread := sources.unread_files(where))):
            raise
        return Delivered([], unread)
    except sources.MissingPathError as error:
        if not Path(where).is_relative_to(workspace()):
            raise
        raise sources.NoDataError(str(error)) from error  # below the workspace, a first delivery makes its folders
    return Delivered(files, sources.unread_files(where) if whole else {})


def _where(path: str, data: Path | None) -> str:
    where = resolve_path(path, data)
    if "://" not in where and not where.startswith("hub:"):
        where = str(workspace() / Path(where).expanduser())
    return where


def _files(path: str, source: Source, split: str | None, data: Path | None) -> list[Path]:
    return sources.locate(
        _where(path, data),
        cache_dir=workspace() / ".qadapter" / "downloads",
        split=split,
        revision=source.revision,
        config_name=source.config_name,
    )


def heldout_files(source: Source, data: Path | None = None) -> list[Path] | None:
    """The files of the held-out side, downloaded if needed; None where it is a share of the source's prompts.

    Raises:
        QAdapterError: there are none. Held-out pairs must exist, while deliveries may come later.
    """
    if not (source.heldout_path or source.heldout_split):
        return None
    try:
        return _files(source.heldout_path or source.path, source, source.heldout_split, data)
    except sources.NoDataError as error:
        raise QAdapterError(f"the held-out pairs are missing: {error}") from error


@task(task_run_name="new-preferences", retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=unreachable)
def collect_preferences(
    context: RunContext, customization: Customization, previous: str, world: StageResult | None
) -> Any:
    """Validate new and changed records of the source; known records keep their outcome."""
    source = customization.source
    found = delivered(source, world.path if world else context.data)
    digests = found.digests()
    rules = hashlib.sha256(
        f"{code_digest('qadapter.preferences.reading')} {source.domain} {source.max_chars} "
        f"{Choices.of(source)}".encode()
    ).hexdigest()
    before = Path(previous) if previous and (Path(previous) / SUMMARY).exists() else None

    def compute(out: Path, _: Path) -> None:
        from qadapter.preferences.ledger import update

        options: dict[str, Any] = {"domain": source.domain, "max_chars": source.max_chars, "rules": rules}
        options["choices"] = Choices.of(source)
        update(found.files, before, out, unread=found.unread, **options)
        sources.refuse_changed(found.files, digests["files"], source.path)

    def log(run_id: str, output: StageOutput) -> None:
        changes = read_json(output.path / SUMMARY)
        counts = {f"data/{name}": value for name, value in changes.items() if isinstance(value, int)}
        counts |= {f"data/quarantined/{reason}": count for reason, count in changes["quarantined"].items()}
        context.tracker.log_metrics(run_id, counts)

    result = run_stage(
        context,
        "new-preferences",
        module="qadapter.preferences.ledger",
        config={**digests, "domain": source.domain, "max_chars": source.max_chars, "rules": rules},
        inputs={"previous": before} if before else {},
        compute=compute,
        log=log,
    )
    if refused := changes_of(result).refused_files:
        told = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        get_run_logger().warning("%d files of %s are not used:%s", len(refused), shown(source.path), shown(told))
    return task_result(result, result)


def changes_of(ledger: StageResult) -> Changes:
    """The changes that `collect_preferences` found."""
    return Changes(**read_json(ledger.path / SUMMARY))


@task(task_run_name="training-mix")
def mix_preferences(
    context: RunContext,
    customization: Customization,
    ledger: StageResult,
    learnt: Path | None,
    world: StageResult | None,
    everything: bool,
) -> Any:
    """Choose the training pairs and the held-out pairs.

    Args:
        context, customization, ledger, world: those of the run.
        learnt: ledger of the champion's version; records that it lacks are new.
        everything: use all pairs regardless of `mix.rows`: in the first training, or where nothing is new.
    """
    source, mix = customization.source, customization.mix
    held = heldout_files(source, world.path if world else context.data)
    held_before = sources.fingerprint(held) if held else None

    settings: dict[str, Any] = {
        "rows": "all" if everything else mix.rows,
        "old_share": 0.0 if everything or mix.rows == "all" else mix.old_share,
        "heldout": source.heldout,
        "domain": source.domain,
        "seed": customization.seed,
        "max_train_pairs": source.max_train_pairs,
        "max_heldout_pairs": source.max_heldout_pairs,
        "max_chars": source.max_chars,
    }

    def compute(out: Path, _: Path) -> None:
        from qadapter.preferences.mixture import write_mixture

        write_mixture(ledger.path, out, learnt=learnt, heldout_files=held, choices=Choices.of(source), **settings)
        if held and held_before:
            sources.refuse_changed(held, held_before, source.heldout_path or source.path)

    result = run_stage(
        context,
        "training-mix",
        module="qadapter.preferences.mixture",
        config={**settings, "choices": asdict(Choices.of(source)), "heldout_files": held_before},
        inputs={"ledger": ledger.output, **({"learnt": learnt / RECORDS} if learnt else {})},
        compute=compute,
        log=lambda run_id, output: context.tracker.log_metrics(
            run_id,
            {f"data/{name}": n for name, n in read_json(output.path / "summary.json").items() if isinstance(n, int)},
        ),
    )
    return task_result(result, result)


@task(task_run_name="heldout-files")
def read_heldout(context: RunContext, customization: Customization, world: StageResult | None) -> Any:
    """Like `hold_out`, for held-out pairs in files of their own; the source is not read.

    Raises:
        QAdapterError: the held-out side is a share of the source.
    """
    source = customization.source
    files = heldout_files(source, world.path if world else context.data)
    if files is None:
        raise QAdapterError(f"{customization.name} has no separate held-out files; set source.heldout_path")
    before = sources.fingerprint(files)
    settings: dict[str, Any] = {
        "domain": source.domain,
        "seed": customization.seed,
        "max_heldout_pairs": source.max_heldout_pairs,
        "max_chars": source.max_chars,
    }

    def compute(out: Path, _: Path) -> None:
        from qadapter.preferences.mixture import write_heldout

        write_heldout(files, out, choices=Choices.of(source), **settings)
        sources.refuse_changed(files, before, source.heldout_path or source.path)

    result = run_stage(
        context,
        "heldout",
        module="qadapter.preferences.mixture",
        config={**settings, "choices": asdict(Choices.of(source)), "heldout_files": before},
        inputs={},
        compute=compute,
    )
    return task_result(result, result)


@task(task_run_name="heldout")
def hold_out(context: RunContext, mixture: StageResult) -> Any:
    """The held-out pairs as a separate stage: while they stay the same, no policy is measured on them twice."""

    def compute(out: Path, _: Path) -> None:
        shutil.copyfile(mixture.path / "heldout.jsonl", out / "heldout.jsonl")
        kept = {k: v for k, v in read_json(mixture.path / "summary.json").items() if k.startswith("heldout_")}
        write_json(out / "summary.json", kept)

    result = run_stage(
        context,
        "heldout",
        module="qadapter.files.artifacts",
        config={},
        inputs={"heldout": mixture.path / "heldout.jsonl"},
        compute=compute,
    )
    return task_result(result, result)
