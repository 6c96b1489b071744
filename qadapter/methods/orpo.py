"""ORPO (Hong et al., 2024), through TRL: fine-tuning on the chosen reply and an odds ratio, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class ORPOSettings(MethodSettings):
    """`beta`: the weight of the odds ratio, the paper's λ."""

    beta: Positive = 0.1


def train(job: Job, choice: ORPOSettings) -> Trainer:
    """Train on pairs; the base is not consulted."""
    import warnings

    from datasets import Dataset

    from qadapter.training.arguments import for_trl, train_to_end

    with warnings.catch_warnings():  # TRL says that it may change without notice; constraints.txt pins it
        warnings.filterwarnings("ignore", message=".*trl.experimental")
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class TokenizedORPOTrainer(ORPOTrainer):
        """ORPOTrainer on pairs that are token ids already: nothing is tokenised again, and so nothing is cut again."""

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    pairs, arguments = job.on_pairs()
    rows: dict[str, list[list[int]]] = {}
    for side in ("chosen", "rejected"):
        replies = [pair.chosen_ids if side == "chosen" else pair.rejected_ids for pair in pairs]
        both = [(pair.prompt_ids, reply) for pair, reply in zip(pairs, replies, strict=True)]
        rows[f"{side}_input_ids"] = [prompt + reply for prompt, reply in both]
        rows[f"{side}_attention_mask"] = [[1] * (len(prompt) + len(reply)) for prompt, reply in both]
        rows[f"{side}_labels"] = [[-100] * len(prompt) + reply for prompt, reply in both]
    trainer = TokenizedORPOTrainer(
        model=job.network,
        args=ORPOConfig(
            **for_trl(arguments),
            max_length=job.max_length,
            beta=choice.beta,
            disable_dropout=False,  # TRL's default would switch the adapter's dropout off in this method alone
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    return train_to_end(trainer, METHOD.name)


METHOD = Method(
    name="orpo",
    settings=ORPOSettings,
    train=train,
    passes=2.0,  # the adapted model's forward pass and one backward; no reference
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#8C510A", "H"),
    group="preference losses",
    strength="beta",
)
