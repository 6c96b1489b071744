"""A base of the hub is one commit for a whole run; any other base changes nothing in a stage's settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qadapter.config.experiment import load_experiment
from qadapter.config.model import ModelSettings
from qadapter.policy.loading import load_base
from tasks.candidate import base_digest
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tasks.train import Base, pretrain_base
from tests.processes.test_served_model import hub_with
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_gguf import write_gguf


def context(home: Path, **model: Any) -> RunContext:
    overrides = {"model": model, "pretraining": None, "helpful_sft.lora": True} if model else {}
    return RunContext(load_experiment("smoke", overrides), StageStore(home), Tracker.for_project(home), "parent")


def named_base(of: RunContext) -> Base:
    """What the pipeline's own first stage names."""
    base = pretrain_base.fn(of, {}, None, None)
    assert isinstance(base, Base)
    return base


def test_the_commit_of_a_hub_id_is_in_the_stages_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(hidden=8, layers=1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    first, second = hub_with(tmp_path, tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    on_main = context(tmp_path, pretrained="owner/model", dtype="bfloat16")
    bases = [named_base(on_main)]
    (tmp_path / "models--owner--model/refs/main").write_text(second)
    bases.append(named_base(on_main))
    found = [base.within(on_main).experiment.model for base in bases]
    assert [model.numerics() for model in found] == [
        {"quantization": "none", "dtype": "bfloat16", "revision": commit} for commit in (first, second)
    ]
    digests = [base_digest(base, on_main.experiment.model) for base in bases]
    assert digests == [f"owner/model@{first}", f"owner/model@{second}"]

    pinned = context(tmp_path, pretrained="owner/model", revision=first)
    assert named_base(pinned).within(pinned).experiment.model.revision == first
    unknown = context(tmp_path, pretrained="owner/unknown")
    assert named_base(unknown).within(unknown) is unknown
    assert base_digest(named_base(unknown), unknown.experiment.model) == "owner/unknown@main"


def test_a_base_made_of_files_leaves_the_experiment_as_it_is(tmp_path: Path) -> None:
    """So its stages have the keys that they had before a base could have numerics of its own."""
    (tmp_path / "model").mkdir()
    local, scratch = context(tmp_path, pretrained=str(tmp_path / "model")), context(tmp_path)
    assert named_base(local) == Base(str(tmp_path / "model"), None, "pretrained")
    assert named_base(local).within(local) is local
    assert Base(str(tmp_path / "model"), None, "helpful").within(scratch) is scratch


@pytest.mark.slow
def test_a_gguf_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages load an ordinary folder; the file's content, not its name, is what the folder depends on."""
    held = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("tasks.stages.stage_run.get_run_logger", lambda: logging.getLogger("test"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/other.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    bases = []
    for place in ("tiny.gguf", "elsewhere/other.gguf", "elsewhere"):
        of = context(tmp_path, pretrained=str(tmp_path / place))
        of = replace(of, parent_run_id=of.tracker.start_parent("gguf", place))
        found = pretrain_base.fn(of, {}, None, None)
        bases.append(found if isinstance(found, Base) else found.data)
    assert len({base.location for base in bases}) == 1
    assert [base.output.cached for base in bases] == [False, True, True]
    network, tokenizer = load_base(bases[0].location, ModelSettings(pretrained=bases[0].location))
    assert torch.equal(network.model.embed_tokens.weight, held["token_embd"])
    assert tokenizer("a")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("a")
