"""Calls to a judge behind an OpenAI-compatible endpoint: cached, retried, within a budget, never fatal.

Requests go through the `openai` client. Its own retries are off, because a judge's budget, its waits and the decision
to give up apply to all threads together.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json, write_json
from qadapter.files.shown import remember_secret
from qadapter.files.url_secrets import check_variable
from qadapter.judging.answer_cache import AnswerCache
from qadapter.judging.endpoint_settings import KEY_VARIABLE, EndpointSettings

Messages = Sequence[dict[str, str]]
Parsed = TypeVar("Parsed")

CHARACTERS_A_TOKEN = 3.5
"""Characters per token, for estimates only; English text has about four, other languages fewer."""

LONGEST_WAIT = 60.0
"""Largest wait in seconds between two attempts, even if the server asks for more."""

GIVE_UP_AFTER = 3
"""Consecutive failed calls after which the judge is considered unavailable."""

MOST_TOKENS = 1e9
"""Largest plausible number of tokens per call; larger counts of a server are ignored."""

LARGEST_RESPONSE = 4 * 2**20
"""Largest response in bytes, compressed and decompressed: a verdict has a few hundred, a zip bomb gigabytes."""

_NO_RESPONSE = (httpx.HTTPError, httpx.InvalidURL, OSError, OverflowError, ValueError)
"""Exceptions caused by an address, a network or a server rather than by this program. TLS and codecs raise ValueError
for an invalid name."""


def check_endpoint(settings: EndpointSettings) -> None:
    """Refuse invalid settings before any call.

    Raises:
        QAdapterError: the address is not http(s), the key is missing or not valid in a header, or there is a budget but
            no prices.
    """
    if not _is_base(settings.url):
        raise QAdapterError(
            "The judge's url cannot be used. Give the endpoint's base, http(s)://…/v1, without a user name or password."
        )
    _key_of(settings)
    if settings.budget is not None and (settings.input_price is None or settings.output_price is None):
        raise QAdapterError("The judge has a budget but no prices. Give input_price and output_price.")


def _is_base(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:  # such as a port that is no number
        return False
    port = 80 if parsed.port is None else parsed.port
    return bool(re.match(r"https?://[^/\s@]+(/|$)", url) and parsed.host and 1 <= port <= 65_535)


def _key_of(settings: EndpointSettings) -> str:
    """The key without the newline that a mounted secret often has; empty for a server without keys.

    Raises:
        QAdapterError: the key is missing or not valid in a header; the message does not contain it.
    """
    variable = settings.api_key_variable
    if variable is None:
        return ""
    check_variable(variable, "a judge", known=[KEY_VARIABLE])
    key = os.environ.get(variable, "").strip()
    if not key:
        raise QAdapterError(
            f"The judge's key is expected in the environment variable {variable}, which is not set or empty. Set it, "
            "or set api_key_variable to null for a server without keys."
        )
    if not (key.isascii() and key.isprintable()):
        raise QAdapterError(
            f"The judge's key in the environment variable {variable} has a character that a header cannot contain: a "
            "newline or other control character, or one that is not ASCII. Copy the key again."
        )
    return key


def price(settings: EndpointSettings, input_tokens: float, output_tokens: float) -> float | None:
    """The cost of tokens, in the prices' currency; None if the prices are unknown."""
    if settings.input_price is None or settings.output_price is None:
        return None
    return (input_tokens * settings.input_price + output_tokens * settings.output_price) / 1e6


class UnansweredError(Exception):
    """The judge gave no usable answer to one question; the message is the reason, one of a few words."""


