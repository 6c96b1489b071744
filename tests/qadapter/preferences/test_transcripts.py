"""Conversations written out as text: each style, what is not torn, and prompts that begin two texts."""

from __future__ import annotations

from typing import Any

import pytest

from qadapter.preferences.beginnings import prompt_end, shared_beginning
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def written(style: str, turns: list[tuple[str, str]]) -> str:
    """A conversation in a style, as its templates write it."""
    if style in ("hh", "dsp", "hash", "user-assistant", "prompter"):
        mark = {
            "hh": "\n\n{}: ",
            "dsp": "\n\n## {}:\n",
            "hash": "\n### {}: ",
            "user-assistant": "\n\n{}: ",
            "prompter": "\n\n{}: ",
        }[style]
        names = {"u": "Human", "a": "Assistant"}
        names |= {"user-assistant": {"u": "User"}, "prompter": {"u": "prompter", "a": "assistant"}}.get(style, {})
        text = "".join(mark.format(names[who]) + words for who, words in turns)
        return text if style == "hh" else text.lstrip("\n")
    if style == "llama2":
        text, system = "", ""
        for who, words in turns:
            if who == "s":
                system = f"<<SYS>>\n{words}\n<</SYS>>\n\n"
            elif who == "u":
                text += f"<s>[INST] {system}{words} [/INST]"
                system = ""
            else:
                text += f" {words} </s>"
        return text
    if style == "alpaca":
        heads = {"u": "### Instruction:\n", "a": "### Response:\n"}
        start = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        )
        return "\n\n".join([start, *(heads[who] + words for who, words in turns)])
    if style == "vicuna":
        forms = {"s": "{} ", "u": "USER: {} ", "a": "ASSISTANT: {}</s>"}
        return "".join(forms[who].format(words) for who, words in turns)
    opening, closing = {
        "chatml": ("<|im_start|>{}\n", "<|im_end|>\n"),
        "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        "gemma": ("<start_of_turn>{}\n", "<end_of_turn>\n"),
        "zephyr": ("<|{}|>\n", "</s>\n"),
    }[style]
    names = {**ROLES, **({"a": "model"} if style == "gemma" else {})}
    return "".join(opening.format(names[who]) + words + closing for who, words in turns)


STYLES = "hh dsp hash chatml llama2 llama3 gemma zephyr alpaca vicuna user-assistant prompter".split()
WITH_SYSTEM = {"chatml", "llama2", "llama3", "zephyr", "vicuna"}


@pytest.mark.parametrize("style", STYLES)
def test_each_style_becomes_messages(style: str) -> None:
    """Three dialogues of one to three rounds; replies hold marks of another style, which tear nothing."""
    quoted = "### Instruction: no" if style != "alpaca" else "<|im_start|>user no"
    dialogues = [
        [("u", "Hi"), ("a", f"Hello.\n{quoted}"), ("u", "Why?")],
        [("u", "Why?")],
        [("u", "A"), ("a", "B"), ("u", "C"), ("a", "D"), ("u", "Why?\n\nReally?")],
    ]
    if style in WITH_SYSTEM:
        dialogues = [[("s", "Be kind."), *turns] for turns in dialogues]
    records = [
        {"chosen": written(style, [*turns, ("a", "Because [1].")]), "rejected": written(style, [*turns, ("a", "No.")])}
        for turns in dialogues
    ]
    reader = recognise(records)
    name = "user-assistant" if style == "prompter" else style
    assert reader.name == ("hh-dialogues" if style == "hh" else f"transcript:{name}")
    for record, turns in zip(records, dialogues, strict=True):
        prompt = tuple({"role": ROLES[who], "content": words} for who, words in turns)
        assert reader.read(record) == [PreferencePair(prompt, "Because [1].", "No.")]  # type: ignore[arg-type]


@pytest.mark.parametrize("style", [style for style in STYLES if style != "vicuna"])
def test_a_prompt_that_waits_for_its_reply_becomes_messages(style: str) -> None:
    turns = [("u", "Hi"), ("a", "Hello."), ("u", "Why?")]
    whole = written(style, [*turns, ("a", "REPLY")])
    record = {"prompt": whole[: whole.index("REPLY")], "chosen": "Because.", "rejected": "No."}
    reader = recognise([record])
    assert reader.name == "trl-plain"
    prompt = tuple({"role": ROLES[who], "content": words} for who, words in turns)
    assert reader.read(record) == [PreferencePair(prompt, "Because.", "No.")]  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES)
def test_marks_inside_a_reply_tear_nothing(style: str) -> None:
    reply = written(style, [("u", "Hi"), ("a", "Hello.")]).strip()
    record = {"prompt": "How do I write a dialogue?", "chosen": f"So:\n\n{reply} end", "rejected": "No."}
    (pair,) = recognise([record]).read(record)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == record["chosen"].strip()
    assert [turn["content"] for turn in pair.prompt] == ["How do I write a dialogue?"]


def test_a_style_that_is_not_known_is_never_taken_for_text() -> None:
    """The second record's marks are in another order: no style fits all, and marks are no prompt."""
    odd = {
        "chosen": "Bot: x\n\nUser: Why?\n\nAssistant: Because.",
        "rejected": "Bot: x\n\nUser: Why?\n\nAssistant: No.",
    }
    assert recognise([odd]).read(odd) == [Reason.NOT_A_DIALOGUE]


