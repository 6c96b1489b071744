"""What each subcommand takes, one class a subcommand, made of the sections that it shares with others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from qadapter.command.sections import (
    RENDERING,
    AdapterOptions,
    AddressOptions,
    AllowBaseMismatch,
    AnswerOptions,
    BaseOptions,
    DataOptions,
    DecodingOptions,
    DType,
    FileOptions,
    ObjectiveOptions,
    PolicyOptions,
    Quantization,
    ReadingOptions,
    RetainOptions,
    SplitOptions,
    TrainingOptions,
)
from qadapter.command.values import (
    Numbers,
    Place,
    ServedAdapter,
    Strings,
    assigned,
    exactly_one,
    from_here,
    listed,
    repeated,
)
from qadapter.config.base import Count
from qadapter.config.budget import Share
from qadapter.config.model import ModelSettings
from qadapter.config.open_settings import TRAINER_TWINS, located, with_twins
from qadapter.policy.dial import DialKind

_OF_THE_MODEL = ("dtype", "quantization", "revision", "trust_remote_code", *RENDERING)
_LORA_FLAGS = {"r": "lora_rank", "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_LORA_FLAGS |= {name: name for name in ("lora_alpha", "lora_dropout", "target_modules")}


class ShowDataOptions(ReadingOptions):
    """Look at preference data."""

    file: Place = Field(description="file, folder, URL or hub:owner/name")


class TrainOptions(
    SplitOptions, AnswerOptions, RetainOptions, BaseOptions, ObjectiveOptions, AdapterOptions, TrainingOptions
):
    """Train a Q-Adapter."""

    base: Place = Field(description="folder or hub id of a causal language model")
    output: Annotated[str, AfterValidator(from_here)] = Field(
        description="folder for the adapter, its metrics and the prepared data"
    )
    dtype: DType = Field("float32", description="of the base's weights")
    quantization: Quantization = Field("none", description="of the base; int8 and nf4 need bitsandbytes")
    revision: str | None = Field(None, description="of a base from the hub")
    resume: bool = Field(False, description="continue from the last checkpoint in --output, if there is one")
    overwrite: bool = Field(False, description="train anew: delete the training that lies in --output")

    @model_validator(mode="before")
    @classmethod
    def _twins(cls, data: Any) -> Any:
        data = {**data, **{name: assigned(data[name]) for name in ("trainer", "lora", "model") if data.get(name)}}
        data = with_twins(data, TRAINER_TWINS, within="trainer")
        data = with_twins(data, _LORA_FLAGS, within="lora")
        return with_twins(data, {name: name for name in _OF_THE_MODEL}, within="model")

    @model_validator(mode="after")
    def _held_out_once(self) -> TrainOptions:
        if self.heldout is not None and (self.heldout_data or self.heldout_split):
            other = "heldout_data" if self.heldout_data else "heldout_split"
            raise ValueError(f"heldout has no effect with {other}, which is held out whole: give one of them")
        return self

    @model_validator(mode="after")
    def _adaptable(self) -> TrainOptions:
        if self.lora:
            with located("lora"):
                self.lora_settings()
        return self

    def model_settings(self) -> ModelSettings:
        """How to load the base."""
        given = self.model_dump(include=set(_OF_THE_MODEL), exclude_none=True)
        return ModelSettings(pretrained=self.base, **given, **self.model)


class GenerateOptions(PolicyOptions, DecodingOptions, FileOptions):
    """Answer prompts."""

    prompt: Strings = Field((), description="a prompt; may be given several times")
    prompts: str | None = Field(
        None, description=".txt with one prompt per line, or JSON lines with `prompt` (text or messages) or `messages`"
    )
    batch_size: Count = Field(16, description="prompts at once")
    compare_base: bool = Field(False, description="also let the base answer")


class ScoreOptions(PolicyOptions, DataOptions, AnswerOptions, FileOptions):
    """Score preference pairs."""

    batch_size: Count = Field(8, description="pairs per forward pass")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens; longer prompts are cut from the left (default: as trained, else 512)"
    )
    limit: Count | None = Field(None, description="score only the first so many pairs")


class ChatOptions(PolicyOptions, DecodingOptions):
    """Talk to a policy."""

    system: str | None = Field(None, description="a system message to begin with")
    show_base: bool = Field(False, description="also show what the base says, as /base does")


class ExportOptions(PolicyOptions, ReadingOptions):
    """Export a policy."""

    adapter: Strings = Field(
        min_length=1,
        description="folder of a trained adapter; several are composed by --weights",
        json_schema_extra={"positional": "ADAPTER"},
    )
    output: str = Field(description="folder to write")
    overwrite: bool = Field(False, description="replace the folder if it is there")
    format: Literal["merged", "lora", "gguf", "adapter"] = Field(
        "merged",
        description="merged: an ordinary checkpoint; lora: a LoRA folder with the scale folded in; gguf: a file for "
        "llama.cpp, by its own converter; adapter: the adapter with its dial",
    )
    approximate: bool = Field(
        False, description="where no weights are the policy itself, export the scale whose KL to it is smallest"
    )
    data: Place | None = Field(
        None, description="pairs for that KL (default: those that were held out of the training)"
    )
    limit: Count = Field(64, description="pairs for that KL")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens of a pair (default: as trained, else 512)"
    )
    push_to_hub: str | None = Field(
        None, description="also send the folder to this repository, owner/name; the token is HF_TOKEN's"
    )
    public: bool = Field(False, description="make a new repository public")

    @model_validator(mode="after")
    def _of_use(self) -> ExportOptions:
        if self.approximate and self.format == "adapter":
            raise ValueError("approximate has no effect on the format adapter, which is the policy: leave it out")
        idle = [name for name in ("data", "limit", "max_length") if name in self.model_fields_set]
        if idle and not self.approximate:
            raise ValueError(f"{idle[0]} has no effect without approximate: nothing else is measured on pairs")
        if self.public and not self.push_to_hub:
            raise ValueError("public has no effect without push_to_hub: name the repository to send to")
        return self


class DialOptions(RetainOptions, BaseOptions, ReadingOptions):
    """Choose an adapter's dial under a forgetting budget."""

    adapter: Annotated[Strings, AfterValidator(exactly_one)] = Field(
        description="folder of a trained adapter, of any method", json_schema_extra={"positional": "ADAPTER"}
    )
    budget: Share = Field(0.01, description="largest drop of the benchmarks' mean below the base, a share")
    per_task: Share | None = Field(None, description="largest drop of a single benchmark")
    max_over_refusals: Share | None = Field(None, description="largest share of refused harmless requests (toy world)")
    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (), description="benchmarks that measure what is kept: names of lm-eval or of this project, a,b"
    )
    plain_tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (), description="of these, those that are asked without chat template"
    )
    benchmarks: Place | None = Field(None, description="folder with `benchmarks/` for this project's own tasks")
    official_data: Place | None = Field(None, description="folder with the items of lm-eval's tasks")
    data: Place | None = Field(None, description="pairs that measure what is learnt (default: those held out)")
    base: Place | None = Field(None, description="folder or hub id of the base (default: what the adapter names)")
    dtype: DType | None = Field(None, description="of the base's weights (default: as trained)")
    quantization: Quantization | None = Field(None, description="of the base (default: as trained)")
    revision: str | None = Field(None, description="of a base from the hub (default: as trained)")
    allow_base_mismatch: AllowBaseMismatch = False
    kinds: Annotated[tuple[DialKind, ...], BeforeValidator(listed), Field(min_length=1)] = Field(
        ("q-weight",), description="dials to measure and choose from: q-weight, scale, or q-weight,scale"
    )
    points: Annotated[int, Field(ge=2, le=33)] = Field(
        9, description="values of each dial that are chosen between 0 and 1, ends included"
    )
    values: Numbers = Field((), description="further values to measure, above 1 too, a,b")
    limit: Count | None = Field(None, description="items per benchmark")
    batch_size: Count = Field(16, description="sequences per forward pass")
    max_new_tokens: Count | None = Field(None, description="longest answer (default: each benchmark's own)")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens of a pair (default: as trained, else 512)"
    )
    save: bool = Field(False, description="set the adapter's dial to the value found, and write its model card anew")

    @model_validator(mode="after")
    def _something_to_keep(self) -> DialOptions:
        if not self.tasks and not self.retain:
            raise ValueError("no benchmark measures what is kept; give --tasks, or --retain with questions of your own")
        return self


class ServeOptions(AddressOptions):
    """Serve adapters."""

    adapter: Annotated[tuple[ServedAdapter, ...], BeforeValidator(repeated)] = Field(
        min_length=1,
        description="what a training wrote, as FOLDER or NAME=FOLDER with the model name to serve it under; "
        "can be given several times",
    )
    base: Place | None = Field(None, description="folder or hub id (default: what the first adapter names)")
    dtype: DType | None = Field(None, description="of the base's weights (default: as trained, else its own)")
    quantization: Quantization | None = Field(None, description="of the base (default: as trained)")
    revision: str | None = Field(None, description="of a base from the hub (default: as trained, else main)")
    allow_base_mismatch: AllowBaseMismatch = False

    @field_validator("adapter")
    @classmethod
    def _unique(cls, adapters: tuple[ServedAdapter, ...]) -> tuple[ServedAdapter, ...]:
        if len({name for name, _ in adapters}) < len(adapters):
            raise ValueError("two adapters have the same name; name them: NAME=FOLDER")
        return adapters
