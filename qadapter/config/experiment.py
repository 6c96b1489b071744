"""An experiment: the schema of `configs/*.yaml`, its contradictions, and how a config is read.

Each config is complete. Unknown keys, wrong types and contradictions are refused together, before anything runs, each
with the key's path and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, create_model, model_validator

from qadapter.config.base import Count, Name, Seed, Settings
from qadapter.config.budget import Budget
from qadapter.config.evaluation import AdaptationSettings, BuiltBenchmarks, EvaluationSettings
from qadapter.config.execution import LaunchSettings, RunnerSettings
from qadapter.config.folder import CONFIGS
from qadapter.config.methods import Methods
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.reading import names_in, read_named
from qadapter.config.sources import Source, ToyWorldSettings
from qadapter.config.training import AdapterTraining, DomainSettings, HelpfulSettings, PretrainingSettings
from qadapter.errors import did_you_mean
from qadapter.judging import plan as judges
from qadapter.judging.table import JUDGES, NO_JUDGE, judge_names

PROFILE_FOLDER = CONFIGS
MEAN = "mean"
"""What reports and MLflow call the mean over all domains."""


def _known_judge(name: str | None) -> str | None:
    """Raise ValueError if a config names a judge that is not in the table."""
    if name is not None and name not in judge_names():
        raise ValueError(f"there is no such judge{did_you_mean(name, judge_names())}")
    return name


if TYPE_CHECKING:
    JudgedAdaptation = AdaptationSettings
else:
    JudgedAdaptation = create_model(
        "JudgedAdaptation",
        __base__=AdaptationSettings,
        __doc__=AdaptationSettings.__doc__,
        __module__=__name__,
        judge=(Annotated[str | None, AfterValidator(_known_judge)], None),
        **{kind.section: (kind.settings | None, None) for kind in JUDGES if kind.section},
    )


class JudgedEvaluation(EvaluationSettings):
    """Both halves of the paper's claim, with one section per judge of `qadapter.judging.table` that has settings."""

    adaptation: JudgedAdaptation = JudgedAdaptation()


