"""A reward model of the training pairs: RLOO, GRPO and ShiQ learn from it; it scores the rollouts of VAS and PITA.

It is the base with a LoRA of the policies' shape and a head of one number, trained on the pairs that the policies train
on. Its rewards are centred and scaled to unit variance over those pairs' replies: a β means the same everywhere. On its
own scale a difference of two rewards is the log odds that one reply is preferred, as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.config.base import Count, Positive, Settings
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.methods.method import Need, PairsPlan, Work

if TYPE_CHECKING:
    from qadapter.training.adapt import Job

NAME = "reward"
SCALE = "scale.json"

Reward = Callable[[Sequence[Sequence[int]]], list[float]]
"""From sequences of token ids, a prompt with a reply, to their rewards."""


class RewardModelSettings(Settings):
    """How the reward model is trained: as the adapters are (`training`), but for what is set here."""

    learning_rate: Positive | None = None
    max_steps: Count | None = None
    epochs: Positive | None = None


def reward_model(settings: RewardModelSettings) -> Need:
    """The need for a reward model."""
    takes = ("lora", "training", "heldout_file")
    return Need(NAME, settings, "pairs", train_reward_model, _work, takes=takes, trains=True)  # type: ignore[arg-type]


def _work(settings: RewardModelSettings, plan: PairsPlan) -> Work:
    """Two sequences per pair: a forward and a backward pass, and a forward pass for the scale of the rewards."""
    epochs = settings.epochs or 1.0
    return Work(0, 2 * plan.pairs * plan.tokens_per_sequence * epochs, 2 + 1 / epochs)


def train_reward_model(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    settings: RewardModelSettings,
    batch_size: int,
    seed: int,
    out: Path,
    lora: LoraSettings,
    training: OptimizerSettings,
    heldout_file: Path,
    scratch: Path,
) -> None:
    """Train a reward model on the training pairs; the held-out pairs only measure it.

    Writes what `qadapter.judging.reward_training` writes, with `reward/…` metrics (`reward/accuracy`: share of held-out
    pairs whose chosen reply has the higher reward), and `scale.json` with the mean and deviation of the rewards.
    """
    from qadapter.files.artifacts import read_json, write_json
    from qadapter.judging.reward_training import train_judge
    from qadapter.judging.rewards import rewards
    from qadapter.preferences.pair import load_pairs
    from qadapter.preferences.tokenize import encode_pairs

    changed = settings.model_dump(exclude_none=True)
    if settings.epochs and not settings.max_steps:
        changed["max_steps"] = None
    settings_of_training = training.model_copy(update=changed)
    trainer = train_judge(
        base,
        pairs_file,
        heldout_file,
        model=model,
        lora=lora,
        settings=settings_of_training,
        seed=seed,
        out=out,
        scratch=scratch,
    )
    metrics = read_json(out / "metrics.json")
    write_json(out / "metrics.json", {name.replace("judge/", f"{NAME}/"): value for name, value in metrics.items()})
    tokenizer: Any = trainer.processing_class
    pairs = encode_pairs(load_pairs(pairs_file), tokenizer, training.max_length).pairs
    rows = [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert trainer.model is not None
    found = [float(one) for one in rewards(trainer.model, rows, batch_size)]  # of several processes one has the files
    mean = sum(found) / len(found)
    deviation = (sum((one - mean) ** 2 for one in found) / len(found)) ** 0.5
    write_json(out / SCALE, {"mean": mean, "deviation": deviation or 1.0})


def open_rewards(
    folder: Path, base: str | Path, model: ModelSettings, batch_size: int, *, standardised: bool = True
) -> Reward:
    """The rewards that a trained reward model gives, on token ids: the end token is among what it reads.

    Args:
        folder: what `train_reward_model` wrote.
        base, model: the base and how it is loaded.
        batch_size: sequences per forward pass.
        standardised: mean 0 and deviation 1 over the training pairs' replies; otherwise on the model's own scale.
    """
    from qadapter.files.artifacts import read_json
    from qadapter.judging.rewards import ADAPTER, load_reward_base, rewards
    from qadapter.policy.adapters import load_adapter

    network, _ = load_reward_base(base, model)
    loaded = load_adapter(network, folder / ADAPTER)
    scale = read_json(folder / SCALE) if standardised else {"mean": 0.0, "deviation": 1.0}

    def reward(rows: Sequence[Sequence[int]]) -> list[float]:
        found = rewards(loaded, [list(row) for row in rows], batch_size)
        return [float(one) for one in (found - scale["mean"]) / scale["deviation"]]

    return reward


def rewards_of(job: Job) -> Reward:
    """The rewards for a training that needs a reward model."""
    assert job.model is not None
    return open_rewards(job.needs[NAME], job.base, job.model, 64)
