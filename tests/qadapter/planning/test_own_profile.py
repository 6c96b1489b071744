"""The profile that `qadapter init` writes."""

from __future__ import annotations

import re

import yaml

from qadapter.config.experiment import Experiment
from qadapter.planning.own_profile import Material, profile_text


def test_what_its_comments_propose_is_valid() -> None:
    found = Material("owner/model", 1e8, 512, True, "/data/pairs.jsonl", 400, 400, 200, {}, ("hellaswag",))
    text = profile_text("mine", "mine.yaml", found)
    settings = yaml.safe_load(text)
    assert Experiment.model_validate(settings).helpful_sft is None
    (section,) = re.findall(r"^# (helpful_sft: .*)$", text, flags=re.M)
    (source,) = re.findall(r"`(old: .*?)` to `sources`", text)
    (answers,) = re.findall(r"`(answers: \d+)` under `evaluation.retention`", text)
    settings |= yaml.safe_load(section)
    settings["sources"] |= yaml.safe_load(source)
    settings["evaluation"]["retention"] |= yaml.safe_load(answers)
    experiment = Experiment.model_validate(settings)
    assert experiment.helpful_sft is not None
    assert experiment.helpful_sft.source == "old"
    assert experiment.evaluation.retention.answers == 16
