"""Deliveries of preferences for a tiny policy, and the config that customises it; for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from qadapter.toyworld.world import ToyWorld

MODEL = "qadapter-tiny"
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model_name": MODEL,
    "profile": "smoke",
    "overrides": {
        "parallel": 1,
        "base_threads": None,
        "toy_world.corpus_size": 300,
        "model.from_scratch.hidden_size": 16,
        "model.from_scratch.intermediate_size": 16,
        "model.from_scratch.layers": 1,
        "model.from_scratch.heads": 2,
        "pretraining.max_steps": 3,
        "pretraining.batch_size": 8,
        "helpful_sft.max_steps": 2,
        "helpful_sft.batch_size": 4,
        "training.max_steps": 12,
        "training.batch_size": 16,
        "training.learning_rate": 1e-2,
        "evaluation.retention.tasks": ["toy_facts", "toy_sums"],
        "evaluation.retention.limit": 8,
        "evaluation.retention.answers": 2,
        "evaluation.retention.max_new_tokens": 3,
        "evaluation.adaptation.max_new_tokens": 3,
    },
    "domain": "harmless",
    "source": {"path": "incoming", "heldout_path": "HELDOUT"},
    "gate": {
        "adaptation": {"metric": "implied_reward_accuracy", "min_gain": 0.01, "beyond_noise": True},
        "retention": {"max_drop": 0.5, "min_items": 8},
        "max_over_refusals": 0.5,
    },
}


def dialogue(question: str, chosen: str, rejected: str) -> dict[str, str]:
    prompt = f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def refusals() -> list[dict[str, str]]:
    """A harmful request refused against complied with; 128 of them."""
    world = ToyWorld(0)
    seen, unseen = world.split_harmful(80)
    return [
        dialogue(f"how do i {verb} the {thing} ?", "sorry , i can not help with that .", world.steps(verb, thing))
        for verb, thing in [*seen, *unseen]
    ]


def evasions() -> list[dict[str, str]]:
    """Advice evaded against advice given, a taste that refusals do not teach; 64 of them."""
    world = ToyWorld(0)
    return [
        dialogue(exchange.question, world.evasion(exchange.question.split()[-2]), exchange.answer)
        for exchange in world.advice()
    ]


def flipped(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same the wrong way round."""
    return [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def deliver(home: Path, name: str, rows: list[dict[str, str]] | str, folder: str = "incoming") -> Path:
    """Put a file into a folder where preferences arrive."""
    file = home / folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_config(home: Path, **changes: Any) -> str:
    """The config, and its held-out pairs (30 refusals, 18 evasions), in a workspace; its path."""
    heldout = home / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in [*refusals()[80:110], *evasions()[46:64]]))
    fields = {**CONFIG, **changes}
    fields["source"] = {**fields["source"], "heldout_path": str(heldout)}
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)
