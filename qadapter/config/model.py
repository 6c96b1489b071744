"""The pre-trained model, and the shape of the adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Positive, Settings


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

    Attributes:
        quantization: precision of the frozen base while adapters train; `int8` and `nf4` need bitsandbytes.
        trust_remote_code: run code of the model's repository, with the user's rights. Off by default.
        thinking: turn the thoughts of a thinking model on or off; None: the chat template decides.
        thoughts: whether thoughts in replies are scored or removed, in training and in scoring.
        chat_template_kwargs: further variables for the chat template.
        device_map: `auto` spreads a base that does not fit on one device over all devices of one process, for
            evaluation, generation and trainings in this process; a launched training splits it by its `launch.config`.
    """

    from_scratch: FromScratch | None = None
    pretrained: str | None = None
    revision: str | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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
        return self

    def numerics(self) -> dict[str, Any]:
        """The precision settings that a result depends on, in addition to the weights."""
        return {"quantization": self.quantization, "dtype": self.dtype, "revision": self.revision}

    def rendering(self) -> dict[str, Any]:
        """The settings that change how the chat template renders conversations."""
        return self.model_dump(include={"thinking", "thoughts", "chat_template_kwargs"}, exclude_defaults=True)

    def key(self) -> dict[str, Any]:
        """The settings that a result depends on, in addition to the weights: `numerics` and `rendering`."""
        return {**self.numerics(), **self.rendering()}


class LoraSettings(Settings):
    """The adapter, the same for every method (paper: rank 8, alpha 16, dropout 0.05)."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
