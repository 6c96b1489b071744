"""What the commands print of a model's text: no character in it acts on the terminal."""

from __future__ import annotations

import pytest

from qadapter.command.chat import VisibleStreamer
from qadapter.command.generate import _readable
from tests.support.tiny_chat import byte_tokenizer


def test_generate_prints_replies_as_they_are() -> None:
    prompt = [{"role": "user", "content": "a\x1b[2Jb"}]
    text = _readable({"prompt": prompt, "reply": "c\u202ed", "base_reply": "e\rf"})
    assert text == "user: a\\x1b[2Jb\nreply: c\\u202ed\nbase: e\\x0df\n"
    assert _readable({"prompt": prompt, "error": "half \ud800"}).endswith("no reply: half \\ud800\n")


def test_chat_streams_replies_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = VisibleStreamer(byte_tokenizer())
    streamer.on_finalized_text("red \x1b[31m", stream_end=False)
    streamer.on_finalized_text("\x07 end", stream_end=True)
    assert capsys.readouterr().out == "red \\x1b[31m\\x07 end\n"
