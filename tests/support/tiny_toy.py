"""A toy world, a base of a few thousand parameters trained on it in a second, adapters on that base; for tests only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qadapter.config.model import FromScratch, LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings, PretrainingSettings
from qadapter.files.artifacts import read_json_lines
from qadapter.methods.dpo import DPOSettings
from qadapter.methods.method import MethodSettings, Need
from qadapter.methods.needs.base_answers import NAME as ANSWERS
from qadapter.methods.needs.base_answers import AnswerSettings, answer_prompts
from qadapter.methods.oplora import OPLoRASettings
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
NO_DROPOUT = LoraSettings(rank=2, alpha=4, dropout=0.0)
LORA = LoraSettings(rank=2, alpha=4, dropout=0.1)  # with dropout: resuming has to restore the random state too
CHOICES: dict[str, MethodSettings] = {
    "q-adapter": QAdapterSettings(preset="residual"),
    "sft": SFTSettings(),
    "dpo": DPOSettings(beta=0.3),
    "replay": ReplaySettings(max_new_tokens=12),
    "oplora": OPLoRASettings(protected=4),  # of the 16 that this base is wide
}


def choice_of(method: str) -> MethodSettings:
    """The settings of these tests for a method."""
    return CHOICES.get(method) or method_named(method).settings()


@dataclass
class TinyToy:
    """A tiny base and a few pairs.

    Attributes:
        world: folder of the toy world.
        base: folder of the model.
        pairs, heldout: prepared pairs of the harmless preference.
        answers: the base's answers to the prompts of `pairs`.
        made: the folder of each need that a training had so far.
    """

    world: Path
    base: Path
    pairs: Path
    heldout: Path
    answers: Path
    made: dict[Need, Path] = field(default_factory=dict)

    @property
    def conversations(self) -> list[list[Message]]:
        """What the base was trained on."""
        return read_corpus([self.world])

    def train(self, method: str, out: Path, **changes: Any) -> Path:
        """One adapter, in `out`; `changes` to the arguments of `train_adapter`."""
        record = method_named(method)
        choice = changes.pop("choice", None) or choice_of(method)
        options: dict[str, Any] = {
            "choice": choice,
            "base": self.base,
            "pairs_file": self.pairs,
            "model": MODEL,
            "lora": LORA,
            "training": TRAINING,
            "seed": 3,
            "needs": changes.pop("needs", None) or self.needs(record.needs(choice)),
            "out": out,
            "scratch": out.with_name(f"{out.name}-scratch"),
            **changes,
        }
        out.mkdir(parents=True)
        train_adapter(record.train, **options)
        return out

    def needs_of(self, method: str) -> dict[str, Path]:
        """The folders of what a method needs with the settings of these tests."""
        return self.needs(method_named(method).needs(choice_of(method)))

    def needs(self, needs: Sequence[Need]) -> dict[str, Path]:
        """The folders of needs, by name; each is made once."""
        for need in needs:
            if need not in self.made:
                self.made[need] = self._make(need)
        return {need.name: self.made[need] for need in needs}

    def _make(self, need: Need) -> Path:
        if need.name == ANSWERS:
            return self.answers.parent
        out = self.world.with_name(f"need-{len(self.made)}-{need.name}")
        out.mkdir()
        further: dict[str, Any] = {
            "lora": NO_DROPOUT,
            "training": TRAINING,
            "heldout_file": self.heldout,
        }
        further = {name: further[name] for name in need.takes}
        if need.needs:
            further["needs"] = self.needs(need.needs)
        same: dict[str, Any] = {"model": MODEL, "settings": need.settings, "batch_size": 16, "seed": 0, "out": out}
        same["scratch"] = out.with_name(f"{out.name}-scratch")
        need.make(self.base, self.pairs, **same, **further)
        return out


_MADE = TemporaryDirectory(prefix="tiny-toy-")


def make_tiny_toy(root: Path, steps: int = 60, heldout: int = 12) -> TinyToy:
    """Everything from scratch, in an empty folder; the second time in a test process, a copy of the first."""
    made = Path(_MADE.name, f"{steps}-{heldout}")
    if not made.exists():
        made.mkdir()
        _make(_places(made), steps, heldout)
    shutil.copytree(made, root, dirs_exist_ok=True)
    return _places(root)


def _places(root: Path) -> TinyToy:
    return TinyToy(
        root / "world",
        root / "base/model",
        root / "pairs/train.jsonl",
        root / "pairs/heldout.jsonl",
        root / "answers/answers.json",
    )


def _make(toy: TinyToy, steps: int, heldout: int) -> None:
    ToyWorld(0).write(toy.world, corpus_size=400)
    prepare(
        [toy.world / "hh-rlhf/harmless.jsonl"],
        toy.pairs.parent,
        heldout_files=[toy.world / "hh-rlhf/harmless-heldout.jsonl"],
        max_train_pairs=PAIRS,
        max_heldout_pairs=heldout,
    )
    settings = PretrainingSettings(learning_rate=2e-2, max_steps=steps, batch_size=16, max_length=64, logging_steps=1)
    toy.base.parent.mkdir()
    scratch = toy.world.with_name("base-scratch")
    pretrain(toy.conversations, SIZE, settings, seed=0, out=toy.base.parent, scratch=scratch)
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
