"""Settings of the evaluation: retention, adaptation, judges and generated benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Name, Settings, refuse_repeats
from qadapter.config.budget import Budget
from qadapter.config.curve import CurveSettings
from qadapter.files.folders import resolve_path


class RetentionSettings(Settings):
    """Retention: lm-eval tasks by name, looked up in `qadapter/evaluation/benchmarks` first, then in lm-eval.

    Attributes:
        own: benchmarks of the user's own, name → file of questions (docs/evaluation.md): multiple choice, short answer
            or regular expression, as JSON lines or CSV; `{data}` is the data folder. They count like `tasks`.
        limit: items per task, None for all; for a group or tag, of each task in it.
        limits: task → its own number of items, in place of `limit`.
        batch_size: sequences per forward pass, or `auto` for as many as fit (on a GPU).
        max_new_tokens: longest generated answer in tokens; None: each task's own limit.
        plain_tasks: members of `tasks` and `own` that are prompted without the chat template (the paper: MMLU).
        answers: number of held-out helpful prompts answered greedily, to count which of the base's own answers changed.
        reworded: items per task that are asked in other words too (`qadapter.evaluation.rewording`), to see how far the
            answers depend on the wording; 0 asks none.
        official_data: folder with the items of lm-eval's own tasks, instead of the hub; `{data}` is the data folder.
    """

    tasks: tuple[str, ...] = ()
    own: dict[Name, str] = {}
    plain_tasks: tuple[str, ...] = ()
    limit: Count | None = None
    limits: dict[str, Count] = {}
    batch_size: Count | Literal["auto"] = 64
    max_new_tokens: Count | None = None
    answers: Annotated[int, Field(ge=0)] = 16
    reworded: Annotated[int, Field(ge=0)] = 0
    official_data: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RetentionSettings:
        refuse_repeats("tasks", self.tasks)
        known = (*self.tasks, *self.own)
        if not known:
            raise ValueError("nothing to measure: name `tasks`, or benchmarks of your `own`, or both")
        if both := sorted(self.own.keys() & set(self.tasks)):
            raise ValueError(f"own.{both[0]} has the name of one of `tasks`; give it another")
        if unknown := set(self.plain_tasks) - set(known):
            raise ValueError(f"plain_tasks {sorted(unknown)} are not among tasks {list(known)}")
        if unknown := set(self.limits) - set(known):
            raise ValueError(f"limits {sorted(unknown)} are not among tasks {list(known)}")
        return self

    def items_of(self, task: str) -> int | None:
        """Items that a task asks at most; None: all of them."""
        return self.limits.get(task, self.limit)

    def own_files(self, data: Path | None) -> dict[str, Path]:
        """The files of the user's own benchmarks, in the order of the config.

        Raises:
            QAdapterError: a path contains `{data}`, but no data folder was given.
        """
        return {name: Path(resolve_path(path, data)).expanduser() for name, path in self.own.items()}


class AdaptationSettings(Settings):
    """Adaptation: how well the new preference was learnt, measured on held-out pairs.

    Attributes:
        batch_size: pairs per forward pass.
        max_new_tokens: tokens per answer generated for reading and, in the toy world, for its exact rules.
        generate: number of held-out prompts answered by generation.
        judge: the judge that compares an answer with the base's (`qadapter.judging.table`): `rule` (the toy world's
            own), `reward-model` (trained on the sources' `judge_pairs`), `endpoint`, `none`. None: the rule in a toy
            world, elsewhere a reward model where the domain's source has `judge_pairs`.
        criteria: domain → what an endpoint decides, as the end of "Decide …"; defaults exist for the paper's domains.

    The experiment's schema adds one section per judge that has settings: `reward_model` (its training; by default that
    of the adapters, `training`) and `endpoint` (the judge to call).
    """

    batch_size: Count = 32
    max_new_tokens: Count = 64
    generate: Annotated[int, Field(ge=0)] = 20
    judge: str | None = None
    criteria: dict[Name, str] = {}

    def measured(self) -> dict[str, Any]:
        """The settings that a measurement depends on, independent of the judge; part of a cache key."""
        return self.model_dump(include={"batch_size", "max_new_tokens", "generate"})


class BuiltBenchmarks(Settings):
    """Benchmarks generated from the data: for models too small for the public suites, and for preferences.

    Attributes:
        replies: benchmark name → source. For each held-out prompt, task `<name>_reply_matching` asks which of four
            replies belongs to it; task `<name>_bits_per_byte` scores the chosen replies as texts.
        questions: benchmark name → JSON lines file of `question` and `answer`. A quarter of it becomes benchmarks like
            those of `replies`; a model from scratch learns the rest.
        preferences: benchmark name → source. For each held-out pair, task `<name>_preference` asks which reply is
            better.
        max_items: largest number of items per benchmark.
        max_chars: longest prompt or reply used, in characters; longer ones may not fit the model's context.
    """

    replies: dict[Name, Name] = {}
    questions: dict[Name, str] = {}
    preferences: dict[Name, Name] = {}
    max_items: Count = 200
    max_chars: Count = 1_200

    @property
    def sources(self) -> dict[str, str]:
        """Key of this section → name of the source that it uses."""
        kinds = {"replies": self.replies, "preferences": self.preferences}
        return {f"{kind}.{name}": source for kind, named in kinds.items() for name, source in named.items()}


class EvaluationSettings(Settings):
    """Both halves of the paper's claim.

    Attributes:
        retention, adaptation: see there.
        curve: measure each adapter at several values of its dial too; null: only as trained. The dial of a method that
            guides the base's decoding is the weight of its guidance.
        budget: how much may be forgotten: the report then has each method's operating point under it, beside those at
            its fixed budgets. It needs `curve`.
    """

    retention: RetentionSettings
    adaptation: AdaptationSettings = AdaptationSettings()
    curve: CurveSettings | None = None
    budget: Budget | None = None

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        if self.budget is not None and self.curve is None:
            raise ValueError("budget needs points of the dial to choose from; add `curve: {points: 5}`")
        return self
