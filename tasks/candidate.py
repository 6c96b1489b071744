"""Stages of a candidate: continue the champion's training, measure, decide, register."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from qadapter.config.customization import Customization
from qadapter.config.experiment import Experiment
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.new_rows_text import new_rows_sentence, reversed_sentence
from qadapter.files.artifacts import digest_file, digest_tree, read_json
from qadapter.files.shown import shown
from qadapter.gate.decision import Decision, Finding, decide, what_the_dial_changes
from qadapter.gate.measured import Measured
from qadapter.methods import q_adapter
from qadapter.preferences.ledger import RECORDS
from qadapter.serving.registered import DamagedError
from tasks.data import log_pairs
from tasks.dialled import Dialled
from tasks.evaluate import Evaluation
from tasks.stages.context import Cell, RunContext, workspace
from tasks.stages.prefect_artifacts import show
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput, StageStore
from tasks.tracking.registry import Candidate, Registry, Version
from tasks.tracking.tracker import Tracker
from tasks.train import Base, keyed, log_adapter

METHOD = q_adapter.METHOD.name
LEDGER = "ledger"  # folder in the artifacts of a version's run
SHOWN = ("adaptation/", "retention/", "forgetting/", "drift/moved")
"""Beginnings of the metrics that a version keeps."""


def registry_of(customization: Customization) -> Registry:
    """The registered model of a customization, in this project's MLflow store."""
    lock = workspace() / ".qadapter" / "customize" / f"{customization.model_name}.aliases.lock"
    return Registry(Tracker.for_project(workspace()), customization.model_name, lock)


def learnt_by(champion: Version | None, registry: Registry) -> Path | None:
    """Find the ledger of the preferences that a version and its parents were trained on; None before the first version.

    It omits newer preferences on which only rejected candidates were trained. MLflow keeps the ledger even if the stage
    that wrote it is gone; while that stage exists, nothing is downloaded.
    """
    if champion is None:
        return None
    stage, digest = Path(_tags(champion, registry.name)["ledger"]), champion.tags.get("ledger_digest")

    def holds(folder: Path) -> bool:
        return _holds_ledger(folder, digest)

    if holds(stage):
        return stage
    if registry.has(champion, LEDGER) and holds(kept := registry.files(champion, LEDGER, holds)):
        return kept
    get_run_logger().warning(
        "the ledger of version %d is missing or damaged, in MLflow and in %s: every preference counts as new",
        champion.number,
        stage,
    )
    return None


def refuse_other_division(champion: Version | None, customization: Customization) -> None:
    """Refuse a held-out share of the source that contains prompts which the champion was trained on.

    Which prompts are held out depends on the seed and the share. With other ones the champion, and a candidate that
    goes on from it, would be measured on their own training data.

    Raises:
        QAdapterError: the champion's config divided the prompts otherwise.
    """
    now = _division(customization.model_dump(mode="json"))
    if champion is None or now is None:
        return
    try:
        then = _division(json.loads(champion.tags["config"])["customization"])
    except (KeyError, ValueError, TypeError):  # registered by hand, or a config that is too long for a tag
        return
    if then != now:
        before = "held-out files" if then is None else f"heldout {then[0]:g} and seed {then[1]}"
        raise QAdapterError(
            f"The champion, version {champion.number}, was trained with {before}; with heldout {now[0]:g} and seed "
            f"{now[1]} other prompts of {shown(customization.source.path)} are held out, and it has learnt some of "
            "them. Set them back, give held-out pairs of their own (source.heldout_path), or start a new model_name."
        )


def _division(customization: Mapping[str, Any]) -> tuple[float, int] | None:
    """What decides which prompts of the source are held out; None where held-out pairs are files of their own."""
    source = customization["source"]
    if source["heldout_path"] or source["heldout_split"]:
        return None
    return float(source["heldout"]), int(customization["seed"])


def _tags(champion: Version, name: str) -> Mapping[str, str]:
    """The tags of the version whose training is continued.

    Raises:
        QAdapterError: the version lacks this pipeline's tags because it was registered by hand.
    """
    if lacking := [tag for tag in ("ledger", "base_digest", "adapter_digest") if tag not in champion.tags]:
        raise QAdapterError(
            f"Version {champion.number} of {name!r}, the champion, was not registered by this pipeline: it lacks the "
            f"tags {', '.join(lacking)}, which identify its data and files. Make a version with these tags the "
            "champion (`make rollback TO=number`; `make history` lists all), or give the config another model_name."
        )
    return champion.tags


def _holds_ledger(folder: Path, digest: str | None) -> bool:
    records = folder / RECORDS
    return records.is_file() and digest in (None, digest_file(records))


def config_of(customization: Customization, experiment: Experiment) -> dict[str, Any]:
    """The whole config as JSON values."""
    return {
        "customization": customization.model_dump(mode="json"),
        "experiment": experiment.model_dump(mode="json", by_alias=True),
    }


