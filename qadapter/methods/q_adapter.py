"""The Q-Adapter: the paper's method, which the report compares all others with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qadapter.config.base import Alpha0, AlphaTilde, NonNegative, Positive
from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job
    from qadapter.training.config import QAdapterConfig


class QAdapterSettings(MethodSettings):
    """The method's own knobs (`qadapter/policy/objective.py`); None takes the preset's value.

    `residual` is what docs/findings.md recommends, `paper` the table of the paper.
    """

    preset: Literal["paper", "published-code", "residual"] = "residual"
    alpha_tilde: AlphaTilde | None = None
    alpha_0: Alpha0 | None = None
    beta: NonNegative | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    preference_scale: Positive | None = None
    shift_mask: bool | None = None


def train(job: Job, choice: QAdapterSettings) -> Trainer:
    """Train on pairs. Writes the objective, defaults filled in, as `params.json`."""
    from qadapter.training.arguments import train_to_end
    from qadapter.training.encoded_pairs import EncodedPairs
    from qadapter.training.trainer import QAdapterTrainer

    pairs, arguments = job.on_pairs()
    trainer = QAdapterTrainer(
        model=job.network,
        args=_configured(choice, arguments, job.out),
        train_dataset=EncodedPairs(pairs),
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    return train_to_end(trainer, METHOD.name)


def continue_adapter(
    choice: QAdapterSettings,
    base: str | Path,
    adapter: Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    training: OptimizerSettings,
    seed: int,
    out: Path,
    scratch: Path,
) -> None:
    """Train an adapter further and write it: the same frozen base, with an earlier adapter as the starting point.

    The objective stays what it was: the reward is relative to the base, not to the adapter that training starts from.
    Optimiser and schedule start anew. The adapter keeps its own rank and layers.

    Args:
        choice: the method's settings.
        base: folder or hub id of the base that the adapter was trained on.
        adapter: folder of a Q-Adapter.
        pairs_file: prepared preference pairs, one per line.
        model, training: of the experiment; it evaluates and stops early as `train_adapter` does.
        seed: of order and dropout.
        out: gets `adapter/`, `params.json`, `history.jsonl` and `metrics.json`, as from `train_adapter`.
        scratch: folder of checkpoints; training resumes from the newest complete one.

    Raises:
        QAdapterError: the folder holds no Q-Adapter, or no pair is left after truncation.
    """
    from transformers import set_seed

    from qadapter.policy.loading import load_base
    from qadapter.policy.model import QAdapterForCausalLM
    from qadapter.preferences.pair import load_pairs
    from qadapter.training.adapt import lengths_of_pairs, some_aside, with_steps, write_adapter
    from qadapter.training.arguments import measured_cost, tokens_seen, train_to_end, trainer_arguments
    from qadapter.training.encoded_pairs import EncodedPairs, encode_dataset
    from qadapter.training.evaluated import evaluating_while_training
    from qadapter.training.trainer import QAdapterTrainer

    network, tokenizer = load_base(base, model)
    policy = QAdapterForCausalLM.from_pretrained(adapter, base_model=network, is_trainable=True)
    given = load_pairs(pairs_file)
    found = encode_dataset(
        given,
        tokenizer,
        training.max_length,
        "training",
        allow_truncation=training.allow_truncation,
    )
    left_out = {index for index, _ in found.quarantined}
    usable = [pair for index, pair in enumerate(given) if index not in left_out]
    _, encoded, aside = some_aside(usable, [found[index] for index in range(len(found))], training)
    trained = encoded[: len(encoded) - (aside.held if aside else 0)]
    settings = with_steps(training, len(trained), choice.learning_rate)
    arguments = _configured(choice, trainer_arguments(settings, seed=seed, scratch=scratch), out)
    set_seed(seed)
    with measured_cost() as cost, evaluating_while_training(aside):
        pairs = EncodedPairs(encoded)
        trainer = train_to_end(
            QAdapterTrainer(model=policy, args=arguments, train_dataset=pairs, processing_class=tokenizer),
            f"{METHOD.name}, continued",
        )
    tokens = tokens_seen(lengths_of_pairs(trained), trainer.state.global_step, training.batch_size)
    write_adapter(out, trainer, cost, tokens, encoded)


def _configured(choice: QAdapterSettings, arguments: Mapping[str, Any], out: Path) -> QAdapterConfig:
    """The trainer's arguments with the objective, which is written down too."""
    from dataclasses import asdict

    from qadapter.files.artifacts import write_json
    from qadapter.training.config import QAdapterConfig

    changed = choice.model_dump(exclude={"preset", "learning_rate"}, exclude_none=True)
    config = QAdapterConfig(objective=choice.preset, **changed, **arguments)
    write_json(out / "params.json", {"objective": asdict(config.to_objective())})
    return config


def family(change: Mapping[str, Any]) -> str:
    """A sweep shows the objective as the family: the preset, and how the mask lies where that is not the preset's."""
    name = str(change.get("preset", METHOD.name))
    if change.get("shift_mask") is not None:
        name += "-shifted" if change["shift_mask"] else "-unshifted"
    return name


METHOD = Method(
    name="q-adapter",
    settings=QAdapterSettings,
    train=train,
    passes=2.5,  # the base's forward pass, the adapted model's, one backward; of a prompt once for both replies
    knobs=(
        Knob("preset"),
        Knob("shift_mask"),
        Knob("alpha_tilde", "α̃", "α̃", swept=False),
        Knob("alpha_0", "α0", "α0"),
        Knob("beta", "β", "β"),
        Knob("gamma", "γ", "γ", swept=False),
        Knob("preference_scale", "w", "w"),
        LEARNING_RATE,
    ),
    look=Look("#D55E00", "o"),
    group="Q-Adapter",
    by_default=True,
    moves_alpha_0=True,
    family=family,
    families={
        "residual": Look("#D55E00", "o"),
        "published-code-shifted": Look("#E69F00", "P"),
        "paper": Look("#56B4E9", "v"),
        "published-code": Look("#666666", "X"),
    },
)
