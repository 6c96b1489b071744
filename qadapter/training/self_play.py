"""Self-play (SPIN): pairs of a given reply and a reply of the opponent, which is the policy of an earlier step.

An iteration begins by making the policy its own opponent: a copy of the adapter's weights, and one reply per prompt.
Both are written beside the checkpoints, so that a resumed training has the same opponent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qadapter.errors import QAdapterError
from qadapter.inference.continuations import continue_ids
from qadapter.preferences.tokenize import EncodedPair, collate_pairs, padding_id
from qadapter.training.arguments import train_to_end
from qadapter.training.pair_trainer import PairTrainer, Scores, pair_trainer

if TYPE_CHECKING:
    from qadapter.training.adapt import Job


class SelfPlayTrainer(PairTrainer):
    """PairTrainer whose rejected replies and whose reference are the opponent's.

    Attributes:
        job: the training.
        prompts: token ids of each pair's prompt, with room for the opponent's replies.
        iterations: equal parts of the training's steps; iteration k begins before step `first_step(k)`.
        sampling: arguments of `continue_ids` for the opponent's replies.
    """

    def __init__(
        self,
        *arguments: Any,
        job: Job,
        prompts: list[list[int]],
        iterations: int,
        sampling: Mapping[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.job, self.prompts, self.iterations, self.sampling = job, prompts, iterations, dict(sampling)
        self.opponent: dict[str, Tensor] = {}
        self.replies: dict[int, list[list[int]]] = {}
        self._iteration = -1

    def first_step(self, iteration: int) -> int:
        """Steps that are done when an iteration begins."""
        return self.job.steps * iteration // self.iterations

    def iteration_at(self, step: int) -> int:
        """The iteration of the step that follows `step` steps."""
        return max(k for k in range(self.iterations) if self.first_step(k) <= step)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        count = torch.tensor([sum(len(batch["index"]) for batch in batch_samples)], dtype=torch.float32, device=device)
        return self.accelerator.gather(count).sum()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Pair the chosen replies of a batch of indices with the opponent's, which change while batches are loaded."""
        step = self.state.global_step
        if (iteration := self.iteration_at(step)) != self._iteration:
            self._begin(iteration, model)
        pairs = [self.pair(index) for index in inputs["index"].tolist()]
        batch = collate_pairs(pairs, padding_id(self.job.tokenizer))
        read = self.accelerator.gather(batch["attention_mask"].sum()[None].to(self.accelerator.device))
        self.state.num_input_tokens_seen += int(read.sum())  # kept in checkpoints
        return super().training_step(model, batch, num_items_in_batch)

    def pair(self, index: int) -> EncodedPair:
        """A chosen reply with one of the opponent's: from the second iteration on, half of them are the last one's."""
        chosen = self.job.encoded[index].chosen_ids
        iteration = self._iteration - (self._iteration > 0 and (self.state.global_step + index) % 2)
        return EncodedPair(self.prompts[index], chosen, self.replies[iteration][index])

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Within it, the adapter has the opponent's weights."""
        parameters = self._adapter(model)
        own = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self.opponent[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    def _adapter(self, model: nn.Module) -> dict[str, nn.Parameter]:
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        return {name: parameter for name, parameter in unwrapped.named_parameters() if parameter.requires_grad}

    def _begin(self, iteration: int, model: nn.Module) -> None:
        """Make the policy its own opponent; in the middle of an iteration, the one that it had."""
        if self.state.global_step > self.first_step(iteration):
            self.opponent = {
                name: weights.to(self.accelerator.device)
                for name, weights in load_file(self._file(iteration, "safetensors")).items()
            }
        else:
            self.opponent = {name: weights.detach().clone() for name, weights in self._adapter(model).items()}
            unwrapped = self.accelerator.unwrap_model(model)
            seed = self.job.seed * 1_000 + iteration
            replies = continue_ids(unwrapped, self.job.tokenizer, self.prompts, seed=seed, **self.sampling)
            if self.is_world_process_zero():
                self._write(iteration, replies)
            self.replies[iteration] = replies
        for k in range(max(0, iteration - 1), iteration + 1):
            if k not in self.replies:
                self.replies[k] = self.read_replies(k)
        self._iteration = iteration

    def _file(self, iteration: int, ending: str) -> Path:
        return Path(str(self.args.output_dir), f"opponent-{iteration}.{ending}")

    def _write(self, iteration: int, replies: Sequence[Sequence[int]]) -> None:
        """Whole or not at all: the training can be killed in between."""
        Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
        weights, texts = self._file(iteration, "safetensors"), self._file(iteration, "json")
        save_file({name: one.cpu().contiguous() for name, one in self.opponent.items()}, weights.with_suffix(".new"))
        weights.with_suffix(".new").replace(weights)
        texts.with_suffix(".new").write_text(json.dumps(replies), encoding="utf-8")
        texts.with_suffix(".new").replace(texts)

    def read_replies(self, iteration: int) -> list[list[int]]:
        """The opponent's replies of an iteration that has begun, as token ids, one for each pair."""
        found: list[list[int]] = json.loads(self._file(iteration, "json").read_text(encoding="utf-8"))
        return found


def _batch(indices: Sequence[int]) -> dict[str, Tensor]:
    return {"index": torch.tensor(indices)}


def train_against_itself(
    job: Job, name: str, *, beta: float, iterations: int, temperature: float, max_new_tokens: int | None
) -> SelfPlayTrainer:
    """Train with DPO's loss on the chosen replies and the opponent's, relative to the opponent.

    Args:
        job: the training.
        name: of the method, for progress messages.
        beta: DPO's β.
        iterations: see `SelfPlayTrainer`.
        temperature: of the opponent's replies.
        max_new_tokens: as `Job.prompts_for_replies` takes it.

    Raises:
        QAdapterError: there are more iterations than steps.
    """
    if job.steps < iterations:
        raise QAdapterError(f"{name} has {iterations} iterations and the training only {job.steps} steps; set fewer")

    def loss(scores: Scores, _: object) -> Tensor:
        chosen, own = scores.log_ratios.sum(dim=1).chunk(2)
        return -logsigmoid(beta * (chosen - own)).sum()

    prompts, room = job.prompts_for_replies(max_new_tokens)
    sampling = {"temperature": temperature, "max_new_tokens": room, "batch_size": 64}
    trainer = pair_trainer(
        job,
        loss,
        "pairs",
        trainer_of=SelfPlayTrainer,
        dataset=range(len(job.encoded)),
        lengths=[len(prompt) + len(reply) for prompt, reply in job.chosen()],  # the opponent's are made later
        collator=_batch,
        further={"job": job, "prompts": prompts, "iterations": iterations, "sampling": sampling},
    )
    assert isinstance(trainer, SelfPlayTrainer)
    train_to_end(trainer, name)
    generated = sum(len(reply) for k in range(iterations) for reply in trainer.read_replies(k))
    job.spent(trained=trainer.state.num_input_tokens_seen, generated=generated)
    return trainer
