"""The pre-trained model, and the shape of the adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Positive, Settings


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


class LoraSettings(Settings):
    """The adapter, the same for every method (paper: rank 8, alpha 16, dropout 0.05)."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
