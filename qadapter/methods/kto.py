"""KTO (Ethayarajh et al., 2024), through TRL: single replies with a label, with the base as the reference policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class KTOSettings(MethodSettings):
    """`beta`: the strength of the pull back to the base.

    `desirable_weight`, `undesirable_weight`: of good and bad replies; None makes up for unequal numbers of them.
    """

    beta: Positive = 0.1
    desirable_weight: Positive | None = None
    undesirable_weight: Positive | None = None


def train(job: Job, choice: KTOSettings) -> Trainer:
    """Train on each reply with its label; a pair is a good and a bad row."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    from qadapter.training.arguments import for_trl, train_to_end

    class MismatchingCollator(DataCollatorForUnpairedPreference):
        """Pairs each prompt of a micro-batch with the reply of the row before it, for the KL term's estimate.

        TRL does so once, before training, so that it must read its rows in a fixed order.
        """

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            replies = mismatched([example["completion_ids"] for example in examples])
            rows = [{**row, "KL_completion_ids": ids} for row, ids in zip(examples, replies, strict=True)]
            return dict(super().torch_call(rows))

    class TokenizedKTOTrainer(KTOTrainer):
        """KTOTrainer on rows that are token ids already, in the random order of the other methods."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    rows, arguments = job.on_labelled()
    order = arguments.pop("train_sampling_strategy", "random")  # TRL takes none but its own
    good = sum(label for _, _, label in rows)
    weights = balanced(good, len(rows) - good, choice)
    # The micro-batches of the first epoch are mixed by the sampler; the order here is what the seed gives it to mix.
    if not job.held:  # else the rows of a pair have to be found by their places
        random.Random(arguments["data_seed"]).shuffle(rows)
    trainer = TokenizedKTOTrainer(
        model=job.network,
        args=KTOConfig(
            **for_trl(arguments),
            max_length=None,
            beta=choice.beta,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            disable_dropout=False,  # TRL's default would switch the adapter's dropout off in this method alone
        ),
        data_collator=MismatchingCollator(pad_token_id=job.tokenizer.pad_token_id),
        train_dataset=Dataset.from_dict(
            {
                "prompt_ids": [prompt for prompt, _, _ in rows],
                "completion_ids": [reply for _, reply, _ in rows],
                "label": [label for _, _, label in rows],
            }
        ),
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    trainer.args.train_sampling_strategy = order
    return train_to_end(trainer, METHOD.name)


def mismatched(replies: Sequence[list[int]]) -> list[list[int]]:
    """Each row's reply of the row before it; the first row gets the last one's."""
    return [*replies[-1:], *replies[:-1]]


def balanced(good: int, bad: int, choice: KTOSettings) -> tuple[float, float]:
    """The weights of good and bad replies: what is not set is such that both labels weigh the same in all."""
    desirable, undesirable = choice.desirable_weight, choice.undesirable_weight
    if not good or not bad:
        return desirable or 1.0, undesirable or 1.0
    if desirable is None and undesirable is None:  # the rarer label's weight is raised
        return max(1.0, bad / good), max(1.0, good / bad)
    if desirable is None:
        return bad * (undesirable or 1.0) / good, undesirable or 1.0
    return desirable, good * desirable / bad if undesirable is None else undesirable


METHOD = Method(
    name="kto",
    settings=KTOSettings,
    train=train,
    passes=5.0,  # forward passes of base and adapted model on the reply and on another row's, and one backward
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE, Knob("desirable_weight", "wD", "weight of good replies")),
    look=Look("#BBAA00", "8"),
    group="preference losses",
    strength="beta",
    takes_single=True,
)
