"""The recipe of CONTRIBUTING.md, followed in a copy of the project: a new method trains, and re-trains no other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

from qadapter.files.artifacts import read_json
from qadapter.methods.table import NAMES
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import encode_pair
from qadapter.training.adapt import Job, lora_config, train_adapter
from tests.support.forked_process import be_script, completed
from tests.support.paths import PROJECT_ROOT
from tests.support.stage_keys import stage_keys
from tests.support.tiny_toy import LORA, MODEL, TRAINING, TinyToy, make_tiny_toy

MADE_UP = '''
"""A method that needs the base's answers, as replay does, and a stage of its own that reads the pairs."""

from qadapter.config.base import Count, Settings
from qadapter.methods.method import LEARNING_RATE, Look, Method, MethodSettings, Need, Work
from qadapter.methods.needs.base_answers import base_answers


class CountingSettings(Settings):
    most: Count


class MadeUpSettings(MethodSettings):
    most: Count = 3


def count(base, pairs_file, *, model, settings, batch_size, seed, out):
    (out / "count.json").write_text("0")


def needs(choice):
    own = Need("counts", CountingSettings(most=choice.most), "pairs", count, lambda settings, plan: Work(0, 0, 1))
    return base_answers(24, 0.0), own


def train(job, choice):
    raise AssertionError("no key is computed by training")


METHOD = Method("made-up", MadeUpSettings, train, 2.0, (LEARNING_RATE,), Look("#123456", "d"), "RL", needs=needs)
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"), steps=5)


def recipe() -> str:
    """The method that CONTRIBUTING.md adds."""
    text = (PROJECT_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Add a method\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return textwrap.dedent(code)


@pytest.mark.slow
def test_the_recipes_method_trains(toy: TinyToy, tmp_path: Path) -> None:
    """On two sequences per pair, as every method."""
    file = tmp_path / "both_replies.py"
    file.write_text(recipe(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("both_replies", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "out"
    out.mkdir()
    same: dict[str, Any] = {"model": MODEL, "lora": LORA, "training": TRAINING, "seed": 0, "needs": {}}
    choice = module.METHOD.settings()
    train_adapter(module.METHOD.train, choice, toy.base, toy.pairs, **same, out=out, scratch=tmp_path / "scratch")
    dpo = toy.train("dpo", tmp_path / "dpo")
    tokens = [read_json(folder / "metrics.json")["cost/train_tokens"] for folder in (out, dpo)]
    assert tokens[0] == tokens[1] > 0


def test_a_training_without_the_jobs_examples_is_refused(toy: TinyToy, tmp_path: Path) -> None:
    """Otherwise nothing would be known of its budget."""
    pairs = load_pairs(toy.pairs)
    network, tokenizer = load_base(toy.base, MODEL)
    encoded = [encode_pair(pair, tokenizer, 64) for pair in pairs]
    places: dict[str, Any] = {"needs": {}, "out": tmp_path, "scratch": tmp_path / "scratch"}
    job = Job(network, tokenizer, lora_config(LORA), pairs, encoded, TRAINING, seed=0, **places)
    with pytest.raises(ValueError, match=r"on_pairs or Job\.on_conversations"):
        job.tokens()
    with pytest.raises(ValueError, match="10 conversations for 10 pairs; expected two for each pair"):
        job.on_conversations(job.chosen())
    assert job.on_pairs()[1]["per_device_train_batch_size"] == 4
    assert job.on_conversations(job.chosen() + job.rejected())[1]["per_device_train_batch_size"] == 8


def test_a_new_method_changes_no_others_keys(tmp_path: Path) -> None:
    """In a copy with two methods more; there DPO's own file is changed too, to see that keys do follow the code."""
    before = stage_keys(list(NAMES))
    for room in ("qadapter", "tasks", "flows", "configs", "tests/support"):
        shutil.copytree(PROJECT_ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    methods = tmp_path / "qadapter/methods"
    (methods / "made_up.py").write_text(MADE_UP, encoding="utf-8")
    (methods / "both_replies.py").write_text(recipe(), encoding="utf-8")
    edit(methods / "table.py", "import (\n", "import (\n    both_replies,\n    made_up,\n")
    edit(
        methods / "table.py",
        "    q_adapter.METHOD,\n",
        "    both_replies.METHOD,\n    q_adapter.METHOD,\n    made_up.METHOD,\n",
    )
    edit(methods / "dpo.py", "beta=choice.beta", "beta=2 * choice.beta")
    script = "import json, sys, tests.support.stage_keys as keys; print(json.dumps(keys.stage_keys(sys.argv[1:])))"
    names = (*NAMES, "both-replies", "made-up")
    result = completed(be_script, script, str(tmp_path), *names, cwd=tmp_path, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    after = json.loads(result.stdout)
    new = {"counts"}
    for name in ("made-up", "both-replies"):
        new |= {f"train {name}", *(f"{half} harmless · {name} · seed 0" for half in ("adaptation", "retention"))}
    assert set(after) - set(before) == new
    changed = {name for name, key in before.items() if after[name] != key}
    assert changed == {"train dpo", *(f"{half} harmless · dpo · seed 0" for half in ("adaptation", "retention"))}
    assert {"answers", "judge", "train q-adapter on", "pretrain", "helpful-sft"} <= set(before)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
