"""Tokens of a pair: the same as TRL's, the border between prompt and reply, truncation, the padded batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.render import plain_prompt
from qadapter.preferences.tokenize import (
    EncodedPair,
    UnusablePair,
    beside_replies,
    collate_pairs,
    encode_pair,
    encode_texts,
    padding_id,
)
from tests.support.tiny_chat import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pair(question: str = "Why?", chosen: str = "Because.", rejected: str = "No.") -> PreferencePair:
    return PreferencePair(({"role": "user", "content": question},), chosen, rejected)


def without_template() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_the_generation_prompt_ends_the_prompt():
    encoded = encode_pair(pair(), TOKENIZER, 512)
    assert TOKENIZER.decode(encoded.prompt_ids) == "<bos><|user|>Why?<eos><|assistant|>"
    assert TOKENIZER.decode(encoded.chosen_ids) == "Because.<eos>"
    assert TOKENIZER.decode(encoded.rejected_ids) == "No.<eos>"


@pytest.mark.parametrize("conversational", [True, False])
def test_same_tokens_as_trl(conversational: bool):
    """TRL's own preparation, run on the same rows; it needs nothing of the trainer but the tokenizer."""
    from datasets import Dataset

    pairs = [pair("Wie geht's?", "Gut, danke", "Schlecht"), pair("a\nb", "ü", "x y")]
    if conversational:
        rows = [p.to_trl() for p in pairs]
        ours = [encode_pair(p, TOKENIZER, 512) for p in pairs]
    else:
        rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
        ours = [encode_texts(r["prompt"], r["chosen"], r["rejected"], TOKENIZER, 512) for r in rows]
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = TOKENIZER
    args = DPOConfig(output_dir="unused", max_length=512, report_to="none", use_cpu=True, bf16=False)
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), TOKENIZER, args, "train")
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.prompt_ids, mine.chosen_ids, mine.rejected_ids) == (
            other["prompt_ids"],
            other["chosen_ids"],
            other["rejected_ids"],
        )


class MergingTokenizer:
    """Characters, except that "ab" is one token: prompt and reply tokenised together part inside it."""

    chat_template = None
    eos_token, eos_token_id = "$", ord("$")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids, i = [], 0
        while i < len(text):
            step = 2 if text[i : i + 2] == "ab" else 1
            ids.append(1000 if step == 2 else ord(text[i]))
            i += step
        return {"input_ids": ids}

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join("ab" if token == 1000 else chr(token) for token in ids)


def test_a_token_never_merges_across_the_prompts_end():
    """Generation starts from the prompt's own tokens, so that training does too."""
    encoded = encode_texts("xa", "b!", "c", MergingTokenizer(), 16)  # type: ignore[arg-type]
    assert encoded == EncodedPair([ord("x"), ord("a")], [ord("b"), ord("!"), ord("$")], [ord("c"), ord("$")])


def test_without_chat_template_the_conversation_is_a_transcript():
    conversation = PreferencePair(
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
        ),
        "Because.",
        "No.",
    )
    encoded = encode_pair(conversation, without_template(), 512)
    assert TOKENIZER.decode(encoded.prompt_ids) == (
        "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    )
    assert TOKENIZER.decode(encoded.prompt_ids) == plain_prompt(conversation.prompt)
    assert TOKENIZER.decode(encoded.chosen_ids) == " Because.<eos>"


def test_a_reply_that_ends_itself_gets_no_second_end():
    encoded = encode_texts("x", "y<eos>", "z", TOKENIZER, 16)
    assert encoded.chosen_ids == TOKENIZER("y<eos>")["input_ids"]
    assert encoded.rejected_ids == TOKENIZER("z<eos>")["input_ids"]


def test_truncation_cuts_the_prompt_alike_for_both_replies():
    whole = encode_pair(pair("0123456789"), TOKENIZER, 512)
    cut = encode_pair(pair("0123456789"), TOKENIZER, 16)
    assert len(whole.chosen_ids) == 9
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
    assert cut.prompt_ids == whole.prompt_ids[-7:]
    assert TOKENIZER.decode(cut.prompt_ids) == "56789<eos><|assistant|>"


def test_a_reply_longer_than_everything_is_cut_from_the_right():
    cut = encode_pair(pair("0123", "abcdefghij", "k"), TOKENIZER, 6)
    assert TOKENIZER.decode(cut.prompt_ids) == "<|assistant|>"
    assert TOKENIZER.decode(cut.chosen_ids) == "abcde"
    assert TOKENIZER.decode(cut.rejected_ids) == "k<eos>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "max_length", "reason"),
    [
        ("", "no", 64, "chosen reply is empty"),
        ("yes", " \n", 64, "rejected reply is empty"),
        ("same", "same", 64, "same tokens"),
        ("abcdefX", "abcdefY", 5, "same tokens"),
    ],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, without_template()], ids=["template", "plain"])
