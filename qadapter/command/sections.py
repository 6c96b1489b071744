"""Options that subcommands share: each class is a section of the help, under the first sentence of its docstring.

A field is a flag and a key of the config file: `batch_size` is `--batch-size` and `batch_size: 8`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from qadapter.command.values import (
    Assigned,
    Mapped,
    Modules,
    Numbers,
    Place,
    Places,
    Strings,
    json_value,
    repeated,
)
from qadapter.config.base import (
    Alpha0,
    AlphaTilde,
    Count,
    Epochs,
    NonNegative,
    Positive,
    Seed,
    Settings,
    Temperature,
)
from qadapter.config.dial import DialValue
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.open_settings import loading_fields, located, trainer_fields
from qadapter.config.sources import ReadingSettings
from qadapter.config.trackers import Tracker
from qadapter.config.training import AdapterTraining

RENDERING = ("thinking", "thoughts", "chat_template_kwargs")
Thoughts = Literal["score", "leave-out"]
DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
AllowBaseMismatch = Annotated[bool, Field(description="use a base that is another one than the adapter was trained on")]


def _is_none(value: object) -> bool:
    return value is None


class ReadingOptions(ReadingSettings):
    """How preference data are read; docs/data.md has the layouts."""

    fields: Mapped = Field(
        None, description="where prompt and replies lie: '{prompt: question, chosen: a, rejected: b}', or a YAML file"
    )
    pairing: Literal["all", "first"] | None = Field(  # the command trains on pairs
        None, description="pair single labelled replies by their prompt"
    )
    domain: str | None = Field(None, description="the preferred style of DSP data")
    split: str | None = Field(None, description="of a folder or hub data set")
    data_revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    data_config: str | None = Field(None, description="which of the configs that a data set's card lists")
    max_chars: Count = Field(20_000, description="longer pairs (prompt and longer reply) are quarantined")

    def located(self, place: str, split: str | None) -> list[Path]:
        """The local files behind a place, fetched if need be."""
        from qadapter.preferences.sources import locate

        cache = Path("~/.cache/qadapter").expanduser()
        return locate(place, cache_dir=cache, split=split, revision=self.data_revision, config_name=self.data_config)


class DataOptions(ReadingOptions):
    """Preference data, in any of the formats of docs/data.md."""

    data: Place = Field(description="file, folder, URL or hub:owner/name; the format is detected")


class SplitOptions(DataOptions):
    """What is held out."""

    heldout: NonNegative | None = Field(
        None,
        description="share (below 1) or number of prompts to hold out; 0: none (default: a tenth, of few prompts up to "
        "a third)",
    )
    heldout_data: Place | None = Field(None, description="data to hold out whole, in place of --heldout")
    heldout_split: str | None = Field(None, description="of --heldout-data, or of --data")
    max_train_pairs: Count | None = Field(None, description="keep at most so many pairs")
    max_heldout_pairs: Count | None = Field(None, description="keep at most so many held-out pairs")


class BaseOptions(Settings):
    """The base model."""

    trust_remote_code: bool = Field(False, description="run code that comes with the base, with your rights")
    thinking: bool | None = Field(None, description="of a thinking model (default: as trained, else its own)")
    thoughts: Thoughts | None = Field(None, description="of replies (default: as trained, else score)")
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_value)] = Field(
        {}, description="further variables of the chat template, as JSON"
    )
    model: Assigned = Field(
        {},
        exclude_if=lambda fields: not fields,
        description="further arguments of from_pretrained: attn_implementation=eager",
    )

    @model_validator(mode="after")
    def _loadable(self) -> BaseOptions:
        if self.model:
            with located("model"):
                loading_fields(self.model, ModelSettings.model_fields, from_scratch=False)
        return self


class ObjectiveOptions(Settings):
    """The objective (docs/method.md); what is not given is the preset's."""

    preset: Literal["paper", "published-code", "residual"] = Field(
        "residual", description="where the values start from"
    )
    alpha_tilde: AlphaTilde | None = Field(None, description="α̃, temperature of the customised policy")
    alpha_0: Alpha0 | None = Field(None, description="α0, how much of the base is kept")
    beta: NonNegative | None = Field(None, description="β, weight of the squared rewards")
    gamma: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="γ, discount")
    preference_scale: Positive | None = Field(None, description="w, scale of the Bradley-Terry model")
    shift_mask: bool | None = Field(None, description="score the positions that predict response tokens")

    def objective(self) -> dict[str, Any]:
        """What is given, as arguments of `QAdapterConfig`."""
        return {"objective": self.preset, **self.model_dump(include=set(ObjectiveOptions.model_fields) - {"preset"})}


class AdapterOptions(Settings):
    """The adapter."""

    lora_rank: Count = Field(8, description="rank of LoRA")
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(16, description="alpha of LoRA")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="dropout in LoRA")
    target_modules: Modules = Field("all-linear", description="all-linear, or names: q_proj,v_proj")
    lora: Assigned = Field(
        {},
        exclude_if=lambda fields: not fields,
        description="further fields of peft's LoraConfig: use_rslora=true, or a mapping in YAML",
    )

    def lora_settings(self) -> LoraSettings:
        """The adapter's shape."""
        return LoraSettings(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.target_modules,
            **self.lora,
        )


