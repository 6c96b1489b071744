"""Training stages: the base, its SFT on helpful data, the needs of methods, one adapter per domain, method and seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from prefect import task

from qadapter.config.execution import LaunchSettings
from qadapter.config.experiment import Experiment
from qadapter.config.model import ModelSettings
from qadapter.files.artifacts import read_json, read_json_lines, write_json
from qadapter.methods.method import Need
from qadapter.methods.table import method_named
from qadapter.policy.gguf import gguf_file
from tasks.data import log_pairs
from tasks.stages.context import Cell, RunContext
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput


@dataclass(frozen=True)
class Base:
    """A base model: its location, and its identity in cache keys.

    Attributes:
        location: folder, or hub id.
        output: the stage that made it; None for an external model.
        name: `pretrained` or `helpful`.
        numerics: how to load its weights (`dtype`, `quantization`, `revision`), where this differs from the experiment:
            the commit of a hub id, whose branch can move, and all settings of a champion's base.
    """

    location: str
    output: StageOutput | None
    name: str
    numerics: Mapping[str, str | None] = field(default_factory=dict)

    def inputs(self) -> dict[str, StageOutput | Path]:
        """The base as a stage's input, if it consists of local files."""
        if self.output is not None:
            return {"base": self.output}
        folder = Path(self.location)
        return {"base": folder} if folder.is_dir() else {}

    def config(self) -> dict[str, Any]:
        """The base as part of a stage's config, if it is a hub id."""
        return {} if self.inputs() else {"base": self.location}

    def settings(self, model: ModelSettings) -> ModelSettings:
        """The model settings with which this base is loaded, given the experiment's."""
        if not self.numerics:
            return model
        return model.model_copy(update={"from_scratch": None, "pretrained": self.location, **self.numerics})

    def within(self, context: RunContext) -> RunContext:
        """The context for a stage that loads this base: experiment and stage keys have this base's settings."""
        if not self.numerics:
            return context
        model = self.settings(context.experiment.model)
        return replace(context, experiment=context.experiment.model_copy(update={"model": model}))


@task(task_run_name="pretrain")
def pretrain_base(
    context: RunContext, data: Mapping[str, StageResult], world: StageResult | None, built: StageResult | None
) -> Any:
    """Train tokenizer and base from scratch, or return the pre-trained model that the experiment starts from."""
    experiment = context.experiment
    size, settings = experiment.model.from_scratch, experiment.pretraining
    if size is None or settings is None:
        return _named_base(context)
    corpora: dict[str, StageOutput | Path] = {f"source-{name}": data[name].output for name in settings.corpus_sources}
    if world is not None:
        corpora["world"] = world.output
    if built is not None:
        corpora["built"] = built.path / "corpus.jsonl"  # without the benchmarks in the same folder
    launcher = ProcessLauncher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.training.corpus import read_corpus
        from qadapter.training.pretraining import pretrain

        folders = [data[name].path for name in settings.corpus_sources]
        folders += [stage.path for stage in (world, built) if stage is not None]
        with _base_threads(experiment):
            launcher(
                pretrain, read_corpus(folders), size, settings, seed=experiment.base_seed, out=out, scratch=scratch
            )

    result = run_stage(
        context,
        "pretrain",
        module="qadapter.training.pretraining",
        config={"size": size.model_dump(), **keyed(settings), "seed": experiment.base_seed, **launcher.keyed()},
        inputs=corpora,
        compute=compute,
    )
    return task_result(Base(str(result.path / "model"), result.output, "pretrained"), result)


@contextmanager
def _base_threads(experiment: Experiment) -> Iterator[None]:
    """Let torch use `base_threads` within a block, if it runs in this process."""
    if experiment.base_threads is None or experiment.launch.engine != "in-process":
        yield
        return
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(experiment.base_threads)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _named_base(context: RunContext) -> Any:
    """An external model: a GGUF file is unpacked; a hub id's commit is looked up once and kept for the whole run."""
    model = context.experiment.model
    name = str(model.pretrained)
    if (file := gguf_file(name)) is not None:
        return _unpacked_base(context, file)
    if Path(name).is_dir():
        return Base(name, None, "pretrained")
    from tasks.stages.hub import commit_of  # transformers takes seconds to import

    commit = commit_of(name, model.revision)
    return Base(name, None, "pretrained", {"revision": commit} if commit else {})


