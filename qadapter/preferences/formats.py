"""The layouts preference data come in: one table, in the order of detection, and the choice of one for a source.

The unit of counting is the *candidate pair*: what a record would give if nothing were wrong with it. A decision gives
one, n scored replies n·(n-1)/2, a DSP record one for every style other than the wanted domain. A record too broken to
tell counts as one. Every candidate comes out a pair or a `Reason`, so the two always add up to what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qadapter.preferences import pairing, parsers, presets, unpaired
from qadapter.preferences.building import Context, Record
from qadapter.preferences.presets import Looks, Parse, dialogue, each, has, texts, undecided
from qadapter.preferences.transcripts import HH, STYLES
from qadapter.preferences.turns import is_turn, is_turns

Group = Literal["judgement", "decision", "scores", "unpaired"]


@dataclass(frozen=True, slots=True)
class Format:
    """One layout.

    Attributes:
        name: as users read it.
        example: a record, shortened.
        looks_like: whether a record has this layout, by its fields and their types.
        parse: a record to its candidate pairs; see `parsers`.
        takes_domain: whether `domain` selects something in it, and must.
        group: where records fit layouts of several groups, the first group counts: a named judgement before the
            decision that a copy derived from it, a decision before the scores it was made from.
        reads: the fields it reads, and those that repeat them.
        only_texts: the replies are bare texts: any other text, list or object beside them may be what they answer.
        choose: makes the parser from the first records where users must choose something; in place of `parse`.
        takes: the choice that `choose` uses.
    """

    name: str
    example: str
    looks_like: Looks
    parse: Parse
    takes_domain: bool = False
    group: Group = "decision"
    reads: frozenset[str] = frozenset()
    only_texts: bool = False
    choose: Callable[[Sequence[Record], Context, str], Any] | None = None
    takes: str | None = None


def _never(record: Record, context: Context) -> Any:
    raise RuntimeError(f"a format that must be chosen for was not: {sorted(record)}, {context}")


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _judgement(name: str, example: str, looks_like: Looks, parse: Parse, reads: str, **more: Any) -> Format:
    return Format(name, example, looks_like, parse, group="judgement", reads=_fields(reads), **more)


def _scores(name: str, example: str, looks_like: Looks, parse: Parse, reads: str, **more: Any) -> Format:
    return Format(name, example, looks_like, parse, group="scores", reads=_fields(reads), **more)


def _texts(name: str, example: str, looks_like: Looks, parse: Parse, reads: str) -> Format:
    return Format(name, example, looks_like, parse, reads=_fields(f"{reads} chosen rejected"), only_texts=True)


def _messages(name: str, example: str, looks_like: Looks, parse: Parse, reads: str) -> Format:
    return Format(name, example, looks_like, parse, reads=_fields(reads))


def _unpaired(name: str, example: str, looks_like: Looks, split: unpaired.Split, reads: str) -> Format:
    choose = pairing.needs_pairing(split)
    more: Any = {"choose": choose, "takes": "pairing", "reads": _fields(reads)}
    return Format(name, example, looks_like, _never, group="unpaired", **more)


# ---- conditions of the layouts that differ by the types of their fields only ----


def _last_turn_has_candidates(record: Record) -> bool:
    turns = record.get("messages")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], dict) and "candidates" in turns[-1]


def _side_is_messages(value: Any) -> bool:
    return isinstance(value, dict) and "messages" in value


def _context_field(record: Record) -> str | None:
    """The field that is the context of a ranking record without `prompt`."""
    if record.get("prompt") is not None:
        return None
    return next((name for name in ("instruction", "question", "input") if isinstance(record.get(name), str)), None)


def _conversation_and_turns(record: Record) -> bool:
    context = record.get("conversations") if record.get("conversations") is not None else record.get("messages")
    return (
        record.get("prompt") is None
        and dialogue(context)
        and (all(presets.one_turn(record.get(side)) for side in ("chosen", "rejected")) or texts(record))
    )


def _is_side(value: Any) -> bool:
    return is_turn(value) or (isinstance(value, list | tuple) and is_turns(value)) or presets.dialogue(value)


def _conversational(record: Record) -> bool:
    chosen, rejected, prompt = record.get("chosen"), record.get("rejected"), record.get("prompt")
    if _conversation_and_turns(record):
        return False
    if texts(record):
        return not isinstance(prompt, str) and dialogue(prompt)
    sides = (chosen, rejected)
    if not any(_is_side(one) for one in sides) or not all(isinstance(one, str) or _is_side(one) for one in sides):
        return False
    return prompt is not None


def _conversational_implicit(record: Record) -> bool:
    sides = (record.get("chosen"), record.get("rejected"))
    return record.get("prompt") is None and all(map(_is_side, sides)) and not _conversation_and_turns(record)


def _reply_lists(record: Record) -> bool:
    sides = (record.get("chosen"), record.get("rejected"))
    return isinstance(record.get("prompt"), str) and all(
        isinstance(one, list) and bool(one) and all(isinstance(reply, str) for reply in one) for one in sides
    )


def _hh(record: Record) -> bool:
    return texts(record) and HH.fits(record["chosen"]) and HH.fits(record["rejected"])


def _transcript(record: Record) -> bool:
    if not texts(record) or _hh(record):
        return False
    prompt = record.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or prompt.strip() not in record["chosen"]):
        return False
    return any(style.fits(record["chosen"]) and style.fits(record["rejected"]) for style in STYLES) or all(
        "USER:" in record[side] and " ASSISTANT:" in record[side] for side in ("chosen", "rejected")
    )


def _plain(record: Record) -> bool:
    return texts(record) and isinstance(record.get("prompt"), str) and not _hh(record) and not _transcript(record)


def _plain_implicit(record: Record) -> bool:
    return (
        texts(record)
        and record.get("prompt") is None
        and _context_field(record) is None
        and not dialogue(record.get("messages"))
        and not dialogue(record.get("conversations"))
        and not _hh(record)
        and not _transcript(record)
    )


def _with_context(name: str) -> Looks:
    def looks_like(record: Record) -> bool:
        return texts(record) and _context_field(record) == name and not _hh(record) and not _transcript(record)

    return looks_like


# ---- the table ----

FORMATS: tuple[Format, ...] = (
    _judgement(
        "openai-preference",
        '{"input": {"messages": […]}, "preferred_output": [{"role": "assistant", …}], "non_preferred_output": […]}',
        has("preferred_output", "non_preferred_output"),
        parsers.openai_preference,
        "input preferred_output non_preferred_output",
    ),
    _judgement(
        "nova-dpo",
        '{"messages": […, {"role": "assistant", "candidates": [{"content": […], "preferenceLabel": "preferred"}, …]}]}',
        _last_turn_has_candidates,
        parsers.nova_dpo,
        "messages",
    ),
    _judgement(
        "gemini-preference",
        '{"contents": [{"role": "user", "parts": […]}], "completions": [{"score": 1, "completion": {…}}, …]}',
        lambda record: isinstance(record.get("contents"), list) and isinstance(record.get("completions"), list),
        parsers.gemini_preference,
        "contents completions system_instruction systemInstruction",
    ),
    _judgement(
        "nemo-ranked",
        '{"context": [messages], "completions": [{"rank": 0, "completion": [messages]}, …]}',
        lambda record: (
            isinstance(record.get("context"), list) and each(record.get("completions"), "rank", "completion")
        ),
        presets.nemo_ranked,
        "context completions",
    ),
    _judgement(
        "helpsteer3-preference",
        '{"context": [messages], "response1": "…", "response2": "…", "overall_preference": -2}',
        has("context", "response1", "response2", "overall_preference"),
        presets.helpsteer3,
        "context response1 response2 overall_preference",
    ),
    _judgement(
        "helpsteer2-preference",
        '{"prompt": "…", "response_1": "…", "response_2": "…", "preference_strength": 2}',
        has("prompt", "response_1", "response_2", "preference_strength"),
        presets.helpsteer2,
        "prompt response_1 response_2 preference_strength",
    ),
    _judgement(
        "pku-saferlhf",
        '{"prompt": "…", "response_0": "…", "response_1": "…", "better_response_id": 1, "safer_response_id": 0}'
        "  (needs `preferred`)",
        lambda record: (
            has("prompt", "response_0", "response_1")(record)
            and ("better_response_id" in record or "safer_response_id" in record)
        ),
        _never,
        "prompt response_0 response_1 better_response_id safer_response_id",
        choose=presets.pku_saferlhf,
        takes="preferred",
    ),
    _judgement(
        "chatbot-arena",
        '{"conversation_a": [messages], "conversation_b": [messages], "winner": "model_a"}',
        has("conversation_a", "conversation_b", "winner"),
        presets.chatbot_arena,
        "conversation_a conversation_b winner",
    ),
    _judgement(
        "arena-55k",
        '{"prompt": "[\\"…\\"]", "response_a": "[…]", "response_b": "[…]", "winner_model_a": 1, "winner_model_b": 0}',
        has("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        parsers.arena_55k,
        "prompt response_a response_b",
    ),
    _judgement(
        "shp",
        '{"history": "…", "human_ref_A": "…", "human_ref_B": "…", "labels": 1}',
        has("history", "human_ref_A", "human_ref_B", "labels"),
        presets.shp,
        "history human_ref_A human_ref_B labels",
    ),
    _judgement(
        "summarize-comparisons",
        '{"info": {"subreddit": "…", "title": "…", "post": "…"}, "summaries": [{"text": "…"}, …], "choice": 0}',
        lambda record: (
            isinstance(record.get("info"), dict) and isinstance(record.get("summaries"), list) and "choice" in record
        ),
        parsers.summarize_comparisons,
        "info summaries choice",
    ),
    _judgement(
        "webgpt",
        '{"question": {"full_text": "…"}, "answer_0": "…", "score_0": 0.5, "answer_1": "…", "score_1": -0.5}',
        has("question", "answer_0", "answer_1", "score_0", "score_1"),
        presets.webgpt,
        "question answer_0 answer_1",
    ),
    _judgement(
        "prometheus-preference",
        '{"orig_instruction": "…", "orig_response_A": "…", "orig_response_B": "…", "orig_preference": "A"}',
        has("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        presets.prometheus,
        "orig_instruction orig_response_A orig_response_B orig_preference instruction output input",
    ),
    _judgement(
        "unified-feedback",
        '{"conv_A": [messages], "conv_B": [messages], "conv_A_rating": 5.0, "conv_B_rating": 1.0}',
        has("conv_A", "conv_B", "conv_A_rating", "conv_B_rating"),
        presets.unified_feedback,
        "conv_A conv_B",
    ),
    _judgement(
        "alpaca-farm",
        '{"instruction": "…", "input": "…", "output_1": "…", "output_2": "…", "preference": 2}',
        has("instruction", "output_1", "output_2", "preference"),
        presets.alpaca_farm,
        "instruction input output_1 output_2 preference",
    ),
    _judgement(
        "stack-exchange-paired",
        '{"question": "…", "response_j": "the better one", "response_k": "the other"}',
        has("question", "response_j", "response_k"),
        presets.stack_exchange,
        "question response_j response_k",
    ),
    _judgement(
        "cvalues",
        '{"prompt": "…", "pos_resp": "…", "neg_resp": "…"}',
        has("prompt", "pos_resp", "neg_resp"),
        presets.cvalues,
        "prompt pos_resp neg_resp",
    ),
    _judgement(
        "gpt4llm-comparison",
        '{"user_input": "…", "responses_and_scores": [{"response": "…", "score": 9.0}, …]}',
        lambda record: "user_input" in record and each(record.get("responses_and_scores"), "response", "score"),
        presets.gpt4llm,
        "user_input responses_and_scores",
    ),
    _judgement(
        "oasst-tree",
        '{"message_tree_id": "…", "prompt": {"role": "prompter", "text": "…", "replies": [{"rank": 0, …}, …]}}',
        lambda record: "message_tree_id" in record and isinstance(record.get("prompt"), dict),
        parsers.oasst_tree,
        "prompt",
    ),
    _judgement(
        "dsp",
        '{"query": "…", "responses": {"academy": "…", "business": "…", "normal": "…"}}  (needs `domain`)',
        lambda record: isinstance(record.get("query"), str) and isinstance(record.get("responses"), dict),
        parsers.dsp,
        "query responses",
        takes_domain=True,
    ),
    _judgement(
        "text-score",
        '{"text": ["\\n\\nHuman: …\\n\\nAssistant: …", "…"], "score": [1.0, 0.0]}',
        lambda record: isinstance(record.get("text"), list) and "score" in record,
        parsers.text_score,
        "text score",
    ),
    _messages(
        "messages-objects",
        '{"chosen": {"messages": […]}, "rejected": {"messages": […]}}',
        lambda record: _side_is_messages(record.get("chosen")) and _side_is_messages(record.get("rejected")),
        presets.messages_objects,
        "chosen rejected",
    ),
    _messages(
        "ms-swift",
        '{"messages": [the prompt and the chosen reply], "rejected_response": "…"}',
        lambda record: (
            isinstance(record.get("messages"), list)
            and record.get("chosen") is None
            and (record.get("rejected_response") is not None or record.get("rejected_messages") is not None)
        ),
        parsers.ms_swift,
        "messages rejected_response rejected_messages",
    ),
    Format(
        "argilla-responses",
        '{"system": "…", "instruction": "…", "chosen_response": "…", "rejected_response": "…"}',
        has("instruction", "chosen_response", "rejected_response"),
        presets.argilla_responses,
        reads=_fields("instruction chosen_response rejected_response"),
    ),
    _messages(
        "sharegpt-ranking",
        '{"conversations": [{"from": "human", "value": "…"}], "chosen": {"from": "gpt", …}, "rejected": {…}}',
        _conversation_and_turns,
        presets.sharegpt_ranking,
        "conversations messages chosen rejected",
    ),
    _messages(
        "trl-conversational",
        '{"prompt": [{"role": "user", "content": "…"}], "chosen": [{"role": "assistant", …}], "rejected": […]}',
        _conversational,
        parsers.decided,
        "prompt chosen rejected",
    ),
    _messages(
        "trl-conversational-implicit",
        '{"chosen": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "rejected": […]}',
        _conversational_implicit,
        parsers.decided,
        "chosen rejected",
    ),
    _texts(
        "reply-lists",
        '{"prompt": "…", "chosen": ["…", "…"], "rejected": ["…"]}',
        _reply_lists,
        parsers.reply_lists,
        "prompt",
    ),
    _texts(
        "hh-dialogues",
        '{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "\\n\\nHuman: …\\n\\nAssistant: …"}',
        _hh,
        parsers.hh_dialogues,
        "prompt",
    ),
    _texts(
        "transcript",
        '{"chosen": "<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>", "rejected": "…"}',
        _transcript,
        parsers.hh_dialogues,
        "prompt",
    ),
    _texts("trl-plain", '{"prompt": "…", "chosen": "…", "rejected": "…"}', _plain, parsers.plain, "prompt response"),
    _texts(
        "alpaca-ranking",
        '{"instruction": "…", "input": "…", "history": [["…", "…"]], "chosen": "…", "rejected": "…"}',
        _with_context("instruction"),
        presets.alpaca_ranking,
        "instruction input history",
    ),
    _texts(
        "orca",
        '{"system": "…", "question": "…", "chosen": "…", "rejected": "…"}',
        _with_context("question"),
        presets.orca,
        "question",
    ),
    _texts(
        "icr",
        '{"system": "…", "input": "…", "chosen": "…", "rejected": "…"}',
        _with_context("input"),
        presets.icr,
        "input",
    ),
    _texts(
        "trl-plain-implicit",
        '{"chosen": "prompt reply", "rejected": "prompt other reply"}',
        _plain_implicit,
        parsers.plain_implicit,
        "",
    ),
    _scores(
        "ultrafeedback-raw",
        '{"instruction": "…", "completions": [{"response": "…", "fine-grained_score": 5.0, …}, …]}  (needs `score`)',
        lambda record: "instruction" in record and undecided(record) and each(record.get("completions"), "response"),
        _never,
        "instruction completions",
        choose=presets.ultrafeedback_raw,
        takes="score",
    ),
    _scores(
        "nectar",
        '{"prompt": "…", "answers": [{"answer": "…", "rank": 1.0}, …]}',
        lambda record: "prompt" in record and undecided(record) and each(record.get("answers"), "answer", "rank"),
        presets.nectar,
        "prompt answers",
    ),
    _scores(
        "distilabel-generations",
        '{"instruction": "…", "generations": ["…", "…"], "ratings": [1, 5]}',
        lambda record: (
            undecided(record)
            and isinstance(record.get("generations"), list)
            and isinstance(record.get("ratings"), list)
            and (record.get("instruction") is not None or record.get("messages") is not None)
        ),
        presets.distilabel_generations,
        "instruction messages generations ratings",
    ),
    _unpaired(
        "kto",
        '{"prompt": "…", "completion": "…", "label": true}  (needs `pairing`)',
        has("prompt", "completion", "label"),
        unpaired.kto,
        "prompt completion label",
    ),
    _unpaired(
        "kto-messages",
        '{"messages": [the prompt and one reply], "label": true}  (needs `pairing`)',
        lambda record: (
            ("label" in record or "kto_tag" in record)
            and (isinstance(record.get("messages"), list) or isinstance(record.get("conversations"), list))
            and undecided(record)
            and "rejected_response" not in record
        ),
        unpaired.labelled_dialogue,
        "messages conversations label kto_tag",
    ),
    _unpaired(
        "kto-instruction",
        '{"instruction": "…", "input": "…", "output": "…", "kto_tag": true}  (needs `pairing`)',
        has("instruction", "output", "kto_tag"),
        unpaired.tagged_instruction,
        "instruction input history output kto_tag",
    ),
    _unpaired(
        "beavertails",
        '{"prompt": "…", "response": "…", "is_safe": true}  (needs `pairing`)',
        has("prompt", "response", "is_safe"),
        unpaired.beavertails,
        "prompt response is_safe",
    ),
)

GROUPS: tuple[Group, ...] = ("judgement", "decision", "scores", "unpaired")
BY_NAME = {row.name: row for row in FORMATS}
