"""Reinforcement learning through TRL (RLOO, GRPO) on own replies, which are token ids from prompt to reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json, write_json
from qadapter.preferences.render import end_ids
from qadapter.training.arguments import for_trl, train_to_end
from qadapter.training.sampling import GROUPED

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job

Algorithm = Literal["rloo", "grpo"]


class TokenizedRLOOTrainer(RLOOTrainer):
    """RLOOTrainer on prompts that are token ids already: nothing is tokenised again."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}


class TokenizedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer on prompts that are token ids already: nothing is tokenised again."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}


class GeneratedTokens(TrainerCallback):
    """Counts the tokens of the policy's replies; the count is part of each checkpoint."""

    FILE = "generated.json"

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: a resumed training goes on counting."""
        if state.global_step:
            self.tokens = int(read_json(self._checkpoint(args, state) / self.FILE)["tokens"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: the checkpoint of this step was written, and is sealed after this."""
        if state.is_world_process_zero:
            write_json(self._checkpoint(args, state) / self.FILE, {"tokens": self.tokens})

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def train_on_rewards(
    job: Job,
    name: str,
    algorithm: Algorithm,
    reward: Callable[[Sequence[Sequence[int]]], list[float]],
    *,
    group: int,
    beta: float,
    temperature: float,
    max_new_tokens: int | None,
) -> Trainer:
    """Train on sampled replies to the pairs' prompts, `2 · batch_size` per step, as every method reads.

    Dropout is off: with it, a reply would be scored under another policy than the one that wrote it.

    Args:
        job: the training.
        name: of the method, for progress messages.
        algorithm: TRL's trainer.
        reward: of sequences of token ids, prompt and reply; the end token is part of a reply that ended.
        group: replies per prompt.
        beta: weight of the divergence from the base, above 0: at 0 TRL would have no reference.
        temperature: of the sampling.
        max_new_tokens: as `Job.prompts_for_replies` takes it.

    Raises:
        QAdapterError: a micro-batch is no multiple of `group`, or rows are to be grouped by length.
    """
    prompts, room, arguments = job.on_prompts(group, max_new_tokens)
    if arguments.get("train_sampling_strategy") == GROUPED:  # the replies to a prompt would not come together
        raise QAdapterError(f"{name} samples its replies in groups; leave {GROUPED} out")
    counted = GeneratedTokens()

    def rewarded(prompts: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        own = torch.tensor([sum(len(ids) for ids in completion_ids)], device=trainer.accelerator.device)
        counted.tokens += int(trainer.accelerator.gather(own).sum())
        return reward([prompt + ids for prompt, ids in zip(prompts, completion_ids, strict=True)])

    config_of, trainer_of = {
        "rloo": (RLOOConfig, TokenizedRLOOTrainer),
        "grpo": (GRPOConfig, TokenizedGRPOTrainer),
    }[algorithm]
    own_ends = getattr(job.network.generation_config, "eos_token_id", None)
    # A turn's end ends a reply too; of the base's own settings nothing else is asked for (`only_as_asked`)
    job.network.generation_config = GenerationConfig(eos_token_id=end_ids(job.tokenizer, own_ends))
    trainer: Any = trainer_of(
        model=job.network,
        reward_funcs=rewarded,
        args=config_of(
            **for_trl(arguments),
            num_generations=group,
            beta=beta,
            temperature=temperature,
            max_completion_length=room,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=job.tokenizer,
        peft_config=job.lora,
        callbacks=[counted],
    )
    train_to_end(trainer, name)
    job.spent(trained=trainer.state.num_input_tokens_seen, generated=counted.tokens)
    return trainer
