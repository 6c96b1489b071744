"""Replies of served policies, one at a time in the order they were asked for, handed on as they grow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from qadapter.preferences.render import end_ids
from qadapter.preferences.tokenize import padding_id
from qadapter.serving.policies import Blend, ServedPolicies

OnText = Callable[[int, str], None]
"""Told about every piece of text as it comes: number of the reply, the piece."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        max_tokens: longest reply.
        temperature: 0 takes the most likely token, above 0 samples.
        top_p: share of the probability to sample from.
        stop: texts that end a reply; they are not part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One reply to make: from which blend, and the seed of its sampling (None: whatever comes)."""

    blend: Blend
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """A finished reply: its text, how many tokens were made for it (an end token included), and why it ended."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


class Generator:
    """The only one who runs the model: requests wait in a queue, so that no request's dials reach another's reply.

    Attributes:
        policies: what is served.
    """

    def __init__(self, policies: ServedPolicies) -> None:
        self.policies = policies
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generator")
        self._ends = end_ids(policies.tokenizer, policies.policy.generation_config.eos_token_id)

    def submit(
        self,
        turns: Sequence[Turn],
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        on_text: OnText = lambda _, __: None,
        cancelled: threading.Event | None = None,
    ) -> Future[list[Reply]]:
        """Queue the replies of one request.

        Args:
            turns: the replies to make, one after the other.
            prompt: token ids.
            sampling: for all of them.
            on_text: called from the generator's thread.
            cancelled: once set, the reply under way ends at the next token and the others are not begun.
        """
        stop = cancelled or threading.Event()

        def work() -> list[Reply]:
            replies: list[Reply] = []
            for number, turn in enumerate(turns):
                if stop.is_set():
                    break
                replies.append(self._reply(turn, prompt, sampling, partial(on_text, number), stop))
            return replies

        return self._thread.submit(work)

    def close(self) -> None:
        """Let the reply under way end and refuse further ones."""
        self._thread.shutdown(cancel_futures=True)

    def _reply(
        self,
        turn: Turn,
        prompt: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None],
        cancelled: threading.Event,
    ) -> Reply:
        model: Any = self.policies.policy
        ids = torch.tensor([list(prompt)], device=model.device)
        reader = ReplyReader(self.policies.tokenizer, len(prompt), sampling.stop, on_text, cancelled)
        if turn.seed is not None:
            torch.manual_seed(turn.seed)
        with self.policies.speaking(turn.blend) as dials:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(sampling),
                stopping_criteria=StoppingCriteriaList([reader]),
                **dials,
            )
        reader.close()
        ended = reader.stopped or bool(reader.ids and reader.ids[-1] in self._ends)
        return Reply(reader.text, len(reader.ids), "stop" if ended else "length")

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        picking: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            picking = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self._ends,
            pad_token_id=padding_id(self.policies.tokenizer),
            use_cache=True,
            **picking,
        )


class ReplyReader(StoppingCriteria):
    """Reads one reply while it is generated, and ends it at a stop text or when nobody wants it any more.

    In place of transformers' `TextIteratorStreamer`, which hands on whole words, so that a stop text is seen late, and
    decodes anew after each line break, where some tokenizers then lose a space. Here the pieces always join to the
    text of the whole.

    Attributes:
        ids: tokens so far.
        text: what was handed on so far.
        stopped: whether a stop text ended it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        cancelled: threading.Event,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._stop = stop
        self._on_text = on_text
        self._cancelled = cancelled
        self._begin = self._read = 0  # the text of ids[:_read] was taken; decoding from _begin gives it its context
        self._held = ""  # text that may be the beginning of a stop text
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Take the new token; True where the reply is to end. [1] bool."""
        self.ids += input_ids[0, self._prompt_length + len(self.ids) :].tolist()
        before, now = self._decode(self._begin, self._read), self._decode(self._begin, len(self.ids))
        if len(now) > len(before) and not now.endswith("\ufffd"):  # not in the middle of a character
            self._begin, self._read = self._read, len(self.ids)
            self._take(now[len(before) :])
        end = self.stopped or self._cancelled.is_set()
        return torch.full((len(input_ids),), end, dtype=torch.bool, device=input_ids.device)

    def close(self) -> None:
        """No token comes any more: hand on what was held back."""
        if self.stopped:
            return
        before, now = self._decode(self._begin, self._read), self._decode(self._begin, len(self.ids))
        self._take(now[len(before) :])
        if not self.stopped:
            self._give(self._held)

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _take(self, piece: str) -> None:
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        keep = 0 if found else _overlap(text, self._stop)
        cut = min(found) if found else len(text) - keep
        self._held = text[cut:] if keep else ""
        self._give(text[:cut])

    def _give(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._on_text(piece)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
