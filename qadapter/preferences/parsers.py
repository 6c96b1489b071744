"""The layouts that need code: a decoded record in, its candidate pairs out.

Each parser takes the record and the source's `Context` and returns at least one candidate, a pair or the reason why it
is none; a record that gives no pair at all raises `UnusableRecord`. White space around a turn is dropped.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from qadapter.preferences.building import (
    Context,
    Record,
    decision,
    margin_of,
    opening,
    pair_of_sides,
    scored,
    side,
    system_of,
)
from qadapter.preferences.pair import Message
from qadapter.preferences.records import Reason
from qadapter.preferences.transcripts import HH
from qadapter.preferences.turns import (
    Candidates,
    UnusableRecord,
    content_text,
    make_pair,
    messages,
    pair_of_dialogues,
    prompt_of,
    text,
    with_system,
)


def hh_dialogues(record: Record, context: Context) -> Candidates:
    """`chosen` and `rejected` are whole dialogues, written out in one style. One candidate."""
    turns = (context.reply_style or HH).turns
    chosen, rejected = turns(text(record.get("chosen"))), turns(text(record.get("rejected")))
    prompt = record.get("prompt")
    if prompt is not None and " ".join(text(prompt).split()) not in " ".join(text(record["chosen"]).split()):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return [pair_of_dialogues(chosen, rejected, system_of(record), margin_of(record))]


def decided(record: Record, context: Context) -> Candidates:
    """`chosen` and `rejected`, text or messages, with `prompt` or with the prompt inside. One candidate."""
    sides = record.get("chosen"), record.get("rejected")
    return [decision(context, record.get("prompt"), *sides, system=system_of(record), margin=margin_of(record))]


def plain(record: Record, context: Context) -> Candidates:
    """`prompt`, `chosen` and `rejected` as text. One candidate."""
    if not isinstance(record.get("prompt"), str):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if not isinstance(record.get("chosen"), str) or not isinstance(record.get("rejected"), str):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    response = record.get("response")
    if response is not None and text(response) != text(record["chosen"]):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return decided(_without_prompt(record) if context.repeats_prompt else record, context)


def _without_prompt(record: Record) -> Record:
    """A record whose replies repeat its prompt, with the replies alone."""
    prompt, found = str(record["prompt"]).strip(), dict(record)
    for side_name in ("chosen", "rejected"):
        reply = str(record[side_name]).lstrip()
        if not reply.startswith(prompt):
            raise UnusableRecord(Reason.WRONG_FIELDS)
        found[side_name] = reply[len(prompt) :]
    return found


def plain_implicit(record: Record, context: Context) -> Candidates:
    """`chosen` and `rejected` as text that begins with the prompt. One candidate."""
    if not isinstance(record.get("chosen"), str) or not isinstance(record.get("rejected"), str):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if record.get("prompt") is not None:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return decided(record, context)


def reply_lists(record: Record, context: Context) -> Candidates:
    """Lists of good and bad replies (RewardBench 2): each good one is preferred to each bad one."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not chosen or not rejected:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    start = opening(context, record.get("prompt"), system_of(record))
    candidates: Candidates = []
    for better, worse in itertools.product(chosen, rejected):
        try:
            candidates.append(make_pair(start, text(better), text(worse)))
        except UnusableRecord as unusable:
            candidates.append(unusable.reason)
    return candidates


def text_score(record: Record, context: Context) -> Candidates:
    """Text-score: n whole dialogues in `text`, n numbers in `score`. n·(n-1)/2 candidates."""
    texts, scores = record.get("text"), record.get("score")
    if not isinstance(texts, list) or len(texts) < 2:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if scores is None:
        raise UnusableRecord(Reason.NO_PREFERENCE)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if context.reply_style is None:
        context.reply_style = HH
    return scored(context, None, list(zip(texts, scores, strict=True)), system=system_of(record))