def test_unusable_pairs_say_why(chosen, rejected, max_length, reason, tokenizer):
    with pytest.raises(UnusablePair, match=reason):
        encode_pair(pair("q", chosen, rejected), tokenizer, max_length)


def test_an_empty_prompt_is_unusable_and_a_bad_length_an_error():
    with pytest.raises(UnusablePair, match="no prompt token"):
        encode_texts("", "yes", "no", TOKENIZER, 16)
    with pytest.raises(ValueError, match="at least 2"):
        encode_texts("q", "yes", "no", TOKENIZER, 1)


TEXT = st.text(alphabet="ab \nüß😀", max_size=12)


@settings(max_examples=200, deadline=None)
@given(question=TEXT, chosen=TEXT, rejected=TEXT, max_length=st.integers(2, 24))
def test_every_pair_is_refused_or_fits_with_all_three_parts(question, chosen, rejected, max_length):
    try:
        encoded = encode_pair(pair(question, chosen, rejected), TOKENIZER, max_length)
    except UnusablePair:
        assert (
            not chosen.strip()
            or not rejected.strip()
            or chosen.encode()[: max_length - 1] == (rejected.encode()[: max_length - 1])
        )
        return
    whole = encode_pair(pair(question, chosen, rejected), TOKENIZER, 4096)
    for reply, full in ((encoded.chosen_ids, whole.chosen_ids), (encoded.rejected_ids, whole.rejected_ids)):
        assert len(reply) > 0
        assert reply == full[: len(reply)]
        assert len(encoded.prompt_ids) + len(reply) <= max_length
        assert len(reply) == min(len(full), max_length - 1)
    assert len(encoded.prompt_ids) > 0
    assert whole.prompt_ids[-len(encoded.prompt_ids) :] == encoded.prompt_ids


def test_collated_batch_written_out():
    batch = collate_pairs([EncodedPair([1, 2, 3], [4, 5], [6]), EncodedPair([7, 8], [9], [10, 11])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch["response_mask"].int().tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 1, 0],
    ]
    assert batch["response_mask"].dtype == torch.bool
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_padding_to_a_multiple():
    batch = collate_pairs([EncodedPair([1, 2, 3], [4, 5], [6])], pad_token_id=9, pad_to_multiple_of=8)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [1, 2, 3, 6, 9, 9, 9, 9]]
    assert batch["attention_mask"].sum().item() == 9


def test_padding_id_falls_back():
    tokenizer = byte_tokenizer()
    assert padding_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    assert padding_id(tokenizer) == 0


@pytest.mark.parametrize(
    ("lengths", "wanted", "room", "kept"),
    [
        ([20, 30], 34, 34, [20, 30]),  # all fit
        ([20, 30], 40, 34, [20, 30]),  # beside the longest prompt there are 34 of 64
        ([20, 60], 12, 12, [20, 52]),  # one long prompt is cut, and no reply
        ([20, 60], 40, 32, [20, 32]),  # replies have half of 64
        ([63], 1, 1, [63]),
    ],
)
def test_own_replies_have_room_beside_long_prompts(
    lengths: list[int], wanted: int, room: int, kept: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [list(range(length)) for length in lengths]
    found, tokens = beside_replies(prompts, wanted, 64)
    assert tokens == room
    assert found == [prompt[len(prompt) - left :] for prompt, left in zip(prompts, kept, strict=True)]
    assert bool(caplog.records) == (kept != lengths or room < wanted)