class Experiment(Settings):
    """A whole experiment.

    Attributes:
        name: the profile's name: of the plan and the report, and the first part of the MLflow parent run's name
            (`smoke · lazy-fox`). The MLflow experiment has the name of the flow, `full-paper-repro`.
        seeds: one training per seed, domain and method; the base is trained once, with `base_seed`.
        parallel: how many stages run side by side (1: one after the other, in this process).
        threads: torch threads per stage; None: the machine's cores divided by `parallel`. A tiny model gains nothing
            from a second thread. The environment variable OMP_NUM_THREADS takes precedence.
        base_threads: torch threads of the base's trainings, which all other stages wait for; None: as every stage.
        system_metrics: log MLflow's system metrics (CPU, memory, disk, network, GPUs) to the run of each stage.
        launch: whether trainings run in this process or in several, through `accelerate launch`.
        run_domains: the domains that run; None: all. The others' sources need not be there.
        runner: where stages run side by side: in processes of this machine, or on a Dask or Ray cluster.
        trainer: further fields of `TrainingArguments` for the adapters' trainings: short for `training.trainer`.
        training: settings that all methods share: pairs per step, steps, length. A method on single conversations sees
            two sequences where a pairwise method sees one pair, so that the token budget is the same.
    """

    name: Name
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    base_seed: Seed = 0
    parallel: Count = 1
    threads: Count | None = None
    base_threads: Count | None = None
    system_metrics: bool = False
    launch: LaunchSettings = LaunchSettings()
    runner: RunnerSettings = RunnerSettings()
    toy_world: ToyWorldSettings | None = None
    sources: dict[Name, Source]
    model: ModelSettings
    built_benchmarks: BuiltBenchmarks | None = None
    pretraining: PretrainingSettings | None = None
    helpful_sft: HelpfulSettings | None = None
    lora: LoraSettings = LoraSettings()
    trainer: dict[str, Any] = Field({}, exclude=True)  # moved into `training` when a config is read
    training: AdapterTraining
    domains: dict[Name, DomainSettings] = Field(min_length=1)
    run_domains: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    methods: Methods
    evaluation: JudgedEvaluation

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, settings: Any) -> Any:
        """Leave out the domains that do not run, and the sources that only they use."""
        if not isinstance(settings, dict):
            return settings
        wanted, domains, sources = (settings.get(name) for name in ("run_domains", "domains", "sources"))
        if not (isinstance(wanted, list | tuple) and isinstance(domains, dict) and isinstance(sources, dict)):
            return settings
        if unknown := [name for name in wanted if name not in domains]:
            raise ValueError(f"run_domains: no domain {unknown[0]!r}{did_you_mean(str(unknown[0]), domains)}")
        idle = [domain for name, domain in domains.items() if name not in wanted]
        unused = {domain.get("source") for domain in idle if isinstance(domain, dict)} - {
            each for name, part in settings.items() if name != "sources" for each in _texts(part, leave_out=idle)
        }
        return {
            **settings,
            "domains": {name: domains[name] for name in wanted},
            "sources": {name: source for name, source in sources.items() if name not in unused},
        }

    @model_validator(mode="before")
    @classmethod
    def _move_trainer(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(training := data.get("training"), Mapping):
            shared, own = data.get("trainer"), training.get("trainer") or {}
            if isinstance(shared, Mapping) and shared and isinstance(own, Mapping):
                rest = {name: value for name, value in data.items() if name != "trainer"}
                return {**rest, "training": {**training, "trainer": {**shared, **own}}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))
        return self

    def _single_replies(self) -> Iterator[str]:
        """What cannot be made of sources that keep single replies."""
        from qadapter.methods.table import method_named

        others = [name for name in self.methods.run if not method_named(name).takes_single]
        takers = [name for name in self.methods.run if name not in others]
        trained = {domain.source for domain in self.domains.values()}
        for name, source in self.sources.items():
            if source.pairing is not None and name in trained and takers and self.training.eval_steps:
                yield (
                    f"training.eval_steps sets pairs aside, and {', '.join(takers)} trains on the single replies of "
                    f"sources.{name}: leave eval_steps out, or take {', '.join(takers)} out of methods.run"
                )
            if source.pairing != "none":
                continue
            if not (source.heldout_path or source.heldout_split):
                yield f"sources.{name}.pairing is none, so it has no pair to hold out: give heldout_path"
            if source.judge_pairs:
                yield f"sources.{name}.pairing is none, so it has no pair to train a judge on: remove judge_pairs"
            if source.max_train_pairs is not None:
                yield f"sources.{name}.pairing is none, so it has no pair to limit: remove max_train_pairs"
            if others and name in trained:
                yield (
                    f"sources.{name}.pairing is none, and {', '.join(others)} cannot train on single replies: set "
                    "it to all or first, or take these methods out of methods.run"
                )

    def _refused_by_methods(self) -> Iterator[str]:
        """Settings of the trainings that a method of this experiment cannot follow."""
        from qadapter.methods.table import method_named

        for name in self.methods.run:
            refuses = method_named(name).refuses
            for setting, key in self.training.asked().items():
                if setting in refuses:
                    yield (
                        f"training.{key}: {name} cannot follow it ({refuses[setting]}): leave it out, or take {name} "
                        "out of methods.run"
                    )
            if why := self.methods.of(name).misfit(self.training):
                yield f"methods.{name}.{why}"

    def unmeasured_of(self, budget: Budget) -> str:
        """Why a budget's limit on over-refusals cannot be kept here; empty where it can."""
        retention = self.evaluation.retention
        return budget.unmeasured(retention.tasks, retention.answers if self.helpful_sft else 0)

    def _contradictions(self) -> Iterator[str]:
        """Yield one sentence per contradiction between sections."""
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            yield f"seeds names {repeated} more than once"
        if MEAN in self.domains:
            yield f"domains.{MEAN}: the report and MLflow call the mean over all domains so; rename it"
        yield from self._single_replies()
        yield from self._refused_by_methods()
        named = {f"domains.{name}.source": domain.source for name, domain in self.domains.items()}
        if self.helpful_sft:
            named["helpful_sft.source"] = self.helpful_sft.source
        if self.pretraining:
            named |= {f"pretraining.corpus_sources.{i}": s for i, s in enumerate(self.pretraining.corpus_sources)}
        if self.built_benchmarks:
            named |= {f"built_benchmarks.{key}": source for key, source in self.built_benchmarks.sources.items()}
        unknown = {path: source for path, source in named.items() if source not in self.sources}
        for path, source in unknown.items():
            yield f"{path}: no source {source!r}{did_you_mean(source, self.sources)}"
        if not unknown and (unused := set(self.sources) - set(named.values())):
            yield f"sources {sorted(unused)} are used by no domain, no benchmark, helpful_sft or pretraining"
        if bool(self.model.from_scratch) != bool(self.pretraining):
            yield "model.from_scratch and pretraining go together: give both or neither"
        if self.pretraining and not (self.toy_world or self.pretraining.corpus_sources):
            yield "pretraining.corpus_sources: without a toy world, name the sources to learn from"
        if self.model.pretrained and self.helpful_sft and not self.helpful_sft.lora:
            yield "helpful_sft.lora: full fine-tuning is for models from scratch; set it to true"
        if not self.helpful_sft and (needy := [n for n, d in self.domains.items() if d.base == "helpful"]):
            yield f"domains {needy} use the base 'helpful', but there is no helpful_sft section"
        if self.training.max_steps and (idle := [name for name, d in self.domains.items() if d.epochs]):
            yield f"domains.{idle[0]}.epochs has no effect with training.max_steps: give one of them"
        if (budget := self.evaluation.budget) is not None and (unmeasured := self.unmeasured_of(budget)):
            yield f"evaluation.budget: {unmeasured}"
        known = [name for name, domain in self.domains.items() if domain.source in self.sources]
        yield from judges.contradictions(self, known)
        trainings = {"pretraining": self.pretraining, "helpful_sft": self.helpful_sft, "training": self.training}
        yield from self.launch.contradictions(trainings)
        if self.model.from_scratch:
            for section in ("pretraining", "helpful_sft", "training"):
                settings = getattr(self, section)
                if settings and settings.max_length > self.model.from_scratch.context:
                    yield (
                        f"{section}.max_length {settings.max_length} is longer than the model's context "
                        f"{self.model.from_scratch.context}"
                    )

    def judge_of(self, domain: str) -> str:
        """The name of the judge for a domain's answers (`AdaptationSettings.judge`)."""
        kind = judges.judge_of(self, domain)
        return kind.name if kind else NO_JUDGE

    def training_of(self, domain: str) -> AdapterTraining:
        """The training settings of a domain's adapters."""
        epochs = self.domains[domain].epochs
        return self.training if epochs is None else self.training.model_copy(update={"epochs": epochs})

    @property
    def threads_per_stage(self) -> int:
        """torch threads per stage."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.parallel)

    @property
    def needs_data(self) -> bool:
        """Whether a path contains `{data}` and no toy world provides it."""
        return self.toy_world is None and "{data}" in self.model_dump_json()


def _texts(part: Any, leave_out: Sequence[Any]) -> Iterator[str]:
    """All values of a part of a config that are texts, but for those in some of its sections."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for each in part.values() if isinstance(part, Mapping) else part:
            if not any(each is section for section in leave_out):
                yield from _texts(each, leave_out)


def profiles() -> list[str]:
    """Names of the profiles in `configs/`."""
    return names_in(PROFILE_FOLDER)


def load_experiment(profile: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Experiment:
    """Read a profile, apply overrides, validate.

    Args:
        profile: a profile's name (`smoke`) or a YAML file.
        overrides: `{"training.max_steps": 5}` or `["training.max_steps=5"]`; values of strings are read as YAML.

    Raises:
        QAdapterError: unknown profile or key, wrong type, or contradiction. The message lists every problem with its
            path.
    """
    return read_named(Experiment, "profile", profile, PROFILE_FOLDER, overrides)