@dataclass
class Usage:
    """A judge's usage.

    Attributes:
        calls: answered questions, including unusable answers.
        cached: answers from the cache.
        retries: number of retries.
        cost: in the prices' currency; 0 without prices.
        last_error: the last error, as readable text.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    cost: float = 0.0
    last_error: str = ""


class JudgeClient:
    """A judge for one evaluation; safe to use from several threads.

    Attributes:
        usage: the usage so far.
    """

    def __init__(self, settings: EndpointSettings, cache: Path | None = None, spent: Path | None = None) -> None:
        """Check the settings and read the cache.

        Args:
            settings: the judge's settings.
            cache: JSON lines of earlier answers, to be extended; a line truncated by a crash is ignored.
            spent: file of this evaluation's calls and their cost: after a kill it goes on with them, within the same
                budget. None: usage begins at 0.
        """
        check_endpoint(settings)
        key = _key_of(settings)
        if key and settings.api_key_variable:
            remember_secret(key, settings.api_key_variable)
        self.settings = settings
        self.usage = Usage(**read_json(spent)) if spent and spent.exists() else Usage()
        self._spent = spent
        self._answers = AnswerCache(cache)
        self._lock = threading.Lock()
        self._reserved = 0.0
        self._lost_in_a_row = 0
        self._stopped: str | None = None
        # The key as it is and as quoted in Python or JSON, the longest first, so that no part remains unmasked.
        self._secrets = sorted({key, repr(key)[1:-1], json.dumps(key)[1:-1]} - {""}, key=len, reverse=True)
        # A client's timeout applies to each read, so a server could send single bytes for ever. A coroutine can be
        # cancelled at any point; its loop runs in a separate thread, so that any thread can call `ask`.
        self._http = _BoundedClient(key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, messages: Messages, parse: Callable[[str], Parsed | None], reminder: str) -> Parsed:
        """Ask the judge one question.

        Args:
            messages: the question.
            parse: parses the judge's text; returns None if it is not an answer.
            reminder: message that is sent once to a judge whose text was not an answer.

        Raises:
            UnansweredError: no answer: "nonsense", "timeout", "unreachable", "server error", "rate limit", "refused",
                "quota", "budget".
        """
        text = self._text(messages, parse)
        if (answer := parse(text)) is not None:
            return answer
        again = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": reminder}]
        text = self._text(again, parse)
        if (answer := parse(text)) is not None:
            self._answers.put(self._key(messages), text)
            return answer
        self._note(f"nonsense: {self._masked(text)[:200]!r}")
        raise UnansweredError("nonsense")

    def is_cached(self, messages: Messages) -> bool:
        """Whether the question needs no call."""
        return self._answers.get(self._key(messages)) is not None

    def estimated_tokens(self, messages: Messages) -> tuple[float, float]:
        """Tokens of the question, and of the longest answer to it."""
        characters = sum(len(message["content"]) for message in messages)
        return characters / CHARACTERS_A_TOKEN + 4 * len(messages), float(self.settings.max_output_tokens)

    def _text(self, messages: Messages, parse: Callable[[str], Any]) -> str:
        key = self._key(messages)
        if (known := self._answers.get(key)) is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        text = self._call(messages)
        if parse(text) is not None:  # unusable answers are not cached: a later attempt may succeed
            self._answers.put(key, text)
        return text

    def _call(self, messages: Messages) -> str:
        expected = price(self.settings, *self.estimated_tokens(messages)) or 0.0
        with self._lock:
            if self._stopped:
                raise UnansweredError(self._stopped)
            budget = self.settings.budget
            if budget is not None and self.usage.cost + self._reserved + expected > budget:
                raise UnansweredError("budget")
            self._reserved += expected
        body: dict[str, Any] | None = None
        try:
            body = self._attempts(messages)
        finally:
            with self._lock:  # both together: otherwise another thread could overspend in between
                self._reserved -= expected
                if body is not None:
                    self.usage.calls += 1
                    self.usage.cost += self._cost(body.get("usage"), expected)
                    if self._spent:
                        write_json(self._spent, {"calls": self.usage.calls, "cost": self.usage.cost})
        try:
            return str(body["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            return ""  # an answer without text is unusable

    def _attempts(self, messages: Messages) -> dict[str, Any]:
        """The response's body, after at most the allowed number of attempts."""
        reason, wait = "unreachable", self.settings.backoff
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(wait * random.uniform(0.75, 1.0))  # jitter, so that threads do not retry together
                with self._lock:
                    self.usage.retries += 1
            if self._stopped:
                raise UnansweredError(self._stopped)
            wait = min(self.settings.backoff * 2**attempt, LONGEST_WAIT)
            try:
                response = asyncio.run_coroutine_threadsafe(self._post(messages), self._loop).result()
            except (TimeoutError, httpx.TimeoutException):
                reason = self._note("timeout", f"no answer within {self.settings.timeout} s")
                continue
            except httpx.DecodingError as error:  # the body is not compressed as its header says
                reason = self._note("server error", str(error))
                continue
            except (*_NO_RESPONSE, ExceptionGroup) as error:
                reason = self._note("unreachable", str(_cause(error)))
                continue
            if response.is_success:
                try:
                    body = response.json()
                except (ValueError, RecursionError):
                    reason = self._note("server error", "the response is not JSON")
                    continue
                self._lost_in_a_row = 0
                return body if isinstance(body, dict) else {}
            # Not `response.text`: the server names the encoding, and Python has codecs that are not for text.
            text = response.content.decode(errors="replace")
            self._note(f"status {response.status_code}", text)
            if response.status_code == 402 or "insufficient_quota" in text:
                raise self._stop("quota")
            if response.status_code in (401, 403, 404):  # the key or the name is wrong, so every question would fail
                raise self._stop("refused")
            if response.status_code not in (408, 409, 429) and response.status_code < 500:
                raise UnansweredError("refused")
            reason = "rate limit" if response.status_code == 429 else "server error"
            wait = _asked_wait(response, wait)
        with self._lock:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= GIVE_UP_AFTER:
                self._stopped = reason
        raise UnansweredError(reason)

    async def _post(self, messages: Messages) -> httpx.Response:
        """One attempt, with the whole response read in time.

        Raises:
            TimeoutError: it took longer than the settings allow.
            Exception: one of `_NO_RESPONSE`, alone or in a group: the response is missing or incomplete.
        """
        url = httpx.URL(f"{self.settings.url.rstrip('/')}/chat/completions")
        question = json.dumps(self._body(messages)).encode()  # the client's own encoding fails at a lone surrogate
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await self._openai().post(
                    str(url),
                    cast_to=httpx.Response,
                    content=question,
                    options={"headers": {"Content-Type": "application/json"}},
                )
        except openai.APIStatusError as error:
            return error.response  # type: ignore[return-value]  # of the client above, so httpx's
        except openai.APIConnectionError as error:
            raise (error.__cause__ or error) from None

    def _openai(self) -> openai.AsyncOpenAI:
        """A client for one request; `_BoundedClient` decides what is sent."""
        return openai.AsyncOpenAI(
            api_key="of the endpoint",
            base_url=self.settings.url,
            http_client=self._http,  # type: ignore[arg-type]  # httpx's is accepted beside httpx2's
            max_retries=0,
            timeout=None,
        )

    def _stop(self, reason: str) -> UnansweredError:
        self._stopped = reason
        return UnansweredError(reason)

    def _note(self, reason: str, detail: str = "") -> str:
        detail = self._masked(detail).strip()[:200]
        self.usage.last_error = f"{reason}: {detail}" if detail else reason
        return reason

    def _masked(self, text: str) -> str:
        """Mask the key in a text: some servers repeat a wrong key in their refusal."""
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def _cost(self, used: Any, expected: float) -> float:
        """The cost of a call by the server's count of tokens; the estimate if the server gives none."""
        if not isinstance(used, dict):
            return expected
        read, written = (_count(used.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        if read is None or written is None:
            return expected
        return price(self.settings, read, written) or 0.0

    def _body(self, messages: Messages) -> dict[str, Any]:
        body = {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.settings.max_output_tokens,
        } | self.settings.extra
        return {name: value for name, value in body.items() if value is not None}

    def _key(self, messages: Messages) -> str:
        question = json.dumps([self.settings.url, self._body(messages)], sort_keys=True)
        return hashlib.sha256(question.encode()).hexdigest()


_SENT_HEADERS = {"host", "accept", "connection", "content-length", "content-type", "user-agent"}


class _BoundedClient(httpx.AsyncClient):
    """An HTTP client that sends only what a question needs, and reads at most `LARGEST_RESPONSE` bytes.

    The `openai` client adds headers from environment variables that are meant for api.openai.com (organisation,
    project, admin key, custom headers); they are not sent to other servers.
    """

    def __init__(self, key: str) -> None:
        """Create a client that authenticates with this key; an empty key is for a server without keys."""
        super().__init__(timeout=None)
        self._key = key

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """As the parent's method, with the body read and decompressed.

        Raises:
            httpx.DecodingError: the body is too large, or not compressed as its header says.
        """
        for name in {*request.headers} - _SENT_HEADERS:
            del request.headers[name]
        request.headers["Accept-Encoding"] = "gzip, deflate"
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        response = await super().send(request, **{**options, "stream": True})
        try:
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > LARGEST_RESPONSE:
                    raise httpx.DecodingError(f"the response is larger than {LARGEST_RESPONSE} bytes", request=request)
        finally:
            await response.aclose()
        try:
            content = _unpacked(bytes(body), response.headers.get("content-encoding", ""))
        except (zlib.error, ValueError) as error:
            raise httpx.DecodingError(str(error), request=request) from error
        # Without the server's name of the text encoding: Python has codecs that are not for text.
        dropped = ("content-encoding", "content-length", "transfer-encoding", "content-type")
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in dropped]
        return httpx.Response(response.status_code, headers=headers, content=content, request=request)


def _unpacked(body: bytes, encoding: str) -> bytes:
    """A response's decompressed body.

    Raises:
        ValueError: an encoding that was not requested, or more than `LARGEST_RESPONSE` bytes.
        zlib.error: the body is not compressed in this way.
    """
    named = encoding.strip().lower()
    if named in ("", "identity"):
        return body
    if named not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"the response is compressed as {named[:40]!r}; expected gzip or deflate")
    reader = zlib.decompressobj(wbits=47)  # zlib's header or gzip's
    content = reader.decompress(body, LARGEST_RESPONSE + 1)
    if len(content) > LARGEST_RESPONSE:
        raise ValueError(f"the response unpacks to more than {LARGEST_RESPONSE} bytes")
    return content


def _count(value: Any) -> float | None:
    """A server's count of tokens; None if it is not a valid count."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return float(value) if known else None


def _asked_wait(response: httpx.Response, otherwise: float) -> float:
    """Seconds that the server asks to wait, if it gives a valid time."""
    try:
        asked = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return otherwise
    return min(asked, LONGEST_WAIT) if math.isfinite(asked) and asked >= 0 else otherwise


def _cause(error: Exception) -> Exception:
    """The error behind a group of exceptions, which connection attempts to several addresses may raise.

    Raises:
        ExceptionGroup: the group contains an error of this program.
    """
    if not isinstance(error, ExceptionGroup):
        return error
    if (others := error.split(_NO_RESPONSE)[1]) is not None:
        raise others
    return _cause(error.exceptions[0])