def dsp(record: Record, context: Context) -> Candidates:
    """DSP: one candidate for every style but the domain: the domain's response chosen, the other style's rejected.

    The definition is its authors' (Cheng et al., 2023).
    """
    responses = record.get("responses")
    if not isinstance(responses, dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    # Arrow gives every record all styles of the file, null where it has none.
    styles = [style for style, response in responses.items() if response is not None]
    if context.domain not in styles or len(styles) < 2:
        raise UnusableRecord(Reason.NO_DOMAIN_RESPONSE)
    candidates: Candidates = []
    for style in styles:
        if style == context.domain:
            continue
        try:
            prompt = [Message(role="user", content=text(record.get("query")))]
            prompt = with_system(prompt, system_of(record))
            candidates.append(make_pair(prompt, text(responses[context.domain]), text(responses[style])))
        except UnusableRecord as unusable:
            candidates.append(unusable.reason)
    return candidates


# ---- exports of the fine-tuning services ----


def openai_preference(record: Record, context: Context) -> Candidates:
    """OpenAI's preference fine-tuning: `input`, `preferred_output`, `non_preferred_output` of one text turn each."""
    given = record.get("input")
    if isinstance(given, dict):
        if given.get("tools"):
            raise UnusableRecord(Reason.NOT_TEXT)
        given = given.get("messages")
    prompt = messages(given)
    outputs = [record.get("preferred_output"), record.get("non_preferred_output")]
    if any(isinstance(output, list) and len(output) > 1 for output in outputs):
        raise UnusableRecord(Reason.NOT_TEXT)
    return [decision(context, [dict(turn) for turn in prompt], *outputs, system=system_of(record))]


def nova_dpo(record: Record, _: Context) -> Candidates:
    """Amazon Nova: the last of `messages` has two `candidates`, labelled `preferred` and `non-preferred`."""
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    candidates = turns[-1].get("candidates")
    if not isinstance(candidates, list) or not all(isinstance(reply, dict) for reply in candidates):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    by_label: dict[str, list[Any]] = {"preferred": [], "non-preferred": []}
    for reply in candidates:
        by_label.get(str(reply.get("preferenceLabel")).strip().lower(), []).append(reply.get("content"))
    if [len(replies) for replies in by_label.values()] != [1, 1]:
        raise UnusableRecord(Reason.NO_PREFERENCE)
    start = prompt_of(with_system(messages(turns[:-1]), system_of(record)))
    better, worse = (content_text(replies[0]) for replies in by_label.values())
    return [pair_of_sides(start, better, worse)]


def gemini_preference(record: Record, context: Context) -> Candidates:
    """Vertex: `contents`, and `completions` whose scores are 1 and 0."""
    completions = record.get("completions")
    if not isinstance(completions, list) or not all(isinstance(reply, dict) for reply in completions):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if record.get("tools"):
        raise UnusableRecord(Reason.NOT_TEXT)
    system = record.get("system_instruction") or record.get("systemInstruction") or system_of(record)
    replies = [([reply.get("completion")], reply.get("score")) for reply in completions]
    return scored(context, record.get("contents"), replies, system=system, margins=False)


# ---- published sets ----


def arena_55k(record: Record, context: Context) -> Candidates:
    """Arena on Kaggle: prompt and responses are JSON lists of turns as text, the winner one of two columns."""
    winners = [_truth(record.get(f"winner_model_{side}")) for side in "ab"]
    if winners[0] == winners[1]:
        raise UnusableRecord(Reason.NO_PREFERENCE)
    prompts = _json_turns(record.get("prompt"))
    dialogues = []
    for name in ("response_a", "response_b"):
        replies = _json_turns(record.get(name))
        if len(replies) != len(prompts):
            raise UnusableRecord(Reason.WRONG_FIELDS)
        turns = [
            turn
            for prompt, reply in zip(prompts, replies, strict=True)
            for turn in (Message(role="user", content=prompt), Message(role="assistant", content=reply))
        ]
        dialogues.append(turns)
    context.labels["response_a" if winners[0] else "response_b"] += 1
    better, worse = dialogues if winners[0] else reversed(dialogues)
    return [pair_of_dialogues(better, worse, system_of(record))]


def _truth(value: Any) -> bool:
    if value is None or isinstance(value, list | dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if str(value).strip().lower() in ("1", "1.0", "true"):
        return True
    if str(value).strip().lower() in ("0", "0.0", "false", ""):
        return False
    raise UnusableRecord(Reason.WRONG_FIELDS)


def _json_turns(value: Any) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableRecord(Reason.WRONG_FIELDS) from None
    if not isinstance(value, list):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return [text(turn) for turn in value]


def summarize_comparisons(record: Record, context: Context) -> Candidates:
    """OpenAI's summaries: a post or an article in `info`, two `summaries`, the better one's index in `choice`."""
    info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if str(choice) not in ("0", "1") or isinstance(choice, bool):
        raise UnusableRecord(Reason.NO_PREFERENCE)
    if info.get("post") is not None:
        title, subreddit = (text(info[key]) if info.get(key) is not None else "" for key in ("title", "subreddit"))
        request = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {text(info['post'])}\n\nTL;DR:"
    else:
        request = f"Article:\n{text(info.get('article'))}\n\nTL;DR:"
    if not text(info["post"] if info.get("post") is not None else info.get("article")):
        raise UnusableRecord(Reason.EMPTY_PROMPT)
    texts = [text(summary.get("text") if isinstance(summary, dict) else summary) for summary in summaries]
    better = int(str(choice))
    context.labels[f"summary {better}"] += 1
    prompt = with_system([Message(role="user", content=request)], system_of(record))
    return [make_pair(prompt, texts[better], texts[1 - better])]


def ms_swift(record: Record, _: Context) -> Candidates:
    """ms-swift: `messages` ends with the chosen reply; `rejected_response`, or `rejected_messages`' last turn."""
    turns = messages(record.get("messages"))
    if not turns or turns[-1]["role"] != "assistant":
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    start = prompt_of(with_system(turns[:-1], system_of(record)))
    rejected = record.get("rejected_response")
    if rejected is None:
        whole = side(record.get("rejected_messages"))
        rejected = whole if isinstance(whole, str) else _last_reply(whole)
    else:
        rejected = text(rejected)
    return [pair_of_sides(start, turns[-1]["content"], rejected, margin_of(record))]


def _last_reply(turns: Sequence[Message]) -> str:
    if not turns or turns[-1]["role"] != "assistant":
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    return turns[-1]["content"]


MAX_TREE_DEPTH = 200


def oasst_tree(record: Record, context: Context) -> Candidates:
    """OpenAssistant: each turn of the user with two or more ranked replies; rank 0 is the best."""
    root = record.get("prompt")
    if not isinstance(root, dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    candidates: Candidates = []
    for path, replies in _branches(root, []):
        try:
            ranked = [(text(reply.get("text")), reply.get("rank")) for reply in replies]
            prompt = [dict(turn) for turn in path]
            candidates += scored(context, prompt, ranked, best="lowest", system=system_of(record))
        except UnusableRecord as unusable:
            candidates.append(unusable.reason)
    if not candidates:
        raise UnusableRecord(Reason.NO_PREFERENCE)
    return candidates


def _branches(node: Any, path: list[Message]) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """Every turn of the user that has several replies: the turns up to it, and the replies."""
    waiting = [(node, path)]
    while waiting:
        node, path = waiting.pop()
        said = messages([{"role": node.get("role") or "prompter", "content": node.get("text")}])
        if not said:
            continue
        path = [*path, *said]
        given = node.get("replies") or []
        if not isinstance(given, list):
            raise UnusableRecord(Reason.WRONG_FIELDS)
        replies = [reply for reply in given if _published(reply)]
        if said[0]["role"] == "user" and len(replies) > 1:
            yield path, replies
        if len(path) < MAX_TREE_DEPTH:
            waiting += [(reply, path) for reply in reversed(replies)]


def _published(node: Any) -> bool:
    if not isinstance(node, dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return not node.get("deleted") and node.get("review_result") is not False