def champions_base(profile_base: Base, champion: Version | None, model: ModelSettings, name: str) -> Base:
    """The base of the champion's adapter: the profile's base if it is the same, otherwise the registered one.

    Both are loaded with the version's settings (commit of a hub id, precision, quantization), not the profile's current
    ones.

    Args:
        profile_base: the base that the profile trains or refers to now.
        champion: the version whose training is continued; None for the first candidate.
        model: the profile's model section.
        name: name of the registered model.
    """
    if champion is None:
        return profile_base
    from tasks.tracking.models import find_base, find_numerics

    registered = f"{name}/{champion.number}"
    digest = _tags(champion, name)["base_digest"]
    recorded = find_numerics(registered)
    if digest != base_digest(profile_base, model):
        get_run_logger().warning("the profile has another base now; version %d's own is used", champion.number)
        location = _or_finished(lambda: find_base(registered), digest, "model")
        # The profile's revision belongs to the profile's base.
        return Base(location, None, profile_base.name, {"revision": None, **recorded})
    base = replace(profile_base, numerics={**profile_base.numerics, **recorded})
    if base.settings(model).numerics() == profile_base.settings(model).numerics():
        return profile_base
    get_run_logger().warning("the profile loads the base differently; version %d's settings are used", champion.number)
    return base


def champions_adapter(champion: Version, name: str) -> Path:
    """The champion's adapter as registered: its training is continued, and it is measured.

    Args:
        champion: the version.
        name: name of the registered model.
    """
    from tasks.tracking.models import find_adapter

    registered = f"{name}/{champion.number}"
    digest = _tags(champion, name)["adapter_digest"]
    return Path(_or_finished(lambda: str(find_adapter(registered)), digest, "adapter"))


def _or_finished(find: Callable[[], str], digest: str, folder: str) -> str:
    """The registered files; if they are damaged, the folder of the finished stage from which they were copied."""
    try:
        return find()
    except DamagedError as error:
        for stage in StageStore(workspace() / ".qadapter").entries():
            if (stage / folder).is_dir() and digest_tree(stage / folder) == digest:
                get_run_logger().warning("%s The same files exist in %s and are used instead.", error, stage)
                return str(stage / folder)
        raise


def base_digest(base: Base, model: ModelSettings) -> str:
    """The identity of a base: sha256 of its files, or hub id and commit (the revision if the commit is unknown)."""
    folder = Path(base.location)
    if folder.is_dir():
        return digest_tree(folder)
    return f"{base.location}@{base.settings(model).revision or 'main'}"


@task(task_run_name="train-candidate", tags=["accelerator"])
def train_candidate(context: RunContext, cell: Cell, base: Base, data: StageResult, champion: StageResult) -> Any:
    """Train the champion's adapter further."""
    context = base.within(context)
    experiment = context.experiment
    choice, seed = experiment.methods.of(METHOD), cast(int, cell.seed)
    training = experiment.training_of(cell.domain)
    launcher = ProcessLauncher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.methods.q_adapter import continue_adapter

        launcher(
            continue_adapter,
            choice,
            base.location,
            champion.path / "adapter",
            data.path / "train.jsonl",
            model=experiment.model,
            training=training,
            seed=seed,
            out=out,
            scratch=scratch,
        )

    def log(run_id: str, output: StageOutput) -> None:
        log_pairs(context, run_id, experiment.domains[cell.domain].source, data.output, "train")
        log_adapter(context, run_id, cell, output, choice.model_dump(exclude_none=True))

    result = run_stage(
        context,
        "train",
        run_name=f"candidate · {cell.name}",
        tags=cell.tags(),
        module=q_adapter.METHOD.module,
        config={
            "method": METHOD,
            METHOD: choice.model_dump(),
            "training": keyed(training),
            "model": experiment.model.key(),
            "seed": seed,
            **launcher.keyed(),
            **base.config(),
        },
        params={"domain": cell.domain, "base": base.name},
        inputs={**base.inputs(), "data": data.output, "champion": champion.output},
        compute=compute,
        log=log,
    )
    return task_result(result, result)


@task(task_run_name="adapter-of-{label}")
def take_adapter(context: RunContext, label: str, folder: Path, run_id: str | None) -> Any:
    """A stage that holds only an adapter's files.

    Its digest is the same before and after registration, so the measurements of a candidate are found in the cache
    when it has become the champion.
    """

    def compute(out: Path, _: Path) -> None:
        shutil.copytree(folder, out / "adapter")

    result = run_stage(
        context,
        "adapter",
        run_id=run_id,
        run_name=label,
        module="qadapter.files.artifacts",
        config={},
        inputs={"adapter": folder},
        compute=compute,
    )
    return task_result(result, result)


@dataclass(frozen=True)
class Rows:
    """The policies that the gate compares.

    Attributes:
        candidate: what would be promoted.
        champion: None before the first promotion.
        base: of all of them.
        as_trained: the candidate before its dial was set; None where no dial was chosen.
        dialled: how the dial was chosen.
    """

    candidate: Evaluation
    champion: Evaluation | None
    base: Evaluation
    as_trained: Evaluation | None = None
    dialled: Dialled | None = None


def measured(row: Evaluation) -> Measured:
    """The item-level results of a row's evaluation."""
    return Measured.read(row.adaptation.path, row.retention.path)