class TrainingOptions(AdapterTraining):
    """How long and how fast."""

    learning_rate: Positive = Field(3e-4, description="the highest one of the schedule")
    epochs: Epochs | None = Field(  # type: ignore[assignment]  # a number as soon as the data are read
        None, description="passes over the data, unless --max-steps is given (default: 1, for few pairs up to 10)"
    )
    max_steps: Count | None = Field(None, description="optimiser steps")
    batch_size: Count = Field(16, description="pairs per optimiser step")
    micro_batch_size: Count | None = Field(None, description="pairs per forward pass, a divisor of --batch-size")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens; longer prompts are cut from the left")
    allow_truncation: bool = Field(False, description="train although --max-length cuts most replies")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="of the learning rate"
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's")
    bf16: bool = Field(False, description="mixed precision")
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    trainer: Annotated[Assigned, AfterValidator(trainer_fields)] = Field(
        {},
        exclude_if=lambda fields: not fields,
        description="further fields of transformers' TrainingArguments: optim=adafactor,max_grad_norm=0.5, or a "
        "mapping in YAML",
    )
    logging_steps: Count = Field(10, description="a line of numbers every so many steps")
    save_steps: Count | None = Field(100, description="a checkpoint every so many steps")
    eval_steps: Count | None = Field(
        None, exclude_if=_is_none, description="evaluate every so many steps, on training pairs that are set aside"
    )
    eval_pairs: Count | None = Field(
        None, exclude_if=_is_none, description="training pairs to set aside for it, whole prompts (default: 32)"
    )
    best_by: Annotated[str, Field(min_length=1)] | None = Field(
        None, exclude_if=_is_none, description="keep the checkpoint that is best by this: loss, rewards/accuracies"
    )
    early_stopping: Count | None = Field(
        None, exclude_if=_is_none, description="stop after so many evaluations without a better one"
    )
    seed: Seed = Field(0, description="of split, weights, order and dropout")
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(repeated)] = Field(
        (), description="tensorboard, wandb or trackio, which get the curves too; can be given several times"
    )

    @model_validator(mode="before")
    @classmethod
    def _saves_when_it_evaluates(cls, data: Any) -> Any:
        if data.get("eval_steps") and (data.get("best_by") or data.get("early_stopping")):
            return {"save_steps": data["eval_steps"], **data}
        return data


class AnswerOptions(Settings):
    """What is looked at beside the pairs."""

    answers: Annotated[int, Field(ge=0)] = Field(
        8, description="prompts that the policy answers, to see whether it answers in language; 0: none"
    )


class RetainOptions(Settings):
    """What is to be kept."""

    retain: Places = Field(
        (), description="file of your own questions (docs/evaluation.md), asked before and after; may be repeated"
    )


class PolicyOptions(BaseOptions):
    """Which policy."""

    adapter: Strings = Field(
        min_length=1, description="folder of a trained adapter; give it several times to compose several"
    )
    dial: DialValue | None = Field(
        None,
        description="how far from the base (0) to what was trained (1), or beyond: scale=0.5 or q-weight=0.75, for any "
        "adapter (default: as saved with the adapter, else 1)",
    )
    weights: Numbers | None = Field(None, description="of each adapter in Q: 0.5,0.5 (default: equal, sum 1)")
    alpha_0: Alpha0 | None = Field(None, description="α0, how much of the base (default: as trained)")
    alpha_tilde: AlphaTilde | None = Field(None, description="α̃, temperature of the policy (default: as trained)")
    base: Place | None = Field(None, description="folder or hub id of the base (default: what the adapter names)")
    dtype: DType | None = Field(None, description="of the base's weights (default: as trained)")
    quantization: Quantization | None = Field(None, description="of the base (default: as trained)")
    revision: str | None = Field(None, description="of a base from the hub (default: as trained)")
    allow_base_mismatch: AllowBaseMismatch = False


class DecodingOptions(Settings):
    """How replies are written."""

    max_new_tokens: Count = Field(256, description="longest reply")
    temperature: Temperature = Field(0.0, description="0: the most likely token at each step; above 0: sampling")
    seed: Seed = Field(0, description="of sampling")


class FileOptions(Settings):
    """Where the result goes."""

    output: str | None = Field(None, description="JSON-lines file")
    overwrite: bool = Field(False, description="replace the file if it is there")


class AddressOptions(Settings):
    """Where to listen."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; on loopback only this machine's own names are answered to, and those in "
        "QADAPTER_ALLOWED_HOSTS=name,other",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0 takes a free one")
    cors_origin: Strings = Field(
        (), description="a page that may ask from a browser, as http://localhost:3000; can be given several times"
    )