def _unpacked_base(context: RunContext, file: Path) -> Any:
    """A GGUF file as an ordinary folder, so that every later stage loads it in seconds instead of minutes."""
    dtype = context.experiment.model.dtype

    def compute(out: Path, _: Path) -> None:
        from qadapter.policy.unpacking import unpack

        unpack(file, dtype, out)

    result = run_stage(
        context,
        "unpack",
        module="qadapter.policy.unpacking",
        config={"dtype": dtype},
        inputs={"file": file},
        compute=compute,
    )
    return task_result(Base(str(result.path / "model"), result.output, "pretrained"), result)


@task(task_run_name="helpful-sft")
def fine_tune_base(context: RunContext, base: Base, data: StageResult) -> Any:
    """Fine-tune the base on the chosen helpful replies."""
    context = base.within(context)
    experiment = context.experiment
    settings = experiment.helpful_sft
    assert settings is not None
    launcher = ProcessLauncher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.training.supervised import fine_tune_base as fine_tune

        with _base_threads(experiment):
            launcher(
                fine_tune,
                base.location,
                data.path / "train.jsonl",
                model=experiment.model,
                lora=experiment.lora,
                settings=settings,
                seed=experiment.base_seed,
                out=out,
                scratch=scratch,
            )

    result = run_stage(
        context,
        "helpful-sft",
        module="qadapter.training.supervised",
        config={
            **keyed(settings),
            "model": experiment.model.key(),
            "lora_shape": experiment.lora.model_dump() if settings.lora else None,
            "seed": experiment.base_seed,
            **base.config(),
            **launcher.keyed(),
        },
        inputs={**base.inputs(), "data": data.output},
        compute=compute,
    )
    return task_result(Base(str(result.path / "model"), result.output, "helpful"), result)


