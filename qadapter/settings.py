"""The sections of an experiment's config, one class a section. `qadapter/experiment.py` puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qadapter.url_secrets import refuse_secrets

Method = Literal["q-adapter", "sft", "dpo", "replay"]
METHODS: tuple[Method, ...] = ("q-adapter", "sft", "dpo", "replay")

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]


class Settings(BaseModel):
    """A section of a config: unknown keys are refused, and nothing changes it after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)


class ToyWorldSettings(Settings):
    """A toy world to generate (`qadapter/preferences/toyworld.py`); `{data}` in paths is then its folder."""

    seed: int = 0
    corpus_size: Count = Field(20_000, description="pre-training conversations")
    harmful_for_training: Count = Field(
        80, lt=128, description="harmful requests, of 128, in the preference data; the rest are held out"
    )


class Source(Settings):
    """Where preference records come from.

    Attributes:
        path: file, folder, URL (http, https or any fsspec scheme) or `hub:owner/name`. `{data}` is the data folder;
            in a URL, `${NAME}` is an environment variable, the place for a password or key.
        heldout_path: an own source of held-out pairs; without it `heldout` splits `path` by prompt.
        domain: for DSP records, the style that is preferred.
        split, revision, config_name: for a data set of the hub.
        heldout: share (below 1) or number of prompts kept out of training.
        max_train_pairs, max_heldout_pairs: cut after the split, None for all.
        max_chars: longer records (prompt and reply together) are quarantined.
        judge_pairs: kept from training (whole prompts), so that a reward model can be trained on them to judge answers.
        expected_pairs: how many training pairs a source out of reach is known to have; only `make plan` reads it.
    """

    path: str
    heldout_path: str | None = None
    domain: str | None = None
    split: str | None = None
    heldout_split: str | None = None
    revision: str | None = None
    config_name: str | None = None
    heldout: Annotated[float, Field(gt=0)] = 0.1
    max_train_pairs: Count | None = None
    max_heldout_pairs: Count | None = None
    max_chars: Count = 20_000
    judge_pairs: Annotated[int, Field(ge=0)] = 0
    expected_pairs: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        if self.heldout >= 1 and self.heldout != int(self.heldout):
            raise ValueError(f"heldout is a share below 1 or a whole number of prompts, not {self.heldout}")
        for path in (self.path, self.heldout_path):
            refuse_secrets(path or "")
        return self


class FromScratch(Settings):
    """A Llama-architecture model of this size, trained in the run, tokenizer included."""

    tokenizer: Literal["words", "byte-bpe"] = "byte-bpe"
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    context: Count = Field(description="longest sequence in tokens")

    @model_validator(mode="after")
    def _check(self) -> FromScratch:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class ModelSettings(Settings):
    """The pre-trained model: one from scratch, or a folder or hub id.

    Attributes:
        quantization: how the frozen base is held while adapters train; `int8` and `nf4` need bitsandbytes.
        trust_remote_code: off unless the user turns it on; code from a model repository runs with the user's rights.
    """

    from_scratch: FromScratch | None = None
    pretrained: str | None = None
    revision: str | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if (self.from_scratch is None) == (self.pretrained is None):
            raise ValueError("give exactly one of from_scratch (a size) and pretrained (a folder or hub id)")
        if self.from_scratch and self.quantization != "none":
            raise ValueError("quantization is for pretrained models; a model from scratch is trained in full precision")
        return self

    def numerics(self) -> dict[str, Any]:
        """How the weights are held: what a result depends on besides the weights themselves."""
        return {"quantization": self.quantization, "dtype": self.dtype, "revision": self.revision}