@task(task_run_name="gate")
def judge_candidate(
    context: RunContext, customization: Customization, rows: Rows, parent: int | None, new_rows: StageResult | None
) -> Decision:
    """Compare the candidate with the champion, or with the base where there is no champion yet."""
    rival = rows.champion or rows.base
    name = f"champion (version {parent})" if rows.champion else "base"
    prompts = rows.dialled.prompts() if rows.dialled else None

    def judged(row: Evaluation) -> Decision:
        """The gate's decision; after the choice of a dial, on the items that it was not chosen on."""
        ours, before, base = (
            measured(one) if prompts is None else measured(one).reported(prompts) for one in (row, rival, rows.base)
        )
        return decide(customization.gate, ours, before, base, name)

    decision = judged(rows.candidate)
    notes = [] if new_rows is None else [new_rows_sentence(new_rows.path)]
    if rows.dialled is not None and rows.as_trained is not None:
        notes += [rows.dialled.choice["sentence"], *what_the_dial_changes(judged(rows.as_trained), decision)]
    if new_rows is not None and (reversed_labels := reversed_sentence(new_rows.path)):
        found = Finding("flipped_labels", customization.gate.flipped_labels == "report", reversed_labels)
        decision = replace(decision, findings=(*decision.findings, found))
    if notes:
        decision = replace(decision, notes=tuple(notes))
    run_id = rows.candidate.adaptation.run_id
    context.tracker.log_metrics(run_id, decision.metrics())
    context.tracker.log_tags(run_id, {"gate": "passed" if decision.passed else "rejected"})
    context.tracker.log_text(run_id, json.dumps([asdict(f) for f in decision.findings], indent=2), "gate.json")
    lines = [f"| {'kept' if f.passed else '**broken**'} | {f.rule} | {f.text} |" for f in decision.findings]
    lines += [f"| note | | {note} |" for note in decision.notes]
    verdict = "promoted" if decision.passed else "rejected"
    show(
        create_markdown_artifact,
        markdown="\n".join([f"# {verdict}", "", "| | rule | |", "| --- | --- | --- |", *lines]),
        key=f"gate-{customization.name}".replace("_", "-"),
        description=f"The gate of {customization.model_name}: {verdict}",
    )
    get_run_logger().info("gate: %s\n%s", verdict, "\n".join(decision.reasons))
    return decision


@task(task_run_name="register")
def register_candidate(
    context: RunContext,
    customization: Customization,
    decision: Decision,
    rows: Rows,
    base: Base,
    adapter: StageResult,
    mixture: StageResult,
    ledger: StageResult,
    fingerprint: str,
    parent: int | None,
) -> Version:
    """Register the candidate with all its tags; the caller moves the alias."""
    from qadapter.policy.files import read_policy

    summary = read_json(mixture.path / "summary.json")
    data_digest = digest_of({side: summary[f"{side}_sha256"] for side in ("train", "heldout")})
    config = config_of(customization, context.experiment)
    config_digest, base_is = digest_of(config), base_digest(base, context.experiment.model)
    adapter_digest = digest_tree(adapter.path / "adapter")
    # The run of the training, which the evaluation continued: it holds the metrics, curves and files.
    run_id = rows.candidate.adaptation.run_id
    numbers = {**rows.candidate.adaptation.output.metrics(), **rows.candidate.retention.output.metrics()}
    candidate = Candidate(
        # With another decision the same files are another candidate: the decision on a version never changes.
        key=digest_of(
            {
                "adapter": adapter_digest,
                "base": base_is,
                "data": data_digest,
                "parent": str(parent or ""),
                "config": config_digest,
                "passed": decision.passed,
            }
        ),
        run_id=run_id,
        passed=decision.passed,
        reasons=decision.reasons,
        parent=parent,
        facts={
            "data_digest": data_digest,
            "data_fingerprint": fingerprint,
            "ledger": str(ledger.path),
            "ledger_digest": digest_file(ledger.path / RECORDS),
            "data_source": customization.source.path,
            "data_pairs": f"{summary['train_pairs']} ({summary['fresh_pairs']} new)",
            "config_digest": config_digest,
            "adapter_digest": adapter_digest,
            "base": base.location,
            "base_digest": base_is,
            "customization": customization.name,
            **({"dial": str(read_policy(adapter.path / "adapter").dial)} if customization.budget else {}),
        },
        metrics={name: value for name, value in numbers.items() if name.startswith(SHOWN)},
        config=config,
    )

    def log_model() -> str:
        from tasks.tracking.models import log_served_model

        context.tracker.log_file(run_id, ledger.path / RECORDS, LEDGER)
        known = str(context.tracker.call("get_run", run_id).info.run_id)  # not a ticket from an outage of MLflow
        return log_served_model(
            known,
            base=base.location,
            adapter=adapter.path / "adapter",
            model=base.settings(context.experiment.model),
        )

    version = registry_of(customization).register(candidate, log_model)
    get_run_logger().info("registered as version %d of %s", version.number, customization.model_name)
    return version


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