# One model at a time on an accelerator: `prefect concurrency-limit create accelerator 1` limits this tag.
@task(task_run_name="{need.name}-{domain}", tags=["accelerator"])
def prepare_need(
    context: RunContext,
    domain: str,
    need: Need,
    base: Base,
    data: StageResult,
    needs: Mapping[str, StageResult] | None = None,
) -> Any:
    """Make what a method needs in addition to the pairs: the base's answers to the training prompts, a reward model."""
    context = base.within(context)
    experiment = context.experiment
    file, made = data.path / "train.jsonl", needs or {}
    inputs, config = base.inputs(), {**need.settings.model_dump(), **base.config()}
    inputs |= {name: stage.output for name, stage in made.items()}
    if need.reads == "prompts":
        prompts = sorted({json.dumps(row["prompt"]) for row in read_json_lines(file)})
        config["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    else:
        inputs["data"] = data.output
    further: dict[str, Any] = {"needs": {name: stage.path for name, stage in made.items()}} if need.needs else {}
    if "lora" in need.takes:
        further["lora"] = experiment.lora
        config["lora_shape"] = experiment.lora.model_dump()
    if "training" in need.takes:
        further["training"] = experiment.training_of(domain)
        config["training"] = keyed(experiment.training_of(domain))
    if "heldout_file" in need.takes:
        further["heldout_file"] = data.path / "heldout.jsonl"
    if need.trains:
        launcher = ProcessLauncher(experiment.launch)
        config |= launcher.keyed()
    elif need.shared:
        launcher = ProcessLauncher.for_evaluation(experiment.launch, experiment.model)
    else:
        launcher = ProcessLauncher(LaunchSettings())

    def compute(out: Path, scratch: Path) -> None:
        arguments = {
            "model": experiment.model,
            "settings": need.settings,
            "batch_size": experiment.evaluation.adaptation.batch_size,
            "seed": experiment.base_seed,
            "out": out,
            **further,
        }
        launcher(need.make, base.location, file, **arguments, scratch=scratch)
        if made:
            _add_needs_cost(out, made)

    result = run_stage(
        context,
        need.name,
        label=domain,
        module=need.make.__module__,
        config={**config, "seed": experiment.base_seed, "model": experiment.model.key()},
        inputs=inputs,
        compute=compute,
    )
    return task_result(result, result)


# One model at a time on an accelerator: `prefect concurrency-limit create accelerator 1` limits this tag.
@task(task_run_name="train-{cell.domain}-{cell.method}-{cell.seed}", tags=["accelerator"])
def train_adapter(
    context: RunContext,
    cell: Cell,
    base: Base,
    data: StageResult,
    needs: Mapping[str, StageResult],
) -> Any:
    """Train one adapter with one method; its MLflow run later holds the evaluation."""
    context = base.within(context)
    experiment = context.experiment
    method, seed = method_named(cell.method), cast(int, cell.seed)
    choice, training = experiment.methods.of(method.name), experiment.training_of(cell.domain)
    inputs = {**base.inputs(), "data": data.output, **{name: made.output for name, made in needs.items()}}
    launcher = ProcessLauncher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.training.adapt import train_adapter as train

        launcher(
            train,
            method.train,
            choice,
            base.location,
            data.path / "train.jsonl",
            model=experiment.model,
            lora=experiment.lora,
            training=training,
            seed=seed,
            needs={name: made.path for name, made in needs.items()},
            out=out,
            scratch=scratch,
        )
        _add_needs_cost(out, needs)

    def log(run_id: str, output: StageOutput) -> None:
        log_pairs(context, run_id, experiment.domains[cell.domain].source, data.output, "train")
        log_adapter(context, run_id, cell, output, choice.model_dump(exclude_none=True))

    result = run_stage(
        context,
        "train",
        run_name=cell.name,
        tags=cell.tags(),
        module=method.module,
        config={
            "method": method.name,
            method.name: choice.model_dump(),
            "training": keyed(training),
            "lora": experiment.lora.model_dump(),
            "model": experiment.model.key(),
            "seed": seed,
            **base.config(),
            **launcher.keyed(),
        },
        params={"domain": cell.domain, "base": base.name},
        log=log,
        inputs=inputs,
        compute=compute,
    )
    return task_result(result, result)


def _add_needs_cost(out: Path, needs: Mapping[str, StageResult]) -> None:
    """Add to a stage's metrics what its needs cost, and their own needs; other methods may share them.

    `cost/needs_seconds`, `cost/needs_generated_tokens`, and for a training `cost/train_seconds_with_needs` and
    `cost/generated_tokens`. Every training has all four, so that methods can be compared.
    """
    file, made = out / "metrics.json", [stage.output for stage in needs.values()]
    metrics: dict[str, float] = read_json(file) if file.is_file() else {}
    seconds = sum(one.seconds + one.metrics().get("cost/needs_seconds", 0.0) for one in made)
    names = ("cost/generated_tokens", "cost/needs_generated_tokens")
    tokens = sum(one.metrics().get(name, 0.0) for one in made for name in names)
    metrics |= {"cost/needs_seconds": seconds, "cost/needs_generated_tokens": tokens}
    if "cost/train_seconds" in metrics:
        metrics["cost/train_seconds_with_needs"] = metrics["cost/train_seconds"] + seconds
        metrics.setdefault("cost/generated_tokens", 0.0)
    write_json(file, metrics)


def log_adapter(context: RunContext, run_id: str, cell: Cell, output: StageOutput, settings: Mapping[str, Any]) -> None:
    """Log an adapter as the run's model; its measurements are logged to it later.

    Args:
        context: the flow run's context.
        run_id: the adapter's run.
        cell: its domain, method and seed.
        output: its stage.
        settings: the method's.
    """
    params = {"domain": cell.domain, "method": cell.method, "seed": cell.seed, **settings}
    name = re.sub("[/:.%\"']", "-", cell.name)  # MLflow refuses these characters
    context.tracker.log_model(run_id, name, output.digest[:16], params)


def keyed(settings: Any) -> dict[str, Any]:
    """The settings that a result depends on: all but the intervals of logging and saving, and the trackers."""
    left_out = {"save_steps", "logging_steps", "report_to", "source", "corpus_sources"}
    kept: dict[str, Any] = settings.model_dump(exclude=left_out)
    return kept