class OptimizerSettings(Settings):
    """How long and how fast one training runs.

    Attributes:
        max_steps: optimiser steps; None: `epochs` decides.
        epochs: passes over the data, used where `max_steps` is None.
        batch_size: examples (conversations; for adapters: preference pairs) per optimiser step.
        micro_batch_size: examples per forward pass; gradients are accumulated up to `batch_size`. None: `batch_size`.
        max_length: tokens; a longer prompt is cut from the left.
        save_steps: a checkpoint every so many steps, from which a killed training goes on; None: none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        bf16: mixed precision.
    """

    learning_rate: Positive
    max_steps: Count | None = None
    epochs: Positive = 1.0
    batch_size: Count
    micro_batch_size: Count | None = None
    max_length: Annotated[int, Field(ge=2)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: NonNegative = 0.0
    save_steps: Count | None = None
    logging_steps: Count = 10
    gradient_checkpointing: bool = False
    bf16: bool = False

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Examples per forward pass."""
        return self.micro_batch_size or self.batch_size


class PretrainingSettings(OptimizerSettings):
    """Pre-training from scratch.

    Attributes:
        corpus_sources: preference sources whose training pairs become conversations, both replies of a pair. A toy
            world brings a corpus of its own; the learnt part of `built_benchmarks.questions` is added too.
    """

    corpus_sources: tuple[Name, ...] = ()


class HelpfulSettings(OptimizerSettings):
    """The SFT base: the pre-trained model fine-tuned on the chosen replies of one source.

    Attributes:
        source: name under `sources`.
        lora: for a pretrained model, train a LoRA and merge it; without it all weights move (models from scratch).
    """

    source: Name
    lora: bool = False


class LoraSettings(Settings):
    """The adapter, the same for every method (paper: rank 8, alpha 16, dropout 0.05)."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


class DomainSettings(Settings):
    """One customisation: this source's preferences, put onto this base.

    Attributes:
        source: name under `sources`.
        base: `pretrained`, or `helpful` for the SFT base.
        epochs: passes over this domain's data, where they differ from `training.epochs`.
    """

    source: Name
    base: Literal["pretrained", "helpful"] = "pretrained"
    epochs: Positive | None = None


class QAdapterSettings(Settings):
    """The method's own knobs (`qadapter/objective.py`), None for the preset's value; `paper` is the paper's table."""

    preset: Literal["paper", "published-code", "residual"] = "paper"
    alpha_tilde: Positive | None = None
    alpha_0: NonNegative | None = None
    beta: NonNegative | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    preference_scale: Positive | None = None
    shift_mask: bool | None = None
    learning_rate: Positive | None = None


class SFTSettings(Settings):
    """SFT on the chosen replies."""

    learning_rate: Positive | None = None


class DPOSettings(Settings):
    """DPO with the base as reference."""

    beta: Positive = 0.1
    learning_rate: Positive | None = None


class ReplaySettings(Settings):
    """SFT on the chosen replies and on the base's own answers to the same prompts, one to one."""

    learning_rate: Positive | None = None
    max_new_tokens: Count
    temperature: NonNegative = 0.0


class MethodSettings(Settings):
    """Every method's own settings; `run` says which of them run."""

    run: tuple[Method, ...] = METHODS
    q_adapter: QAdapterSettings = Field(QAdapterSettings(), alias="q-adapter")
    sft: SFTSettings = SFTSettings()
    dpo: DPOSettings = DPOSettings()
    replay: ReplaySettings

    @model_validator(mode="after")
    def _check(self) -> MethodSettings:
        refuse_repeats("run", self.run)
        return self

    def of(self, method: Method) -> QAdapterSettings | SFTSettings | DPOSettings | ReplaySettings:
        """The settings of one method."""
        sections: dict[Method, QAdapterSettings | SFTSettings | DPOSettings | ReplaySettings] = {
            "q-adapter": self.q_adapter,
            "sft": self.sft,
            "dpo": self.dpo,
            "replay": self.replay,
        }
        return sections[method]


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


def refuse_repeats(key: str, values: Sequence[Any]) -> None:
    """Raise ValueError if a value stands in a list twice."""
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{key} names {repeated} more than once")
