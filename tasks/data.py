"""Data stages: the toy world, preference pairs, benchmarks built from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger
from prefect.states import State

from qadapter.files.artifacts import read_json
from qadapter.planning.small import small_domains
from qadapter.preferences import sources
from qadapter.preferences.download import UnreachableError
from qadapter.toyworld import world as toyworld
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.tracking.tracker import DIGEST_LENGTH


@task(task_run_name="toy-world")
def generate_toy_world(context: RunContext) -> Any:
    """Write the toy world's data sets, corpus and benchmarks."""
    settings = context.experiment.toy_world
    assert settings is not None
    # The world's benchmarks of a style ask about the topics that preparing its source will hold out. The key covers all
    # styles, so that a run of a few domains shares its world with a run of all.
    named = {source.domain: source.heldout for source in context.experiment.sources.values()}
    heldout_topics = {style: named.get(style, toyworld.HELDOUT_TOPICS) for style in toyworld.DOMAIN_STYLES}
    split_seed = context.experiment.base_seed

    def compute(out: Path, _: Path) -> None:
        toyworld.ToyWorld(settings.seed).write(
            out,
            corpus_size=settings.corpus_size,
            harmful_for_training=settings.harmful_for_training,
            heldout_topics=heldout_topics,
            split_seed=split_seed,
        )

    result = run_stage(
        context,
        "toy-world",
        module="qadapter.toyworld.world",
        config={**settings.model_dump(), "heldout_topics": heldout_topics, "split_seed": split_seed},
        inputs={},
        compute=compute,
    )
    return task_result(result, result)


def unreachable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Prefect's retry condition: whether a task failed because a source did not answer."""
    return isinstance(state.data, UnreachableError)


@task(task_run_name="prepare-{source}", retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=unreachable)
def prepare_data(context: RunContext, source: str, world: StageResult | None) -> Any:
    """Turn one source into validated preference pairs, split by prompt, with a quarantine and counts."""
    settings = context.experiment.sources[source]
    cache = context.store.root / "downloads"

    def local(path: str, split: str | None) -> list[Path]:
        return sources.locate(
            context.resolve(path, world.path if world else None),
            cache_dir=cache,
            split=split,
            revision=settings.revision,
            config_name=settings.config_name,
        )

    files = local(settings.path, settings.split)
    heldout_files = None
    if settings.heldout_path or settings.heldout_split:
        heldout_files = local(settings.heldout_path or settings.path, settings.heldout_split)
    seed = context.experiment.base_seed
    before = sources.fingerprint(files)
    heldout_before = sources.fingerprint(heldout_files) if heldout_files else None

    def compute(out: Path, _: Path) -> None:
        from qadapter.preferences.building import Choices
        from qadapter.preferences.prepare import prepare

        prepare(
            files,
            out,
            domain=settings.domain,
            heldout=settings.heldout,
            heldout_files=heldout_files,
            seed=seed,
            max_train_pairs=settings.max_train_pairs,
            max_heldout_pairs=settings.max_heldout_pairs,
            max_chars=settings.max_chars,
            judge_pairs=settings.judge_pairs,
            choices=Choices.of(settings),
        )
        sources.refuse_changed(files, before, settings.path)
        if heldout_files and heldout_before:
            sources.refuse_changed(heldout_files, heldout_before, settings.heldout_path or settings.path)

    def log(run_id: str, output: StageOutput) -> None:
        summary = read_json(output.path / "summary.json")
        for side in (side for side in SIDES if f"{side}_pairs" in summary):
            log_pairs(context, run_id, source, output, side)
            log_pairs(context, context.parent_run_id, source, output, side)
        if summary["incomplete_files"]:
            get_run_logger().warning("%s: truncated files: %s", source, ", ".join(summary["incomplete_files"]))
        counts = {name: value for name, value in summary.items() if isinstance(value, int)}
        counts |= {f"quarantined/{reason}": count for reason, count in summary["quarantined"].items()}
        context.tracker.log_metrics(run_id, {f"data/{name}": count for name, count in counts.items()})

    result = run_stage(
        context,
        "prepare",
        label=source,
        module="qadapter.preferences.prepare",
        config={
            **settings.model_dump(exclude={"path", "heldout_path", "revision", "expected_pairs"}),
            "seed": seed,
            "files": before,
            "heldout_files": heldout_before,
        },
        inputs={},
        compute=compute,
        log=log,
    )
    summary = read_json(result.path / "summary.json")
    few = {source: (summary["train_pairs"], summary["heldout_pairs"])}
    for sentence in small_domains(context.experiment, few):  # before any training: every one of them needs the pairs
        get_run_logger().warning("%s", sentence)
    return task_result(result, result)


SIDES = {"train": "training", "heldout": "evaluation", "judge": "judge"}


def log_pairs(context: RunContext, run_id: str, source: str, prepared: StageOutput, side: str) -> None:
    """Log one side of a prepared source (`train`, `heldout` or `judge`) as a data set input of an MLflow run."""
    summary = read_json(prepared.path / "summary.json")
    context.tracker.log_dataset(
        run_id,
        f"{source}-{side}",
        source=context.experiment.sources[source].path,
        digest=summary[f"{side}_sha256"],
        context=SIDES[side],
        profile={"pairs": summary[f"{side}_pairs"], "prompts": summary[f"{side}_prompts"]},
    )


def heldout_data(source: str, prepared: StageOutput) -> tuple[str, str]:
    """Name and digest of the data set that `log_pairs` logs of a source's held-out pairs."""
    digest = str(read_json(prepared.path / "summary.json")["heldout_sha256"])
    return f"{source}-heldout", digest[:DIGEST_LENGTH]


@task(task_run_name="build-benchmarks")
def build_benchmarks(context: RunContext, data: Mapping[str, StageResult], world: StageResult | None) -> Any:
    """Build benchmarks from held-out data, and a corpus from the rest."""
    settings = context.experiment.built_benchmarks
    assert settings is not None
    texts = {
        name: Path(context.resolve(path, world.path if world else None)) for name, path in settings.questions.items()
    }
    heldout = {key: data[source].path / "heldout.jsonl" for key, source in settings.sources.items()}
    replies = {name: heldout[f"replies.{name}"] for name in settings.replies}
    preferences = {name: heldout[f"preferences.{name}"] for name in settings.preferences}
    seed = context.experiment.base_seed
    before = {name: sources.fingerprint([file]) for name, file in texts.items()}

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.benchmarks.build import write_benchmarks

        write_benchmarks(
            replies,
            texts,
            preferences=preferences,
            max_items=settings.max_items,
            max_chars=settings.max_chars,
            seed=seed,
            out=out,
        )
        for name, file in texts.items():
            sources.refuse_changed([file], before[name], str(file))

    result = run_stage(
        context,
        "benchmarks",
        module="qadapter.evaluation.benchmarks.build",
        config={**settings.model_dump(exclude={"questions"}), "seed": seed},
        inputs={
            **{key.replace(".", "-", 1): data[source].output for key, source in settings.sources.items()},
            **{f"questions-{name}": path for name, path in texts.items()},
        },
        compute=compute,
    )
    return task_result(result, result)
