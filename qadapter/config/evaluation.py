"""What is measured: retention, adaptation, judges, own benchmarks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Name, NonNegative, Positive, Settings, refuse_repeats
from qadapter.config.training import OptimizerSettings


class RetentionSettings(Settings):
    """What must not be forgotten: lm-eval tasks, by name (`configs/lm_eval` first, then lm-eval's own).

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


class JudgeSettings(Settings):
    """Which judge behind an OpenAI-compatible endpoint, and how much it may cost.

    Attributes:
        url: the endpoint's base, such as `https://api.openai.com/v1`; `/chat/completions` is added.
        model: the judge's name there.
        api_key_variable: environment variable that holds the key; None for a server that wants none. The key itself
            stands in no config.
        input_price, output_price: of a million tokens; needed for an estimate and for a budget.
        budget: most that may be spent, in the prices' currency; None for no limit. An experiment's budget is for all
            its rows together, each has an equal part.
        max_output_tokens: longest answer of the judge.
        timeout: seconds for one attempt.
        retries: further attempts after one that failed for a reason that may pass.
        backoff: seconds before the first of them; each further wait is twice as long.
        parallel: calls at a time.
        extra: further fields of the request body; null removes one (some models refuse `temperature`).
    """

    url: str
    model: str
    api_key_variable: str | None = "OPENAI_API_KEY"
    input_price: NonNegative | None = None
    output_price: NonNegative | None = None
    budget: NonNegative | None = None
    max_output_tokens: Count = 64
    timeout: Positive = 60.0
    retries: Annotated[int, Field(ge=0)] = 4
    backoff: NonNegative = 1.0
    parallel: Count = 4
    extra: dict[str, Any] = {}


Judge = Literal["rule", "reward-model", "endpoint", "none"]


class AdaptationSettings(Settings):
    """What was to be learnt, on held-out pairs.

    Attributes:
        batch_size: pairs per forward pass.
        max_new_tokens: length of the answers generated for reading and, in the toy world, for its exact rules.
        generate: held-out prompts answered by generation; 0 for none.
        judge: who says whether an answer is better than the base's: `rule` (the toy world's own), `reward-model`
            (trained on the sources' `judge_pairs`), `endpoint`, `none`. None: the rule in a toy world, elsewhere a
            reward model where the domain's source has `judge_pairs`.
        reward_model: how the reward model is trained; None: as the adapters, with `training`.
        endpoint: the judge to call, for `endpoint`.
        criteria: domain → what `endpoint` is to decide, as the end of "Decide …"; the paper's domains have theirs.
    """

    batch_size: Count = 32
    max_new_tokens: Count = 64
    generate: Annotated[int, Field(ge=0)] = 20
    judge: Judge | None = None
    reward_model: OptimizerSettings | None = None
    endpoint: JudgeSettings | None = None
    criteria: dict[Name, str] = {}


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
