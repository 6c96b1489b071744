"""The pre-trained model, and the shape of the adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from qadapter.config.base import Count, Settings
from qadapter.config.open_settings import LORA_TWINS, loading_fields, lora_fields, with_twins


class FromScratch(Settings):
    """A Llama-architecture model of this size, trained in the run together with its tokenizer."""

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
    """The pre-trained model: trained from scratch, or loaded from a folder or hub id.

    `attn_implementation` and `experts_implementation` of `from_pretrained` can be given too.

    Attributes:
        quantization: precision of the frozen base while adapters train; `int8` and `nf4` need bitsandbytes.
        trust_remote_code: run code of the model's repository, with the user's rights. Off by default.
        thinking: turn the thoughts of a thinking model on or off; None: the chat template decides.
        thoughts: whether thoughts in replies are scored or removed, in training and in scoring.
        chat_template_kwargs: further variables for the chat template.
        matmul_precision: of products of float32 matrices, as `torch.set_float32_matmul_precision` takes it. With
            `medium`, a CPU with bfloat16 instructions (avx512_bf16, AMX) and a GPU with tensor cores round the factors
            to fewer bits and keep sums and results in float32, which is up to twice as fast.
        device_map: `auto` spreads a base that does not fit on one device over all devices of one process, for
            evaluation, generation and trainings in this process; a launched training splits it by its `launch.config`.
    """

    model_config = ConfigDict(extra="allow")  # checked by `loading_fields`

    from_scratch: FromScratch | None = None
    pretrained: str | None = None
    revision: str | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    trust_remote_code: bool = False
    thinking: bool | None = None
    thoughts: Literal["score", "leave-out"] = "score"
    chat_template_kwargs: dict[str, Any] = {}
    device_map: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if (self.from_scratch is None) == (self.pretrained is None):
            raise ValueError("give exactly one of from_scratch (a size) and pretrained (a folder or hub id)")
        if self.from_scratch and self.quantization != "none":
            raise ValueError("quantization is for pretrained models; a model from scratch is trained in full precision")
        if self.from_scratch and self.matmul_precision != "highest":
            raise ValueError("matmul_precision is for pretrained models; a model from scratch is trained in float32")
        if self.__pydantic_extra__:
            scratch = self.from_scratch is not None
            found = loading_fields(self.loading(), type(self).model_fields, from_scratch=scratch)
            self.__pydantic_extra__.update(found)
        return self

    def loading(self) -> dict[str, Any]:
        """The further arguments of `from_pretrained`."""
        return dict(self.__pydantic_extra__ or {})

    def numerics(self) -> dict[str, Any]:
        """The precision settings that a result depends on, in addition to the weights."""
        return {"quantization": self.quantization, "dtype": self.dtype, "revision": self.revision}

    def rendering(self) -> dict[str, Any]:
        """The settings that change how the chat template renders conversations."""
        return self.model_dump(include={"thinking", "thoughts", "chat_template_kwargs"}, exclude_defaults=True)

    def key(self) -> dict[str, Any]:
        """The settings that a result depends on, in addition to the weights."""
        products = self.model_dump(include={"matmul_precision"}, exclude_defaults=True)
        return {**self.numerics(), **products, **self.rendering(), **self.loading()}


class LoraSettings(Settings):
    """The adapter, the same for every method (paper: rank 8, alpha 16, dropout 0.05).

    Every other field of PEFT's `LoraConfig` can be given under its own name: `use_rslora`, `use_dora`, `rank_pattern` …
    """

    model_config = ConfigDict(extra="allow")  # checked by `lora_fields`

    rank: Count = 8
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"

    @model_validator(mode="before")
    @classmethod
    def _twins(cls, data: Any) -> Any:
        return with_twins(data, LORA_TWINS)

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        if self.__pydantic_extra__:
            found = lora_fields(self.shape(), self.further(), type(self).model_fields)
            self.__pydantic_extra__.update(found)
        return self

    def further(self) -> dict[str, Any]:
        """The fields of `LoraConfig` beside the project's own settings."""
        return dict(self.__pydantic_extra__ or {})

    def shape(self) -> dict[str, Any]:
        """The project's own settings as arguments of `LoraConfig`; alpha may be a fraction."""
        modules = self.target_modules
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": modules if isinstance(modules, str) else list(modules),
        }

    def fields(self) -> dict[str, Any]:
        """All settings as arguments of `LoraConfig`."""
        return {**self.shape(), **self.further()}
