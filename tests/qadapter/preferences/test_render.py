"""One rendering: what training scores a reply behind is what generation starts from, for templates of any shape."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from qadapter.errors import QAdapterError
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.render import RenderError, TurnEnd, end_ids, prompt_text, rendered, turn_end
from qadapter.preferences.template_settings import configured
from qadapter.preferences.tokenize import UnusablePair, encode_pair, encode_reply, encode_texts, prompt_ids
from tests.support import templates
from tests.support.templates import with_template

ASK: list[Message] = [{"role": "user", "content": "Name a fruit."}]
BRIEF: list[Message] = [{"role": "system", "content": "Be brief."}, *ASK]
THOUGHT = "<think>\nA fruit.\n</think>\n\nPear."


@pytest.mark.parametrize(
    ("template", "messages", "prompt", "reply"),
    [
        (templates.SYSTEM_BEFORE_LAST, BRIEF, "<bos><|user|>Be brief. Name a fruit.<|/user|>", "Pear.<eos>"),
        (
            templates.THINKING,
            ASK,
            "<bos><|user|>\nName a fruit.<|end|>\n<|assistant|>\n",
            "<think>\n\n</think>\n\nPear.<|end|>",
        ),
        (templates.OTHER_END, ASK, "<bos><|user|>Name a fruit.<|end|>\n<|assistant|>", "Pear.<|end|>"),
        (templates.LAST_OPEN, ASK, "<bos><|user|>Name a fruit.<|end|><|assistant|>", "Pear.<|end|>"),
        (templates.CHANNELS, ASK, "<bos><|user|>Name a fruit.<|end|><|assistant|>", "final:Pear.<|end|>"),
        (templates.HEADINGS, ASK, "### user\nName a fruit.\n\n### assistant\n", "Pear.<eos>"),
        (None, ASK, "\n\nHuman: Name a fruit.\n\nAssistant:", " Pear.<eos>"),
    ],
)
def test_a_reply_behind_the_generation_prompt(template, messages, prompt, reply):
    tokenizer = with_template(template)
    assert rendered(tokenizer, messages, "Pear.") == (prompt, reply)
    encoded = encode_pair(PreferencePair(tuple(messages), "Pear.", "Car."), tokenizer, 512)
    assert encoded.prompt_ids == prompt_ids(tokenizer, messages)
    assert tokenizer.decode(encoded.prompt_ids) == prompt
    assert tokenizer.decode(encoded.chosen_ids) == reply
    assert tokenizer.decode(encoded.rejected_ids) == reply.replace("Pear", "Car")


def test_a_thought_continues_the_one_that_the_prompt_opens():
    tokenizer = with_template(templates.OPENS_THOUGHT)
    prompt = "<bos><|user|>Name a fruit.<eos><|assistant|><think>\n"
    assert rendered(tokenizer, ASK, THOUGHT) == (prompt, "A fruit.\n</think>\n\nPear.<eos>")
    assert rendered(tokenizer, ASK, THOUGHT.removeprefix("<think>\n"))[1] == "A fruit.\n</think>\n\nPear.<eos>"
    with pytest.raises(RenderError, match=r"opens a thought .* and the reply has none: set `thinking: false`"):
        rendered(tokenizer, ASK, "Pear.")
    pair = PreferencePair(tuple(ASK), THOUGHT, THOUGHT.replace("A fruit", "Red"))
    encoded = encode_pair(pair, tokenizer, 512)  # they differ in the thought only, and are not the same tokens
    assert tokenizer.decode(encoded.rejected_ids) == "Red.\n</think>\n\nPear.<eos>"


def test_a_thought_that_the_template_drops_is_scored():
    tokenizer = with_template(templates.DROPS_THOUGHTS)
    assert rendered(tokenizer, ASK, THOUGHT) == ("<bos><|user|>Name a fruit.<eos><|assistant|>", THOUGHT + "<eos>")


@pytest.mark.parametrize("template", [templates.OPENS_THOUGHT, templates.THINKING])
def test_thinking_off_closes_the_thought_everywhere(template: str):
    given = with_template(template)
    off = configured(given, thinking=False)
    end = turn_end(off).text
    prompt, reply = rendered(off, ASK, "Pear.")
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert reply == "Pear." + end
    with pytest.raises(RenderError, match=r"thinking is off.* set `thoughts: leave-out`"):
        rendered(off, ASK, THOUGHT)
    left_out = configured(off, thoughts="leave-out")
    assert rendered(left_out, ASK, THOUGHT) == (prompt, reply)
    # A request can still turn it on, and the tokenizer that was given is as it was.
    assert prompt_text(off, ASK, enable_thinking=True) == prompt_text(given, ASK) != prompt
    assert given.chat_template == template


def test_thinking_said_twice_is_one_thing():
    given = with_template(templates.THINKING)
    off = configured(given, thinking=False, template={"enable_thinking": False})
    assert prompt_text(off, ASK) == prompt_text(configured(given, thinking=False), ASK)
    with pytest.raises(QAdapterError, match=r"thinking is turned on, but enable_thinking .* False; give one"):
        configured(given, thinking=True, template={"enable_thinking": False})
    with pytest.raises(QAdapterError, match=r"thinking is turned off, but enable_thinking .* is True"):
        configured(given, thinking=False, template={"enable_thinking": True})


def test_settings_are_saved_with_the_tokenizer(tmp_path):
    tokenizer = configured(with_template(templates.THINKING), thinking=False, thoughts="leave-out")
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert rendered(again, ASK, THOUGHT) == rendered(tokenizer, ASK, THOUGHT)
    assert rendered(again, ASK, THOUGHT)[1] == "Pear.<|end|>"


def test_template_variables_have_an_effect_or_are_refused():
    dated = "{{ today or 'no day' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = with_template(dated)
    values = {"today": 'Mönday "1"\n😀'}
    assert prompt_text(configured(tokenizer, template=values), ASK) == values["today"] + "Name a fruit."
    for value, shown in ((None, "no day"), (True, "True"), ([1, {"a": None}], "[1, {'a': None}]")):
        assert prompt_text(configured(tokenizer, template={"today": value}), ASK).startswith(shown)
    assert prompt_text(configured(tokenizer, template=values), ASK, today="Sunday").startswith("Sunday")
    for wrong in ({"todya": 1}, {"messages": []}, {"today": float("nan")}, {"today": {1, 2}}):
        with pytest.raises(QAdapterError, match="chat_template_kwargs"):
            configured(tokenizer, template=wrong)
    with pytest.raises(QAdapterError, match="no switch"):
        configured(tokenizer, thinking=True)
    assert configured(tokenizer) is tokenizer
    assert prompt_text(configured(tokenizer, thinking=False), ASK) == prompt_text(tokenizer, ASK)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (templates.NO_SYSTEM, BRIEF, "the chat template refuses these messages: System role not supported"),
        (templates.BROKEN, ASK, "the chat template refuses these messages: 'dict object' has no attribute 'name'"),
        (templates.SHOUTS, ASK, "the chat template rewrites or drops what the assistant says"),
        (templates.OTHER_END, [{"role": "user", "content": "a\ud800"}], "half a surrogate pair"),
        (None, [{"role": "user", "content": "a\ud800"}], "half a surrogate pair"),
    ],
)
def test_what_has_no_rendering_is_unusable_with_the_reason(template, messages, reason):
    tokenizer = with_template(template)
    with pytest.raises(UnusablePair, match=reason):
        encode_pair(PreferencePair(tuple(messages), "Pear.", "Car."), tokenizer, 512)
    with pytest.raises(UnusablePair, match=reason):
        encode_reply(messages, "Pear.", tokenizer, 512)
    with pytest.raises(UnusablePair, match="half a surrogate"):
        encode_pair(PreferencePair(tuple(ASK), "Pear.\udc00", "Car."), with_template(templates.OTHER_END), 512)


def test_ends_of_turns():
    ends = {name: turn_end(with_template(text)).text for name, text in templates.ALL.items()}
    other = ("THINKING", "OTHER_END", "LAST_OPEN", "CHANNELS")
    assert ends == {name: "<|end|>" if name in other else "<eos>" for name in templates.ALL}
    assert turn_end(with_template(None)) == TurnEnd("<eos>", 2)
    words = with_template("{% for m in messages %}{{ m['content'] + '##END##' }}{% endfor %}")
    assert turn_end(words) == TurnEnd("##END##", None)
    assert rendered(words, ASK, "Pear.")[1] == "Pear.##END##"
    tokenizer = with_template(templates.OTHER_END)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_ids(tokenizer, None) == [2, end]
    assert end_ids(tokenizer, [7, 2], 9) == [2, 7, 9, end]
    tokenizer.chat_template = templates.NO_SYSTEM  # what was found is that template's, not the tokenizer's
    assert end_ids(tokenizer) == [2]


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt():
    tokenizer = with_template(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("x")["input_ids"][-1] == 2
    encoded = encode_texts("2+2=", "4", "5", tokenizer, 64)
    assert tokenizer.decode(encoded.prompt_ids) == "<bos>2+2="
    assert [tokenizer.decode(ids) for ids in (encoded.chosen_ids, encoded.rejected_ids)] == ["4<eos>", "5<eos>"]
    asked = encode_pair(PreferencePair(tuple(ASK), "Pear.", "Car."), tokenizer, 512)
    assert asked.prompt_ids == prompt_ids(tokenizer, ASK)
    assert tokenizer.decode(asked.prompt_ids).endswith("Assistant:")


TEXT = st.text(alphabet="ab .\nß😀<>/|thinkuser\ud800", max_size=16)
ROLE = st.sampled_from(["system", "user", "assistant"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([*templates.ALL, "none"]),
    turns=st.lists(st.tuples(ROLE, TEXT), min_size=1, max_size=4),
    replies=st.tuples(TEXT, TEXT),
    thinking=st.sampled_from([None, False]),
)
def test_any_conversation_is_asked_as_it_is_trained_or_refused(name, turns, replies, thinking):
    tokenizer = configured(with_template(templates.ALL.get(name)), thinking=thinking)
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        encoded = encode_pair(PreferencePair(tuple(messages), *replies), tokenizer, 4096)
    except UnusablePair:
        return
    assert encoded.prompt_ids == prompt_ids(tokenizer, messages)
    for ids, reply in ((encoded.chosen_ids, replies[0]), (encoded.rejected_ids, replies[1])):
        text = tokenizer.decode(ids)
        assert text.endswith(turn_end(tokenizer).text)
        assert reply.strip() in text or "think" in reply
