"""Templates and tokenizers made up by hypothesis: a conversation is asked as it is trained, or refused with a reason.

Bounded in time, the same ones each time. For a longer run:
QADAPTER_FUZZ=20000 python -m pytest tests/qadapter/preferences/test_fuzz_templates.py -s
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qadapter.errors import QAdapterError
from qadapter.inference.generate import reply_text, why_not
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.render import end_ids, turn_end
from qadapter.preferences.template_settings import configured
from qadapter.preferences.tokenize import UnusablePair, encode_pair, limit_ids, padding_id, prompt_ids
from tests.support import templates

EXAMPLES = int(os.environ.get("QADAPTER_FUZZ", "250"))
SEEN: Counter[str] = Counter()
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|/user|>", "<|end|>"]
MERGES = [("t", "h"), ("th", "e"), (":", "Ġ"), ("a", "b"), ("Ċ", "Ċ"), (">", "Ċ"), ("Ġ", "a"), (".", "b")]

# ---- templates: a loop over turns put together from parts, some of which make no sense

HEADER = st.sampled_from(
    ["<|{r}|>", "<|{r}|>\\n", "### {r}:\\n", "{r}: ", "[{r}]", "", "<bos><|{r}|>", "\\n\\n{r}:", "<|user|>"]
)
BODY = st.sampled_from(
    [
        *["m['content']"] * 12,
        "m['content'] | trim",
        "m.content",
        "m['content'].split('</think>')[-1].lstrip('\\n')",
        "m['content'] | upper",
        "m['content'][:5]",
        "m['content'] + m['content']",
        "m['contents']",
        "m['content'] + 1",
        "(m['content'] if not loop.last else 'x')",
        "m['content'] | tojson",
        "''",
    ]
)
END = st.sampled_from(["<eos>", "<|end|>", "<|end|>\\n", "", "\\n\\n", "<|/user|>", "##END##", "<eos><eos>", " </s>"])
OPENING = st.sampled_from(
    [
        "",
        "<|assistant|>",
        "<|assistant|>\\n",
        "<|assistant|><think>\\n",
        "<think>\\n\\n</think>\\n\\n",
        "[bot]",
        " ",
    ]
)
EXTRA = st.sampled_from(
    [
        *[""] * 16,
        "{{ bos_token }}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{{ raise_exception('never') }}",
        "{% for t in tools %}{{ t.name }}{% endfor %}",
        "{{ tools[0].name }}",
        "{{ strftime_now('%Y') }}",
        "{% set messages = messages[1:] %}",
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{% endfor %}",
        "{{ messages | length }}",
        "{% if enable_thinking is defined and not enable_thinking %}{{ '/no' }}{% endif %}",
    ]
)


@st.composite
def made_up(draw: st.DrawFn) -> str:
    """A template of parts; each role its own end."""
    header, body, first = draw(HEADER), draw(BODY), draw(EXTRA)
    ends = {role: draw(END) for role in ("system", "user", "assistant")}
    parts = [first, "{% for m in messages %}"]
    parts.append("{{ '" + header.replace("{r}", "' + m['role'] + '") + "' }}{{ " + body + " }}")
    parts += [f"{{% if m['role'] == '{role}' %}}{{{{ '{end}' }}}}{{% endif %}}" for role, end in ends.items()]
    parts += [
        "{% endfor %}",
        "{% if " + draw(st.sampled_from([*["add_generation_prompt"] * 4, "true", "false"])) + " %}",
    ]
    return "".join([*parts, "{{ '", draw(OPENING), "' }}{% endif %}"])


TEMPLATE = st.one_of(
    st.none(),
    st.sampled_from(list(templates.ALL.values())),
    made_up(),
    st.fixed_dictionaries({"default": made_up()}, optional={"tool_use": made_up()}),
    st.fixed_dictionaries({"tool_use": made_up()}),
)

# ---- tokenizers


@st.composite
def tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across borders, or words; with and without ends, padding and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [merge for merge in MERGES if draw(st.booleans())]
    merges = [merge for merge in merges if merge[0] != "th" or ("t", "h") in merges]
    tokens = [*SPECIAL, *alphabet, *("".join(merge) for merge in merges)]
    inner = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()), use_regex=draw(st.booleans()))
    inner.decoder = decoders.ByteLevel()
    if draw(st.integers(0, 9)) == 0:
        inner.normalizer = draw(st.sampled_from([normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip()]))
    around = draw(st.sampled_from(["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"]))
    inner.post_processor = TemplateProcessing(single=around, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    named: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    for name in list(named):
        if draw(st.integers(0, 3)) == 0:
            del named[name]
    if draw(st.booleans()) and "eos_token" in named:
        named["pad_token"] = "<eos>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=SPECIAL[3:],
        padding_side=draw(st.sampled_from(["left", "right"])),
        truncation_side=draw(st.sampled_from(["left", "right"])),
        model_max_length=draw(st.sampled_from([4, 10**30])),
        **named,
    )
    if draw(st.integers(0, 4)) == 0:
        made.add_tokens(["ab.", "the end"])
        if draw(st.integers(0, 3)) == 0:
            limit_ids(made, len(tokens))
    made.chat_template = draw(TEMPLATE)
    return made


TEXT = st.one_of(
    st.text(alphabet="ab th:.\n<>/|ß😀\u0301\u202e\x00\ud800", max_size=14),
    st.sampled_from(["<|end|>", "<eos>", "the end", "<think>\na\n</think>\n\nb", "</think>", "ab.", "{{ x }}", " "]),
)
TURN = st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT)


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="QADAPTER_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(
    tokenizer=tokenizers(),
    turns=st.lists(TURN, min_size=1, max_size=4),
    replies=st.one_of(st.just(("Yes.", "No.")), st.tuples(TEXT, TEXT)),
    thinking=st.sampled_from([*[None] * 8, False, True]),
    thoughts=st.sampled_from([None, "leave-out"]),
    length=st.sampled_from([2, 9, 4096, 4096, 4096]),
)
def test_any_template_and_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    replies: tuple[str, str],
    thinking: bool | None,
    thoughts: Any,
    length: int,
) -> None:
    messages: Any = [{"role": role, "content": text} for role, text in turns]
    try:
        tokenizer = configured(tokenizer, thinking=thinking, thoughts=thoughts)
    except QAdapterError:
        SEEN["settings refused"] += 1
        return
    end, ends = turn_end(tokenizer), end_ids(tokenizer)
    reason = why_not(tokenizer, messages)
    try:
        encoded = encode_pair(PreferencePair(tuple(messages), *replies), tokenizer, length)
    except UnusablePair as error:
        SEEN["refused" if str(error) else "refused without a reason"] += 1
        return
    SEEN["encoded"] += 1
    assert reason is None
    # the prompt that training scores from is the one that generation starts from, less what max_length cuts
    asked = prompt_ids(tokenizer, messages)
    assert asked[-len(encoded.prompt_ids) :] == encoded.prompt_ids
    assert (encoded.lost_prompt > 0) == (len(asked) > len(encoded.prompt_ids))
    assert len(encoded.prompt_ids) + max(len(encoded.chosen_ids), len(encoded.rejected_ids)) <= length
    assert encoded.chosen_ids != encoded.rejected_ids
    assert padding_id(tokenizer) >= 0
    if not encoded.lost_reply:
        for ids in (encoded.chosen_ids, encoded.rejected_ids):
            if end.token is not None:
                assert ids[-1] == end.token
                assert ids[-1] in ends
            assert isinstance(reply_text(tokenizer, ids, ends), str)


@pytest.mark.slow
def test_the_fuzz_reached_both_sides() -> None:
    """Else the test above shows nothing: a good part was encoded, a good part refused."""
    print(dict(SEEN))
    assert SEEN["encoded"] > 0.1 * EXAMPLES
    assert SEEN["refused"] > 0.1 * EXAMPLES
    assert SEEN["refused without a reason"] == 0
