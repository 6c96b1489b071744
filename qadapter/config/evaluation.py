"""What is measured: retention, adaptation, judges, own benchmarks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Name, Settings, refuse_repeats


class RetentionSettings(Settings):
    """What must not be forgotten: lm-eval tasks, by name (`qadapter/evaluation/benchmarks` first, then lm-eval's own).

    Attributes:
        limit: items per task, None for all.
        batch_size: sequences per forward pass, or `auto` for the most that fit (on a GPU).
        max_new_tokens: longest generated answer; None: each task's own.
        plain_tasks: tasks among `tasks` that are asked without chat template (the paper: MMLU).
        answers: held-out helpful prompts answered greedily, to see which of the base's own answers changed; 0 for none.
        official_data: folder with the items of lm-eval's own tasks, in place of the hub; `{data}` is the data folder.
    """

    tasks: tuple[str, ...]
    plain_tasks: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count | Literal["auto"] = 64
    max_new_tokens: Count | None = None
    answers: Annotated[int, Field(ge=0)] = 16
    official_data: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RetentionSettings:
        refuse_repeats("tasks", self.tasks)
        if unknown := set(self.plain_tasks) - set(self.tasks):
            raise ValueError(f"plain_tasks {sorted(unknown)} are not among tasks {list(self.tasks)}")
        return self


class AdaptationSettings(Settings):
    """What was to be learnt, on held-out pairs.

    Attributes:
        batch_size: pairs per forward pass.
        max_new_tokens: length of the answers generated for reading and, in the toy world, for its exact rules.
        generate: held-out prompts answered by generation; 0 for none.
        judge: the judge that says whether an answer is better than the base's (`qadapter.judging.table`): `rule` (the
            toy world's own), `reward-model` (trained on the sources' `judge_pairs`), `endpoint`, `none`. None: the rule
            in a toy world, elsewhere a reward model where the domain's source has `judge_pairs`.
        criteria: domain → what an endpoint is to decide, as the end of "Decide …"; the paper's domains have theirs.

    The experiment's schema adds a section for each judge that has settings: `reward_model` (how it is trained; without
    it as the adapters, with `training`) and `endpoint` (the judge to call).
    """

    batch_size: Count = 32
    max_new_tokens: Count = 64
    generate: Annotated[int, Field(ge=0)] = 20
    judge: str | None = None
    criteria: dict[Name, str] = {}

    def measured(self) -> dict[str, Any]:
        """The settings that a measurement depends on, whichever judge compares the answers; for a cache key."""
        return self.model_dump(include={"batch_size", "max_new_tokens", "generate"})


class BuiltBenchmarks(Settings):
    """Benchmarks made from the data itself: for models too small for the public suites, and of preferences.

    Attributes:
        replies: benchmark name → source; its held-out prompts ask which of four replies belongs to them
            (task `<name>_reply_matching`), and the chosen replies are texts to predict (`<name>_bits_per_byte`).
        questions: benchmark name → JSON-lines file of `question` and `answer`; a quarter of it becomes benchmarks like
            those of `replies`, and the model from scratch learns the rest.
        preferences: benchmark name → source; its held-out pairs ask which of the two replies is the better one (task
            `<name>_preference`).
        max_items: longest benchmark.
        max_chars: longest prompt or reply used; a model cannot score what its context does not hold.
    """

    replies: dict[Name, Name] = {}
    questions: dict[Name, str] = {}
    preferences: dict[Name, Name] = {}
    max_items: Count = 200
    max_chars: Count = 1_200

    @property
    def sources(self) -> dict[str, str]:
        """Key of this section → the source it names."""
        kinds = {"replies": self.replies, "preferences": self.preferences}
        return {f"{kind}.{name}": source for kind, named in kinds.items() for name, source in named.items()}


class EvaluationSettings(Settings):
    """Both halves of the paper's claim."""

    retention: RetentionSettings
    adaptation: AdaptationSettings = AdaptationSettings()
