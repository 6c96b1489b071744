"""`qadapter dial` loads base and tokenizer as the other commands do: as in the training, or as the flags say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model

import qadapter.command.dial
from qadapter.command.dial import run
from qadapter.command.options import DialOptions
from qadapter.errors import QAdapterError
from qadapter.policy.tokenizer import RECORD
from qadapter.preferences.tokenize import prompt_ids
from tests.support import templates
from tests.support.templates import with_template
from tests.support.tiny_chat import tiny_llama

ASKED: Any = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A base, an adapter whose training loaded it otherwise than by default, pairs and questions."""
    network = tiny_llama()
    network.save_pretrained(tmp_path / "base")
    with_template(templates.THINKING).save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(network, lora).save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / RECORD).write_text(yaml.safe_dump({"model": {"attn_implementation": "eager"}}))
    pairs = [{"prompt": f"how many is {i} ?", "chosen": "some", "rejected": "none"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    quiz = [{"question": f"Thing {i}?", "choices": ["red", "blue"], "answer": "red"} for i in range(4)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    places = {"adapter": [str(tmp_path / "adapter")], "base": str(tmp_path / "base")}
    return {**places, "data": str(tmp_path / "pairs.jsonl"), "retain": (str(tmp_path / "quiz.jsonl"),)}


def measured_with(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def measure(*_: Any, **given: Any) -> None:
        found.update(given)
        raise QAdapterError("far enough")

    monkeypatch.setattr(qadapter.command.dial, "measure_curve", measure)
    with pytest.raises(QAdapterError, match="far enough"):
        run(DialOptions(**options))
    return found


def test_the_base_is_loaded_as_in_the_training_or_as_asked(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured_with(options, monkeypatch)["model"].loading() == {"attn_implementation": "eager"}
    asked = measured_with({**options, "model": {"attn_implementation": "sdpa"}}, monkeypatch)
    assert asked["model"].loading() == {"attn_implementation": "sdpa"}


def test_what_is_asked_of_the_template_reaches_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = measured_with(options, monkeypatch)["own_tokenizer"]
    off = measured_with({**options, "thinking": False}, monkeypatch)["own_tokenizer"]
    assert len(prompt_ids(off, ASKED)) == len(prompt_ids(own, ASKED)) + len("<think>\n\n</think>\n\n")
    with pytest.raises(QAdapterError, match="nonsense"):
        run(DialOptions(**options, chat_template_kwargs={"nonsense": 1}))


def test_a_limit_on_what_is_not_measured_is_refused(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No harmless request is asked: the dial was chosen as if no limit had been given."""
    with pytest.raises(QAdapterError, match=r"max_over_refusals is 0.02, and no harmless request is asked"):
        run(DialOptions(**options, max_over_refusals=0.02))
    assert measured_with({**options, "tasks": ["toy_howtos"], "max_over_refusals": 0.02}, monkeypatch)


def test_a_damaged_record_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter" / RECORD).write_text("dtype: float31\n")
    with pytest.raises(QAdapterError, match="does not say how to load the base"):
        run(DialOptions(**options))
