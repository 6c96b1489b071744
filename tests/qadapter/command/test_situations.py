"""Templates, lengths and numbers that users meet, through the command: right, or said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.command.chat import Chat
from qadapter.command.opened import open_policy
from qadapter.command.options import ChatOptions
from qadapter.command.parser import main
from qadapter.command.sections import PolicyOptions
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.preferences.tokenize import prompt_ids
from qadapter.training.trainer import QAdapterConfig, QAdapterTrainer
from tests.support import templates
from tests.support.templates import with_template
from tests.support.tiny_chat import tiny_llama
from tests.support.tiny_models import lora
from tests.support.tiny_toy import rows

TRAIN = "--preset residual --max-steps 1 --batch-size 2 --max-length 96 --lora-rank 2 --heldout 0".split()
ASK: list[Any] = [{"role": "user", "content": "Name a fruit."}]


def write_base(folder: Path, template: str | None, context: int = 256) -> Path:
    network = tiny_llama(context=context)
    network.resize_token_embeddings(264)
    network.save_pretrained(folder)
    with_template(template).save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int = 6, *, reply: str = "Pear.", system: bool = False) -> Path:
    content = [
        {
            "prompt": [{"role": "user", "content": f"Fruit {i}?"}],
            "chosen": [{"role": "assistant", "content": f"{reply}{i}"}],
            "rejected": [{"role": "assistant", "content": f"Car.{reply}{i}"}],
        }
        for i in range(count)
    ]
    if system:
        content.append({**content[0], "prompt": [{"role": "system", "content": "Be brief."}, *content[0]["prompt"]]})
    file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


def train(place: Path, template: str | None, data: Path, *flags: str) -> int:
    base = place / "base"
    if not base.exists():
        write_base(base, template)
    return main(["train", "--base", str(base), "--data", str(data), "--output", str(place / "out"), *TRAIN, *flags])


@pytest.fixture(scope="module")
def no_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training on seven rows, one of which the template refuses."""
    place = tmp_path_factory.mktemp("no-system")
    assert train(place, templates.NO_SYSTEM, write_rows(place / "rows.jsonl", system=True)) == 0
    return place


def test_a_row_that_the_template_refuses_is_set_aside(no_system: Path) -> None:
    (unused,) = rows(no_system / "out" / "unused.jsonl")
    assert unused["reason"] == "the chat template refuses these messages: System role not supported"
    metrics = json.loads((no_system / "out" / "metrics.json").read_text())
    assert [metrics[f"train/truncated_{what}"] for what in ("prompts", "replies", "ends")] == [0, 0, 0]


def test_a_prompt_that_cannot_be_asked_is_answered_with_the_reason(
    no_system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [ASK, [{"role": "system", "content": "Be brief."}, *ASK], [{"role": "user", "content": "\ud800"}], ASK]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    asked = ["generate", "--adapter", str(no_system / "out"), "--prompts", str(file), "--max-new-tokens", "4"]
    assert main([*asked, "--output", str(out), "--compare-base", "--batch-size", "2"]) == 0
    answers = rows(out)
    assert [answer["reply"] is None for answer in answers] == [False, True, True, False]
    assert answers[0]["reply"] == answers[3]["reply"]
    assert "System role not supported" in answers[1]["error"]
    assert "half a surrogate pair" in answers[2]["error"]
    assert "2 of 4 prompts could not be asked, the first because" in capsys.readouterr().err
    file.write_text(json.dumps({"prompt": prompts[1]}) + "\n", encoding="utf-8")
    assert main(asked) == 2


@pytest.mark.slow
def test_mostly_refused_rows_stop_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, templates.OPENS_THOUGHT, write_rows(tmp_path / "rows.jsonl")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "6 of 6 training pairs" in said or "no usable pair (6 rows" in said
    assert "set `thinking: false`" in said
    assert train(tmp_path, None, tmp_path / "rows.jsonl", "--no-thinking", "--overwrite") == 0
    policy, tokenizer = open_policy(PolicyOptions(adapter=(str(tmp_path / "out"),)))
    assert tokenizer.decode(prompt_ids(tokenizer, ASK)).endswith("<think>\n\n</think>\n\n")
    assert PolicyLM(str(tmp_path / "out")).apply_chat_template(ASK).endswith("<think>\n\n</think>\n\n")
    on = open_policy(PolicyOptions(adapter=(str(tmp_path / "out"),), chat_template_kwargs={"enable_thinking": False}))
    assert prompt_ids(on[1], ASK) == prompt_ids(tokenizer, ASK)
    assert policy is not on[0]


def test_replies_longer_than_max_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reply="Long. " * 40)
    assert train(tmp_path, templates.OTHER_END, data) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "max_length 96 cuts a reply of 6 of 6 training pairs" in said
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert train(tmp_path, None, data, "--allow-truncation", "--overwrite") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [metrics[f"train/truncated_{what}"] for what in ("prompts", "replies", "ends")] == [6, 6, 0]


def test_a_template_set_in_python_is_asked_with_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", None)
    network = type(tiny_llama()).from_pretrained(base)
    arguments = QAdapterConfig(
        output_dir=str(tmp_path / "run"), objective="residual", max_steps=1, report_to="none", use_cpu=True
    )
    data = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    given = with_template(templates.OTHER_END)
    trainer = QAdapterTrainer(network, arguments, data, processing_class=given, peft_config=lora())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    _, tokenizer = open_policy(PolicyOptions(adapter=(str(tmp_path / "adapter"),)))
    assert "its own tokenizer, with a chat template (the base has none)" in capsys.readouterr().err
    assert prompt_ids(tokenizer, ASK) == prompt_ids(given, ASK)
    lm = PolicyLM(str(tmp_path / "adapter"), apply_chat_template=True)
    assert lm.apply_chat_template(ASK) == "<bos><|user|>Name a fruit.<|end|>\n<|assistant|>"


@pytest.mark.slow
def test_chat_has_room_in_a_short_context(no_system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ChatOptions(adapter=(str(no_system / "out"),))
    assert options.max_new_tokens == 256  # as many as the context has
    chat = Chat(*open_policy(options), options)
    capsys.readouterr()
    chat.answer("Name a fruit.")
    assert "do not fit" not in capsys.readouterr().out
    assert len(chat.turns) == 2
    assert main(["generate", "--adapter", str(no_system / "out"), "--prompt", "Name a fruit."]) == 0
    assert main([*"generate --prompt a --max-new-tokens 256 --adapter".split(), str(no_system / "out")]) == 2


@pytest.mark.parametrize("value", ["1e-40", "-1", "1e40", "nan"])
def test_absurd_temperatures_are_refused(value: str, no_system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--adapter", str(no_system / "out"), "--prompt", "a", f"--temperature={value}"]
    assert main(asked) == 2
    assert "--temperature" in capsys.readouterr().err
