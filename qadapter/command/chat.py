"""`qadapter chat`: a conversation with a policy on stdin and stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from qadapter.command.opened import as_base, dials, note, open_policy
from qadapter.command.options import ChatOptions
from qadapter.config.base import refuse_temperature
from qadapter.errors import QAdapterError, did_you_mean
from qadapter.files.shown import visible
from qadapter.inference.generate import longest_reply, only_as_asked, reply_text
from qadapter.inference.score import device_of
from qadapter.policy.dial import Dial
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.positions import position_limit
from qadapter.preferences.pair import Message
from qadapter.preferences.render import end_ids
from qadapter.preferences.tokenize import padding_id, prompt_ids

HELP = """\
/dial scale=0.5    how far from the base (0) to what was trained (1), or beyond; also q-weight=0.5
/alpha0 0.1        keep more (larger) or less of the base; without a number: show the dials
/alphatilde 0.8    temperature of the customised policy
/temperature 0.7   sample; 0: the most likely token at each step
/base              show the base's reply too, or no more
/reset             forget the conversation
/help              this
/quit              end (as do Ctrl-D and, at the prompt, Ctrl-C; during a reply Ctrl-C stops the reply)"""


def run(options: ChatOptions) -> None:
    """Talk until stdin ends.

    Raises:
        QAdapterError: a policy that cannot be used.
    """
    policy, tokenizer = open_policy(options)
    note(f"{dials(policy)}; /help lists the commands")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` line editing and history
    Chat(policy, tokenizer, options).talk()


class VisibleStreamer(TextStreamer):
    """Prints a reply as it is generated; a control character in it is shown and does not act on the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print one piece of the text."""
        super().on_finalized_text(visible(text), stream_end=stream_end)


class Chat:
    """One conversation and its dials.

    Attributes:
        turns: the conversation so far, the policy's replies in it.
        temperature: of sampling, 0 for none.
        show_base: whether the base replies too; its replies are not part of the conversation.
    """

    def __init__(self, policy: Any, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
        self._policy, self._tokenizer, self._options = policy, tokenizer, options
        self.temperature, self.show_base = options.temperature, options.show_base
        self.turns: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/dial": self._set_dial,
            "/alpha0": lambda value: self._turn("alpha_0", value),
            "/alphatilde": lambda value: self._turn("alpha_tilde", value),
            "/temperature": self._set_temperature,
            "/base": self._switch_base,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }
        self._reset()
        torch.manual_seed(options.seed)

    def talk(self) -> None:
        """Read lines and answer them until `/quit`, the end of stdin, or Ctrl-C (which only stops a reply)."""
        prompt = "you> " if sys.stdin.isatty() else ""
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while (line := input(prompt).strip()) != "/quit":
                try:
                    self._take(line)
                except QAdapterError as error:
                    print(error)
            return
        if prompt:
            print()

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            self._command(line)
        elif line:
            try:
                self.answer(line)
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)")

    def answer(self, text: str) -> str:
        """Stream the reply to the user's next turn; both are added to the conversation when the reply is complete."""
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        reply = self._stream(turns, "policy> " if self.show_base else "")
        if self.show_base:
            with as_base(self._policy):
                self._stream(turns, "base>   ")
        self.turns = [*turns, {"role": "assistant", "content": reply}]
        return reply

    def _stream(self, turns: list[Message], label: str) -> str:
        ids = prompt_ids(self._tokenizer, turns)
        context = position_limit(self._policy.config) or 2**30
        asked_for = "max_new_tokens" in self._options.model_fields_set
        longest = longest_reply(self._options.max_new_tokens, context, asked_for=asked_for)
        room = context - longest
        if len(ids) > room:
            note(f"(the first {len(ids) - room} tokens of the conversation no longer fit and are left out; /reset?)")
        print(label, end="", flush=True)
        given = torch.tensor([ids[-room:]], device=device_of(self._policy))
        decoding = self._decoding(longest)
        with torch.no_grad(), only_as_asked(self._policy):
            output = self._policy.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=decoding,
                streamer=VisibleStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        return reply_text(self._tokenizer, output[0, given.shape[1] :].tolist(), decoding.eos_token_id)

    def _decoding(self, longest: int) -> GenerationConfig:
        """As `generate_replies`: of the model's own defaults only its end tokens are used."""
        sampling = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature else {}
        return GenerationConfig(
            max_new_tokens=longest,
            do_sample=self.temperature > 0,
            eos_token_id=end_ids(self._tokenizer, self._policy.generation_config.eos_token_id),
            pad_token_id=padding_id(self._tokenizer),
            **sampling,
        )

    # ---- commands -------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name not in self._commands:
            raise QAdapterError(f"unknown command {name}{did_you_mean(name, [*self._commands, '/quit'])}")
        self._commands[name](value.strip())

    def _turn(self, dial: str, value: str) -> None:
        if not isinstance(self._policy, QAdapterForCausalLM) or self._policy.plain:
            raise QAdapterError("only a Q-Adapter has an alpha; use /dial")
        if value:
            setattr(self._policy.config, dial, _number(value, above_zero=dial == "alpha_tilde"))
        print(f"({dials(self._policy)})")

    def _set_dial(self, value: str) -> None:
        if value:
            self._policy.dial = Dial.parse(value)
        print(f"(dial {self._policy.dial})")

    def _set_temperature(self, value: str) -> None:
        if value:
            try:
                self.temperature = refuse_temperature(_number(value))
            except ValueError as error:
                raise QAdapterError(f"temperature {value}: {error}") from error
        print(f"(temperature {self.temperature:g})")

    def _switch_base(self, _: str) -> None:
        self.show_base = not self.show_base
        print("(the base replies too)" if self.show_base else "(only the policy replies)")

    def _reset(self, *_: str) -> None:
        system: list[Message] = [{"role": "system", "content": self._options.system}] if self._options.system else []
        if self.turns:
            print("(the conversation is forgotten)")
        self.turns = system


def _number(text: str, *, above_zero: bool = False) -> float:
    """A finite number in range.

    Raises:
        QAdapterError: something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf") or (above_zero and number == 0):
        raise QAdapterError(f"{text!r} is not a number {'above 0' if above_zero else 'of at least 0'}")
    return number
