"""Generate replies of served policies, one at a time in the order of the requests, and stream them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qadapter.inference.generate import only_as_asked
from qadapter.preferences.render import end_ids, special_texts, turn_end
from qadapter.preferences.tokenize import padding_id
from qadapter.serving.policies import Blend, ServedPolicies

MOST_WAITING = 64
"""Requests that may wait for the model."""

OnText = Callable[[int, str], None]
"""Callback for each new piece of text: number of the reply, the piece."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        max_tokens: longest reply in tokens.
        temperature: 0 takes the most likely token, above 0 samples.
        top_p: share of the probability to sample from.
        stop: texts that end a reply; they are not part of it.
        top_logprobs: number of most likely tokens to return with each token's log-probability; None: no
            log-probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Turn:
    """One reply to generate: its blend, and the seed of its sampling (None: random)."""

    blend: Blend
    seed: int | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token of a reply, its log-probability under the policy, and the most likely ones with theirs, in nats."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """A finished reply: its text, the number of generated tokens (including an end token), and why it ended.

    `scored` contains the tokens of the text if log-probabilities were requested.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"]
    scored: tuple[ScoredToken, ...] = ()


class BusyError(Exception):
    """Too many requests are waiting."""


class Generator:
    """Runs the model for all requests. They wait in a queue, so that one request's dials cannot affect another's reply.

    Attributes:
        policies: what is served.
    """

    def __init__(self, policies: ServedPolicies) -> None:
        self.policies = policies
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generator")
        self._own_ends = policies.policy.generation_config.eos_token_id
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)

    def submit(
        self,
        turns: Sequence[Turn],
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        on_text: OnText = lambda _, __: None,
        cancelled: threading.Event | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Future[list[Reply]]:
        """Queue the replies of one request.

        Args:
            turns: the replies to generate, one after the other.
            prompt: token ids.
            sampling: settings for all replies.
            on_text: called from the generator's thread.
            cancelled: if set, the current reply ends at the next token and the others are not started.
            tokenizer: the tokenizer of the prompt; by default the base's.

        Raises:
            BusyError: `MOST_WAITING` requests are already waiting.
        """
        if not self._waiting.acquire(blocking=False):
            raise BusyError
        stop = cancelled or threading.Event()

        def work() -> list[Reply]:
            replies: list[Reply] = []
            for number, turn in enumerate(turns):
                if stop.is_set():
                    break
                report = partial(on_text, number)
                replies.append(self._reply(turn, prompt, sampling, report, stop, tokenizer or self.policies.tokenizer))
            return replies

        try:
            work_done = self._thread.submit(work)
        except RuntimeError:  # closed
            self._waiting.release()
            raise
        work_done.add_done_callback(lambda _: self._waiting.release())
        return work_done

    def close(self) -> None:
        """Refuse further replies, and wait for the current one."""
        self._thread.shutdown(cancel_futures=True)

    def _reply(
        self,
        turn: Turn,
        prompt: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None],
        cancelled: threading.Event,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Reply:
        model: Any = self.policies.policy
        ids = torch.tensor([list(prompt)], device=model.device)
        ends = end_ids(tokenizer, self._own_ends)
        closing = turn_end(tokenizer)
        stop = (*sampling.stop, closing.text.strip()) if closing.token is None and closing.text else sampling.stop
        scores = None if sampling.top_logprobs is None else _Scores(sampling.top_logprobs)
        reader = ReplyReader(tokenizer, len(prompt), stop, on_text, cancelled, ends, scores)
        # A process starts with torch's fixed seed, and the seed of the last request would decide this one's reply.
        torch.seed() if turn.seed is None else torch.manual_seed(turn.seed)
        with self.policies.speaking(turn.blend) as dials, only_as_asked(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(sampling, tokenizer, ends),
                stopping_criteria=StoppingCriteriaList([reader]),
                **({} if scores is None else {"logits_processor": LogitsProcessorList([scores])}),
                **dials,
            )
        reader.close()
        ended = reader.stopped or bool(reader.ids and reader.ids[-1] in ends)
        return Reply(reader.text, len(reader.ids), "stop" if ended else "length", tuple(reader.scored))

    def _settings(self, sampling: Sampling, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> GenerationConfig:
        picking: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            picking = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=ends,
            pad_token_id=padding_id(tokenizer),
            use_cache=True,
            **picking,
        )


class _Scores(LogitsProcessor):
    """Records the policy's log-probabilities of the next token, before temperature and top_p."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._log_probs = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the scores and return them unchanged. [1, T], [1, V]."""
        self._log_probs = scores[0].float().log_softmax(dim=-1)
        return scores

    def of(self, token: int, tokenizer: PreTrainedTokenizerBase) -> ScoredToken:
        """The log-probability of the sampled token."""
        found = self._log_probs.topk(self._top) if self._top else None
        pairs = [] if found is None else zip(found.indices.tolist(), found.values.tolist(), strict=True)
        top = tuple((str(tokenizer.decode([one])), float(value)) for one, value in pairs)
        return ScoredToken(str(tokenizer.decode([token])), float(self._log_probs[token]), top)


class ReplyReader(StoppingCriteria):
    """Reads one reply while it is generated, and ends it at a stop text or when its client has disconnected.

    In place of transformers' `TextIteratorStreamer`, which hands on whole words, so that a stop text is seen late, and
    decodes anew after each line break, where some tokenizers then lose a space. Here the pieces always join to the
    text of the whole.

    Attributes:
        ids: tokens so far.
        text: the text streamed so far.
        stopped: whether a stop text ended it.
        scored: its tokens with log-probabilities, if requested; without end tokens and stop texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        cancelled: threading.Event,
        ends: Sequence[int] = (),
        scores: _Scores | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._ends, self._scores = set(ends), scores
        # Special tokens are not part of a reply's text, but those in stop texts are still detected.
        named = [text for text in special_texts(tokenizer) if any(text in one for one in stop)] if stop else []
        ids: Any = tokenizer.convert_tokens_to_ids(named) if named else []
        self._named: dict[int, str] = dict(zip(ids, named, strict=True))
        self._hidden: list[bool] = []  # for each held character, whether it belongs to a special token
        self._prompt_length = prompt_length
        self._stop = stop
        self._on_text = on_text
        self._cancelled = cancelled
        self._begin = self._read = 0  # the text of ids[:_read] was taken; decoding from _begin gives it its context
        self._held = ""  # text that may be the beginning of a stop text
        self._taken = 0  # characters so far, streamed, held, and of special tokens
        self._starts: list[int] = []  # of each scored token, the characters before it
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.scored: list[ScoredToken] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Add the new token; returns whether the reply ends. [1] bool."""
        for token in input_ids[0, self._prompt_length + len(self.ids) :].tolist():
            self.ids.append(token)
            if token in self._ends and token not in self._named:
                continue
            if self._scores is not None:
                self._starts.append(self._taken)
                self.scored.append(self._scores.of(token, self._tokenizer))
            if token in self._named:
                self._read_on(len(self.ids) - 1, whole=True)
                self._begin = self._read = len(self.ids)
                self._take(self._named[token], hidden=True)
            else:
                self._read_on(len(self.ids), whole=False)
        end = self.stopped or self._cancelled.is_set()
        return torch.full((len(input_ids),), end, dtype=torch.bool, device=input_ids.device)

    def close(self) -> None:
        """After the last token, stream the text that was held back."""
        if self.stopped:
            return
        ended = bool(self.ids) and self.ids[-1] in self._ends
        self._read_on(len(self.ids) - ended, whole=True)
        if not self.stopped:
            self._give(len(self._held))

    def _read_on(self, until: int, *, whole: bool) -> None:
        """Add the text of the tokens up to a position; with `whole` also if they end within a character."""
        before, now = self._decode(self._begin, self._read), self._decode(self._begin, until)
        if len(now) > len(before) and (whole or not now.endswith("\ufffd")):
            self._begin, self._read = self._read, until
            self._take(now[len(before) :])

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _take(self, piece: str, *, hidden: bool = False) -> None:
        self._held += piece
        self._taken += len(piece)
        self._hidden += [hidden] * len(piece)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:  # the tokens from the stop text on are no part of the text
            end = self._taken - len(self._held) + min(found)
            del self.scored[sum(start < end for start in self._starts) :]
        self._give(min(found) if found else len(self._held) - _overlap(self._held, self._stop))

    def _give(self, length: int) -> None:
        """Stream a number of held characters, without those of special tokens."""
        piece = "".join(
            one for one, hidden in zip(self._held[:length], self._hidden[:length], strict=True) if not hidden
        )
        self._held, self._hidden = self._held[length:], self._hidden[length:]
        if piece:
            self.text += piece
            self._on_text(piece)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop text."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
