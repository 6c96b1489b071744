"""`qadapter generate`: replies to prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qadapter.command.opened import as_base, dials, note, open_policy
from qadapter.command.options import GenerateOptions
from qadapter.command.results import Row, require_free, writing
from qadapter.errors import QAdapterError
from qadapter.files.shown import visible
from qadapter.inference.generate import context_of, generate_replies, longest_reply, why_not
from qadapter.preferences.containers import iter_records
from qadapter.preferences.pair import Message


def run(options: GenerateOptions) -> None:
    """Answer every prompt, in order; rows go to a file, or readable text to stdout.

    Raises:
        QAdapterError: prompts or policy that cannot be used.
    """
    prompts = [[_user(text)] for text in options.prompt]
    if options.prompts is not None:
        prompts += read_prompts(Path(options.prompts).expanduser())
    if not prompts:
        raise QAdapterError("no prompt was given; give --prompt TEXT or --prompts FILE")
    file = require_free(options)
    policy, tokenizer = open_policy(options)
    note(dials(policy))

    reasons = [why_not(tokenizer, prompt) for prompt in prompts]
    refused = [reason for reason in reasons if reason is not None]
    if len(refused) == len(prompts):
        raise QAdapterError(f"none of the prompts can be used: {refused[0]}")
    asked_for = "max_new_tokens" in options.model_fields_set
    longest = longest_reply(options.max_new_tokens, context_of(policy), asked_for=asked_for)

    def answers(start: int) -> list[str | None]:
        """Replies to a batch of prompts; None for those that cannot be asked."""
        places = range(start, min(start + options.batch_size, len(prompts)))
        some = [place for place in places if reasons[place] is None]
        replies = generate_replies(
            policy,
            tokenizer,
            [prompts[place] for place in some],
            max_new_tokens=longest,
            batch_size=max(1, len(some)),
            temperature=options.temperature,
            seed=options.seed + start,
        )
        by_place = dict(zip(some, replies, strict=True))
        return [by_place.get(place) for place in places]

    with writing(file) as write, tqdm(total=len(prompts), desc="generating", unit="prompt") as bar:
        for start in range(0, len(prompts), options.batch_size):
            columns: dict[str, list[Any]] = {"prompt": prompts[start : start + options.batch_size]}
            columns["reply"] = answers(start)
            if options.compare_base:
                with as_base(policy):
                    columns["base_reply"] = answers(start)
            for place, values in enumerate(zip(*columns.values(), strict=True), start=start):
                row: dict[str, Any] = dict(zip(columns, values, strict=True))
                if reasons[place] is not None:
                    row["error"] = reasons[place]
                write(row)
                if file is None:
                    bar.write(_readable(row))
                bar.update()
    if refused:
        note(f"{len(refused)} of {len(prompts)} prompts could not be asked, the first because {refused[0]}")


def read_prompts(file: Path) -> list[list[Message]]:
    """The prompts of a file, as conversations that end with the user's turn.

    Args:
        file: `.txt` with a prompt a line (blank lines are none); anything else is read as `iter_records` does, a record
            being a text, or an object with `prompt` (text or messages) or `messages`.

    Raises:
        QAdapterError: no such file, or a record that is no prompt; the message has its line.
    """
    if file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would cut at U+2028 too
        except (OSError, UnicodeDecodeError) as error:
            raise QAdapterError(f"{file} cannot be read ({error}); a UTF-8 text file was expected") from error
        return [[_user(line.strip())] for line in lines if line.strip()]
    prompts = []
    for record in iter_records(file):
        prompt = None if record.problem else _prompt(record.value)
        if prompt is None:
            raise QAdapterError(
                f"{file}, line {record.line}: {record.problem or 'no prompt'}; expected a text, or an object with "
                "`prompt` (text or messages) or `messages`, the last one the user's"
            )
        prompts.append(prompt)
    return prompts


def _prompt(value: Any) -> list[Message] | None:
    """A record's conversation, None if it has none."""
    if isinstance(value, Mapping):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str):
        return [_user(value)] if value.strip() else None
    if not isinstance(value, list) or not value or not all(_is_message(turn) for turn in value):
        return None
    turns: list[Message] = [{"role": turn["role"], "content": turn["content"]} for turn in value]
    return turns if turns[-1]["role"] == "user" else None


def _is_message(turn: Any) -> bool:
    known = isinstance(turn, Mapping) and turn.get("role") in ("system", "user", "assistant")
    return known and isinstance(turn.get("content"), str)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _readable(row: Row) -> str:
    lines = [f"{turn['role']}: {turn['content']}" for turn in row["prompt"]]
    if "error" in row:
        lines.append(f"no reply: {row['error']}")
        return visible("\n".join(lines)) + "\n"
    lines.append(f"reply: {row['reply']}")
    if "base_reply" in row:
        lines.append(f"base: {row['base_reply']}")
    return visible("\n".join(lines)) + "\n"
