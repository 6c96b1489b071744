"""OpenAI's chat completions as this server speaks them: a request checked against what is served, and its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences.render import RenderError
from qadapter.preferences.template_settings import refuse_unknown
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.errors import RequestError, error_body
from qadapter.serving.generator import Generator, Reply, Sampling, ScoredToken, Turn
from qadapter.serving.policies import BASE_NAME, ServedPolicies, UnknownModelError
from qadapter.serving.request import ChatRequest

__all__ = ["ChatRequest", "Prepared", "RequestError", "error_body", "prepare", "read_request"]

DEFAULT_MAX_TOKENS = 1024
"""Longest reply where a request names none and the context has the room."""

MOST_CHARACTERS = 32
"""Characters of the messages per token of the context, beyond which they are refused without being tokenised."""


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered.

    Attributes:
        model: what the answer says it comes from.
        prompt: token ids.
        turns: one for each choice.
        variants: of each choice, `customised` or `base`.
        sampling: of all of them.
        tokenizer: that the prompt was written with.
    """

    model: str
    prompt: list[int]
    turns: list[Turn]
    variants: list[str]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    # ---- answers

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            self._choice(
                i,
                message={"role": "assistant", "content": reply.text, "refusal": None},
                finish_reason=reply.finish,
                logprobs=_logprobs(reply.scored) if self.sampling.top_logprobs is not None else None,
            )
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
        return self._chunk(number, {}, reply.finish, reply.scored)

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

    def _chunk(
        self, number: int, delta: dict[str, str], finish: str | None = None, scored: Sequence[ScoredToken] = ()
    ) -> dict[str, Any]:
        choice = self._choice(number, delta=delta, finish_reason=finish, logprobs=_logprobs(scored) if scored else None)
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def _choice(self, number: int, **content: Any) -> dict[str, Any]:
        return {"index": number, "variant": self.variants[number], **content}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def read_request(body: bytes) -> ChatRequest:
    """A request from its JSON.

    Raises:
        RequestError: it is no JSON, or a field is wrong; the message names it.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        where, reason = _first_problem(error)
        raise RequestError(f"{where or 'body'}: {reason}", param=where or None) from error


def _first_problem(error: ValidationError) -> tuple[str, str]:
    """The field that is wrong, as the client wrote it, and why.

    Of a field that can be one of several kinds, pydantic names the kind in the path and says of each why it is not that
    one: the reason that lies deepest is that of the kind which was meant; of equals, one that is not about the kind.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]["loc"]
    place = next((i for i, part in enumerate(first) if _is_kind(part)), len(first))
    same = [problem for problem in problems if problem["loc"][:place] == first[:place]]
    meant = max(same, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))
    where = ".".join(str(part) for part in meant["loc"] if not _is_kind(part))
    return where, meant["msg"].removeprefix("Value error, ")


def _is_kind(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part)


def prepare(request: ChatRequest, generator: Generator) -> Prepared:
    """Check a request against what is served.

    Raises:
        RequestError: an unknown model (404), dials or a mix that cannot be, messages that have no rendering, or a
            prompt that is too long.
    """
    policies = generator.policies
    try:
        blend = policies.blend(request.model, request.adapters, request.alpha_0, request.alpha_tilde, request.dial)
        blends = {"customised": blend, "base": policies.blend(BASE_NAME)} if blend.weights else {"base": blend}
        tokenizer = policies.tokenizer_of(request.model, request.adapters)
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
    ids = _encode(tokenizer, request, policies)
    sampling = Sampling(
        max_tokens=_longest_reply(request, len(ids), policies.context),
        temperature=request.temperature,
        top_p=request.top_p,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    name = request.model
    if request.adapters:
        name = "+".join(f"{weight:g}*{adapter}" for adapter, weight in request.adapters.items())
    return Prepared(name, ids, turns, variants, sampling, tokenizer)


def _encode(tokenizer: PreTrainedTokenizerBase, request: ChatRequest, policies: ServedPolicies) -> list[int]:
    messages = [message.plain() for message in request.messages]
    characters = sum(len(message["content"]) for message in messages)
    if characters > MOST_CHARACTERS * policies.context:
        raise RequestError(
            f"This model's context is {policies.context} tokens; the messages have {characters} characters.",
            code="context_length_exceeded",
            param="messages",
        )
    try:
        refuse_unknown(tokenizer, request.chat_template_kwargs)
        ids = prompt_ids(tokenizer, messages, **request.chat_template_kwargs)
    except RenderError as error:
        raise RequestError(f"messages: {error}", param="messages") from error
    except QAdapterError as error:
        raise RequestError(str(error), param="chat_template_kwargs") from error
    if max(ids) >= policies.vocabulary:
        raise RequestError(
            f"messages: {tokenizer.convert_ids_to_tokens(max(ids))!r} is a token that the model does not have",
            param="messages",
        )
    return ids


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


def _logprobs(scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice."""

    def entry(text: str, log_prob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(log_prob, -9999.0), "bytes": list(text.encode(errors="replace"))}

    content = [
        {**entry(one.text, one.log_prob), "top_logprobs": [entry(text, value) for text, value in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}
