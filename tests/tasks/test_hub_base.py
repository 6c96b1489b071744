"""A base of the hub is one commit for a whole run; any other base changes nothing in a stage's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qadapter.config.experiment import load_experiment
from tasks.candidate import base_digest
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tasks.train import Base, pretrain_base
from tests.processes.test_served_model import hub_with
from tests.support.tiny_chat import byte_tokenizer, tiny_llama


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
