"""The profile `paper` with a tiny model in place of the 8 B one: 8 bits, bf16, a reward model, official tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.running.run_request import RunRequest
from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.toyworld.world import ToyWorld
from tests.processes.test_pipeline import SOURCES, Home
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

BBH = "leaderboard_bbh_navigate"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a hub id would give."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(hidden=64, context=3000).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the public formats, and an item of each of two official tasks."""
    folder = tmp_path_factory.mktemp("data")
    ToyWorld(0).write(folder, corpus_size=300)
    items = {
        "gsm8k": [{"question": "1 + 1?", "answer": "One and one. #### 2"}],
        "bbh/navigate": [{"input": "Back where you were?", "target": "Yes"}],
    }
    for name, rows in items.items():
        file = folder / "official" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides(model: Path) -> dict[str, Any]:
    """Sizes only, local files in place of the hub, and the one suite that does not lie there left out."""
    few = {"epochs": 0.1, "batch_size": 2, "micro_batch_size": 1, "max_length": 128, "save_steps": 4}
    academy = SOURCES["academy"] | {"judge_pairs": 4}
    return {
        "model.pretrained": str(model),
        "sources": {"helpful": SOURCES["helpful"], "harmless": SOURCES["harmless"], "academy": academy},
        "domains": {
            "harmless": {"source": "harmless", "base": "helpful", "epochs": 0.05},
            "academy": {"source": "academy", "base": "pretrained"},
        },
        **{f"helpful_sft.{key}": value for key, value in few.items()},
        **{f"training.{key}": value for key, value in few.items()},
        "methods.replay.max_new_tokens": 3,
        "evaluation.retention.tasks": ["gsm8k_cot", BBH],
        "evaluation.retention.plain_tasks": [],
        "evaluation.retention.official_data": "{data}/official",
        "evaluation.retention.limit": 1,
        "evaluation.retention.max_new_tokens": 4,
        "evaluation.adaptation.max_new_tokens": 4,
        "evaluation.adaptation.generate": 2,
        "evaluation.adaptation.reward_model.epochs": 1,
        "evaluation.adaptation.reward_model.batch_size": 2,
        "evaluation.adaptation.reward_model.micro_batch_size": 1,
        "evaluation.adaptation.reward_model.max_length": 128,
    }


@pytest.mark.slow
def test_the_profile_runs_on_a_tiny_model(harness: None, llama: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="the profile's base is in 8 bits: pip install qadapter-pipeline[quantized]"
    )
    from flows.full_paper_repro import full_paper_repro

    home = Home(tmp_path)
    with home.entered():
        full_paper_repro("paper", str(data), overrides(llama))
    (parent,) = home.parents()
    assert parent.info.status == "FINISHED"
    assert parent.data.params["model.quantization"] == "int8"
    cells = home.cells(parent)
    assert {method for _, method in cells} == {"base", "q-adapter", "sft", "dpo", "replay"}
    for (domain, method), run in cells.items():
        metrics = run.data.metrics
        assert {"retention/gsm8k_cot/exact_match.strict-match", f"retention/{BBH}/acc_norm"} <= set(metrics)
        assert 0 <= metrics["adaptation/implied_reward_accuracy"] <= 1
        if domain == "academy":
            assert "adaptation/win_rate" in metrics, method
        if method != "base":
            assert "train/adapter/adapter_model.safetensors" in home.artifacts(run)


def test_a_tokenizer_without_a_chat_template_is_refused_first(llama: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    home = Home(tmp_path / "home")
    with home.entered():
        with pytest.raises(QAdapterError, match=rf"has no chat template, and gsm8k_cot, {BBH} would be asked with one"):
            RunRequest("x", "paper", str(data), overrides(plain)).check()
        asked_plain = overrides(plain) | {"evaluation.retention.plain_tasks": ["gsm8k_cot", BBH]}
        RunRequest("x", "paper", str(data), asked_plain).check()
        RunRequest("x", "paper", str(data), overrides(llama)).check()


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    settings = overrides(tmp_path / "nowhere") | {"model.pretrained": "nobody/no-such-model-8B"}
    arguments = ["--profile", "paper", "--data", str(data)]
    with home.entered():
        code = main(["run", *arguments, *(f"{key}={json.dumps(value)}" for key, value in settings.items())])
    assert code == 2
    assert "error: model.pretrained: the model 'nobody/no-such-model-8B' could not be loaded" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()
