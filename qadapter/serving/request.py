"""What a request to `/v1/chat/completions` may say: OpenAI's fields, and the dials."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from qadapter.config.base import Temperature
from qadapter.config.dial import DialValue
from qadapter.preferences.pair import Message

MOST_REPLIES = 16
"""Largest `n`."""

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Anything = Any  # a field that is taken and has no effect
Number = Annotated[int, Field(ge=1, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _Part(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn; its content is a text, or text parts. What an SDK's echo of an earlier answer holds beside is taken.

    Attributes:
        role: `developer` is `system` under OpenAI's newer name.
        content: null in an earlier turn is an empty text.
        name, annotations: of no effect.
        refusal: taken as the content of a turn without one.
        audio, function_call, tool_calls: null or empty only.
        reasoning_content: null or empty only; a thought is part of the content here.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None
    name: Annotated[str, Field(max_length=1000)] | None = None
    refusal: str | None = None
    annotations: list[Anything] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Anything], Field(max_length=0)] | None = None
    reasoning_content: Annotated[str, Field(max_length=0)] | None = None

    def plain(self) -> Message:
        """The turn as chat templates take it."""
        content = self.content if self.content is not None else self.refusal or ""
        whole = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": whole}


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """Body of `/v1/chat/completions`. A field that this server could not honour is refused, not ignored.

    Attributes:
        model: an adapter's name, or `base`.
        messages: the conversation; its last turn has a content.
        max_tokens: longest reply; also `max_completion_tokens`. Without it 1024 or what the context has room for.
        temperature: 0 is greedy. It multiplies α̃. Without it 1: the policy's own distribution; the base's
            generation config is not read.
        n: number of replies; reply i of a seeded request has seed + i.
        stop: texts that end a reply, special tokens among them.
        logprobs: also give the log-probability of each token under the policy with this request's dials, before
            `temperature` and `top_p`.
        top_logprobs: and those of the most likely tokens in each place.
        chat_template_kwargs: variables for the chat template, such as `enable_thinking`.
        user, safety_identifier, prompt_cache_key, metadata, parallel_tool_calls: taken, of no effect.
        presence_penalty, frequency_penalty, response_format, tools, tool_choice, functions, function_call, logit_bias,
            store, service_tier, modalities, top_k, min_p, repetition_penalty, best_of, echo, ignore_eos, min_tokens,
            stop_token_ids, skip_special_tokens, add_generation_prompt, continue_final_message: only the values that ask
            for nothing.
        dial: how far from the base (0) to what was trained (1) or beyond, for any adapter or mix: `scale=0.5` or
            `q-weight=0.75`; the adapter's own without it.
        alpha_0, alpha_tilde: α0 and α̃ of this request; the adapter's own without them.
        adapters: a weighted mix of adapters, {name: weight}, in place of `model`'s own.
        compare_base: answer as the base too: `n` further choices behind the customised ones.
    """

    model: Annotated[str, Field(max_length=1000)]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Number | None = None
    max_completion_tokens: Number | None = None
    temperature: Annotated[Temperature, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] = 1
    stop: Text | Annotated[list[Text], Field(max_length=16)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    response_format: _ResponseFormat | None = None
    tools: Annotated[list[Anything], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    functions: Annotated[list[Anything], Field(max_length=0)] = []
    function_call: Literal["none", "auto"] = "none"
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] = ["text"]
    top_k: Literal[-1, 0] = 0
    min_p: Annotated[float, Field(ge=0, le=0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] = 1.0
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    ignore_eos: Literal[False] = False
    min_tokens: Literal[0] = 0
    stop_token_ids: Annotated[list[Anything], Field(max_length=0)] = []
    skip_special_tokens: Literal[True] = True
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    dial: DialValue | None = None
    alpha_0: Annotated[float, Field(ge=0, le=1e9)] | None = None
    alpha_tilde: Annotated[float, Field(ge=1e-6, le=1e9)] | None = None
    adapters: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] | None = None
    compare_base: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        """Clients send null for what they leave out."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @field_validator("adapters")
    @classmethod
    def _some_adapter(cls, mix: dict[str, float] | None) -> dict[str, float] | None:
        if mix is not None and not any(mix.values()):
            raise ValueError("names no adapter with a weight; leave it out, or ask for the model 'base'")
        return mix

    @field_validator("messages")
    @classmethod
    def _something_asked(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages[-1].content is None:
            raise ValueError("the last message has no content")
        return messages

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return top

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_length(cls, longest: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if longest is not None and other is not None and longest != other:
            raise ValueError(f"{longest} is asked for here and {other} as max_tokens; give one of them")
        return longest
