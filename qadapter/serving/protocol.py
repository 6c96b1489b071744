"""OpenAI's chat completions as this server speaks them: what a request may say, and what answers look like."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qadapter.errors import QAdapterError
from qadapter.preferences.pair import Message
from qadapter.preferences.render import RenderError
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.generator import Generator, Reply, Sampling, Turn
from qadapter.serving.policies import BASE_NAME, UnknownModelError

DEFAULT_MAX_TOKENS = 1024
"""Longest reply where a request names none and the context has the room."""

MOST_REPLIES = 16
"""Largest `n`."""

Text = Annotated[str, Field(min_length=1)]


class RequestError(Exception):
    """A request that cannot be answered, as OpenAI's error body says it.

    Attributes:
        status: of HTTP.
        code: for programs, such as `context_length_exceeded`.
        param: the field at fault, if one is.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """`{"error": …}`."""
        return error_body(str(self), self.status, self.code, self.param)


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; its content is a text, or text parts."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> Message:
        """The turn as chat templates take it."""
        whole = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": whole}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of `/v1/chat/completions`. A field that this server could not honour is refused, not ignored.

    Attributes:
        model: an adapter's name, or `base`.
        max_tokens: longest reply; also `max_completion_tokens`. Without it 1024 or what the context has room for.
        temperature: 0 is greedy. It multiplies α̃.
        n: number of replies; reply i of a seeded request has seed + i.
        stop: texts that end a reply.
        user: accepted, of no effect.
        alpha_0, alpha_tilde: the dials of this request; the adapter's own without them.
        adapters: a weighted mix of adapters, {name: weight}, in place of `model`'s own.
        compare_base: answer as the base too: `n` further choices behind the customised ones.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] = 1
    stop: Text | list[Text] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    user: str | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    alpha_0: Annotated[float, Field(ge=0)] | None = None
    alpha_tilde: Annotated[float, Field(gt=0)] | None = None
    adapters: dict[str, float] | None = None
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


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered.

    Attributes:
        model: what the answer says it comes from.
        prompt: token ids.
        turns: one for each choice.
        variants: of each choice, `customised` or `base`.
        sampling: of all of them.
    """

    model: str
    prompt: list[int]
    turns: list[Turn]
    variants: list[str]
    sampling: Sampling
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    # ---- answers

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            self._choice(i, message={"role": "assistant", "content": reply.text}, finish_reason=reply.finish)
            for i, reply in enumerate(replies)
        ]
        return {**self._frame("chat.completion"), "choices": choices, "usage": self.usage(replies)}

    def first_chunk(self, number: int) -> dict[str, Any]:
        """Opens a choice of a stream."""
        return self._chunk(number, {"role": "assistant", "content": ""})

    def text_chunk(self, number: int, text: str) -> dict[str, Any]:
        """A piece of a choice."""
        return self._chunk(number, {"content": text})

    def last_chunk(self, number: int, reply: Reply) -> dict[str, Any]:
        """Closes a choice."""
        return self._chunk(number, {}, reply.finish)

    def usage_chunk(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Ends a stream that was asked to count."""
        return {**self._frame("chat.completion.chunk"), "choices": [], "usage": self.usage(replies)}

    def usage(self, replies: Sequence[Reply]) -> dict[str, int]:
        """Tokens of the prompt, counted once as OpenAI does, and of all replies."""
        made = sum(reply.tokens for reply in replies)
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": made,
            "total_tokens": len(self.prompt) + made,
        }

    def _chunk(self, number: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = self._choice(number, delta=delta, finish_reason=finish)
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def _choice(self, number: int, **content: Any) -> dict[str, Any]:
        return {"index": number, "variant": self.variants[number], **content, "logprobs": None}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def prepare(request: ChatRequest, generator: Generator) -> Prepared:
    """Check a request against what is served.

    Raises:
        RequestError: an unknown model (404), dials or a mix that cannot be, or a prompt that is too long.
    """
    policies = generator.policies
    try:
        blend = policies.blend(request.model, request.adapters, request.alpha_0, request.alpha_tilde)
        blends = {"customised": blend, "base": policies.blend(BASE_NAME)} if blend.weights else {"base": blend}
    except UnknownModelError as error:
        raise RequestError(str(error), 404, "model_not_found", "model") from error
    except QAdapterError as error:
        raise RequestError(str(error), param="alpha_0" if request.adapters is None else "adapters") from error
    if not request.compare_base and blend.weights:
        del blends["base"]
    elif request.compare_base and not blend.weights:
        raise RequestError("The base cannot be compared with itself; name an adapter.", param="compare_base")

    variants = [variant for variant in blends for _ in range(request.n)]
    seeds = [None if request.seed is None else request.seed + i for i in range(request.n)]
    turns = [Turn(blend, seed) for blend in blends.values() for seed in seeds]
    ids = _encode(generator, request)
    sampling = Sampling(
        max_tokens=_longest_reply(request, len(ids), policies.context),
        temperature=request.temperature,
        top_p=request.top_p,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
    )
    name = request.model
    if request.adapters:
        name = "+".join(f"{weight:g}*{adapter}" for adapter, weight in request.adapters.items())
    return Prepared(name, ids, turns, variants, sampling)


def _encode(generator: Generator, request: ChatRequest) -> list[int]:
    try:
        return prompt_ids(generator.policies.tokenizer, [message.plain() for message in request.messages])
    except RenderError as error:
        raise RequestError(f"messages: {error}", param="messages") from error


def _longest_reply(request: ChatRequest, prompt: int, context: int) -> int:
    wanted = request.max_completion_tokens or request.max_tokens
    if prompt + (wanted or 1) > context:
        raise RequestError(
            f"This model's context is {context} tokens; the messages have {prompt}"
            + (f" and {wanted} were asked for the reply." if wanted else ", which leaves no room for a reply."),
            code="context_length_exceeded",
            param="messages",
        )
    return wanted or min(DEFAULT_MAX_TOKENS, context - prompt)