# Further spellings of the styles: what stands before the reply, and what closes it.
SPELLINGS = {
    "Mistral": (" [INST] Hi [/INST] Hello</s> [INST] Why? [/INST] ", "</s>"),
    "Guanaco": ("### Human: Hi### Assistant: Hello### Human: Why?### Assistant: ", ""),
    "Solar": ("### User:\nHi\n\n### Assistant:\nHello\n\n### User:\nWhy?\n\n### Assistant:\n", ""),
    "Phi-3": ("<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n", "<|end|>"),
    "OpenAssistant": (
        "<|prompter|>Hi<|endoftext|><|assistant|>Hello<|endoftext|><|prompter|>Why?<|endoftext|><|assistant|>",
        "<|endoftext|>",
    ),
    "AI": ("Human: Hi\nAI: Hello\nHuman: Why?\nAI: ", ""),
    "capitals": ("HUMAN: Hi\n\nASSISTANT: Hello\n\nHUMAN: Why?\n\nASSISTANT: ", ""),
    "USER by lines": ("USER: Hi\nASSISTANT: Hello\nUSER: Why?\nASSISTANT: ", ""),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_the_styles(name: str) -> None:
    """As replies that hold the prompt, as a prompt that waits, and with both."""
    start, end = SPELLINGS[name]
    whole = {"chosen": f"{start}Because.{end}", "rejected": f"{start}No.{end}"}
    prompt = tuple(
        {"role": role, "content": words} for role, words in (("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
    )
    for record in (whole, {"prompt": start, "chosen": "Because.", "rejected": "No."}, {"prompt": start, **whole}):
        assert recognise([record]).read(record) == [PreferencePair(prompt, "Because.", "No.")]  # type: ignore[arg-type]


def test_an_unknown_style_is_quarantined_and_quoted_marks_are_text() -> None:
    """A prompt that begins and ends with marks is a transcript; one that begins with other words is text."""
    odd = {"prompt": "user : Why?\n\nbot : ok\nAI: ", "chosen": "Because.", "rejected": "No."}
    assert recognise([odd]).read(odd) == [Reason.NOT_A_DIALOGUE]
    for words in ("Go on:\nUser: Hi\nAssistant:", "User: I need an assistant", "Question: Why?\n\nAnswer:"):
        (pair,) = recognise([{**odd, "prompt": words}]).read({**odd, "prompt": words})
        assert isinstance(pair, PreferencePair)
        assert [turn["content"] for turn in pair.prompt] == [words]


def test_replies_that_repeat_their_prompt() -> None:
    """All replies begin with their prompt: it is cut. A reply that only begins alike is whole."""
    prompt = "Question: Why is the sea salty?"
    rows = [{"prompt": prompt, "chosen": f"{prompt} Because.", "rejected": f"{prompt} No."}] * 2
    reader = recognise(rows)
    assert reader.read(rows[0]) == [PreferencePair(({"role": "user", "content": prompt},), "Because.", "No.")]
    assert reader.read({**rows[0], "rejected": "No."}) == [Reason.WRONG_FIELDS]
    greeting = {"prompt": "Hello", "chosen": "Hello you.", "rejected": "Hello."}
    (pair,) = recognise([greeting]).read(greeting)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == "Hello you."


# ---- prompts inside -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("The sky is blue", "The sky is black", ("The sky is", "blue", "black")),
        ("red 0?Yes.", "red 0?No", ("red 0?", "Yes.", "No")),
        ("2+2=4", "2+2=5", Reason.DIFFERENT_PROMPTS),
        ("It costs 3.5", "It costs 3.6", ("It costs", "3.5", "3.6")),
        ("天空是什么颜色？蓝色。", "天空是什么颜色？绿色。", ("天空是什么颜色？", "蓝色。", "绿色。")),
        ("天空是蓝色", "天空是绿色", ("天空是", "蓝色", "绿色")),
        # the replies begin alike: where the prompt ends is a guess
        ("天空是什么颜色？天空是蓝色", "天空是什么颜色？天空是绿色", Reason.UNCLEAR_PROMPT),
        ("How many legs? A spider has eight", "How many legs? A spider has six", Reason.UNCLEAR_PROMPT),
        ("空の色は？青です", "空の色は？緑です", ("空の色は？", "青です", "緑です")),
        ("ท้องฟ้าสีอะไร? สีฟ้า", "ท้องฟ้าสีอะไร? เขียว", ("ท้องฟ้าสีอะไร?", "สีฟ้า", "เขียว")),
        ("เขากินข้าว", "เขากินเนื้อ", ("เขากิน", "ข้าว", "เนื้อ")),
        ("Q: why?\nA: so", "Q: why?\nA: no", ("Q: why?\nA:", "so", "no")),
        ("하늘은 파란색", "하늘은 파랑", ("하늘은", "파란색", "파랑")),
    ],
)
def test_where_an_implicit_prompt_ends(first: str, second: str, expected: Any) -> None:
    record = {"chosen": first, "rejected": second}
    (found,) = recognise([record]).read(record)
    if isinstance(found, PreferencePair):
        assert (found.prompt[0]["content"], found.chosen, found.rejected) == expected
    else:
        assert found is expected


def test_no_character_is_torn() -> None:
    """The vowel sign belongs to the consonant before it: กา and กิ share no whole character behind the prompt."""
    end, _ = prompt_end("เขา กิน", "เขา กา")
    assert "เขา กิน"[:end].strip() == "เขา"


@pytest.mark.parametrize(
    ("first", "second", "common"), [("abc", "abd", 2), ("", "a", 0), ("ab", "ab", 2), ([1, 2], [1], 1)]
)
def test_shared_beginning(first: Any, second: Any, common: int) -> None:
    assert shared_beginning(first, second) == common
