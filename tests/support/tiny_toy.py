"""A toy world, a base of a few thousand parameters trained on it in a second, adapters on that base; for tests only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.config.model import FromScratch, LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings, PretrainingSettings
from qadapter.files.artifacts import read_json_lines
from qadapter.methods.dpo import DPOSettings
from qadapter.methods.method import MethodSettings
from qadapter.methods.needs.base_answers import AnswerSettings, answer_prompts
from qadapter.methods.q_adapter import QAdapterSettings
from qadapter.methods.replay import ReplaySettings
from qadapter.methods.sft import SFTSettings
from qadapter.methods.table import method_named
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.prepare import prepare
from qadapter.toyworld.world import ToyWorld
from qadapter.training.adapt import train_adapter
from qadapter.training.corpus import read_corpus
from qadapter.training.pretraining import pretrain

SIZE = FromScratch(
    tokenizer="words", vocab_size=512, hidden_size=16, intermediate_size=32, layers=1, heads=2, context=64
)
MODEL = ModelSettings(from_scratch=SIZE)
PAIRS = 10
STEPS = 6  # of 4 pairs: two epochs of 4, 4 and 2
TRAINING = OptimizerSettings(
    learning_rate=1e-2, max_steps=STEPS, batch_size=4, max_length=64, logging_steps=1, save_steps=2
)
LORA = LoraSettings(rank=2, alpha=4, dropout=0.1)  # with dropout: resuming has to restore the random state too
CHOICES: dict[str, MethodSettings] = {
    "q-adapter": QAdapterSettings(preset="residual"),
    "sft": SFTSettings(),
    "dpo": DPOSettings(beta=0.3),
    "replay": ReplaySettings(max_new_tokens=12),
}


@dataclass
class TinyToy:
    """A tiny base and a few pairs.

    Attributes:
        world: folder of the toy world.
        base: folder of the model.
        pairs, heldout: prepared pairs of the harmless preference.
        answers: the base's answers to the prompts of `pairs`.
        conversations: what the base was trained on.
    """

    world: Path
    base: Path
    pairs: Path
    heldout: Path
    answers: Path
    conversations: list[list[Message]]

    def train(self, method: str, out: Path, **changes: Any) -> Path:
        """One adapter, in `out`; `changes` to the arguments of `train_adapter`."""
        record = method_named(method)
        choice = changes.pop("choice", None) or CHOICES.get(method) or record.settings()
        options: dict[str, Any] = {
            "choice": choice,
            "base": self.base,
            "pairs_file": self.pairs,
            "model": MODEL,
            "lora": LORA,
            "training": TRAINING,
            "seed": 3,
            "needs": {need.name: self.answers.parent for need in record.needs(choice)},
            "out": out,
            "scratch": out.with_name(f"{out.name}-scratch"),
            **changes,
        }
        out.mkdir(parents=True)
        train_adapter(record.train, **options)
        return out


def make_tiny_toy(root: Path, steps: int = 60, heldout: int = 12) -> TinyToy:
    """Everything from scratch, in an empty folder."""
    ToyWorld(0).write(root / "world", corpus_size=400)
    prepare(
        [root / "world/hh-rlhf/harmless.jsonl"],
        root / "pairs",
        heldout_files=[root / "world/hh-rlhf/harmless-heldout.jsonl"],
        max_train_pairs=PAIRS,
        max_heldout_pairs=heldout,
    )
    toy = TinyToy(
        root / "world",
        root / "base/model",
        root / "pairs/train.jsonl",
        root / "pairs/heldout.jsonl",
        root / "answers/answers.json",
        read_corpus([root / "world"]),
    )
    settings = PretrainingSettings(learning_rate=2e-2, max_steps=steps, batch_size=16, max_length=64, logging_steps=1)
    toy.base.parent.mkdir()
    pretrain(toy.conversations, SIZE, settings, seed=0, out=toy.base.parent, scratch=root / "base-scratch")
    toy.answers.parent.mkdir()
    answer_prompts(
        toy.base,
        toy.pairs,
        model=MODEL,
        settings=AnswerSettings(max_new_tokens=12, temperature=0),
        batch_size=4,
        seed=0,
        out=toy.answers.parent,
    )
    return toy


def pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    """A pair on a single question."""
    return PreferencePair(({"role": "user", "content": prompt},), chosen, rejected)


def write_pairs(file: Path, pairs: list[PreferencePair]) -> Path:
    """Prepared pairs, a pair a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(pair.to_trl()) + "\n" for pair in pairs), encoding="utf-8")
    return file


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return read_json_lines(file)
