"""The Q-Adapter trainer: transformers' `Trainer` with another loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from qadapter.errors import QAdapterError
from qadapter.policy import files as policy_files
from qadapter.policy.base import fit_tokenizer, load_network, load_tokenizer
from qadapter.policy.model import QAdapterForCausalLM, QAdapterOutput
from qadapter.policy.objective import BatchTotals, Objective, batch_totals
from qadapter.policy.positions import position_limit
from qadapter.policy.probe import refuse_misbehaviour, refuse_wrong_start
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.template_settings import configured
from qadapter.preferences.tokenize import PreferenceCollator, padding_id
from qadapter.training.config import QAdapterConfig, refuse_arguments
from qadapter.training.encoded_pairs import EncodedPairs, encode_dataset
from qadapter.training.sampling import by_length, in_order

__all__ = ["QAdapterConfig", "QAdapterTrainer"]

_UNCUT = 2**30  # tokens: longer than any sequence

Rows = Iterable[Mapping[str, Any] | PreferencePair] | EncodedPairs


class QAdapterTrainer(Trainer):
    """Trains a Q-Adapter on preference pairs; its interface is that of TRL's `DPOTrainer`.

    Only the loss differs. It is a mean over the pairs and response tokens of a whole optimiser step, so that 8 pairs at
    once, 8 times one pair and two processes with 4 pairs each give the same gradient (with `shift_mask`; the published
    code's mask depends on the padding of the batch).

    Logged beside Trainer's own: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`,
    `loss/preference`, `loss/regularization` and `kl/base`, means since the last log; in evaluation the same with the
    metric prefix in front, over the whole set.

    Attributes:
        quarantined: (index, reason) of the training pairs that were left out as unusable.
        quarantined_eval: the same of the evaluation data.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | QAdapterForCausalLM,
        args: QAdapterConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        """Create the policy and tokenise the data.

        Args:
            model: a base (or its name) together with `peft_config`, a PEFT model with a trainable adapter, or a policy.
            args: the objective's and the training's settings.
            train_dataset: rows as `encode_dataset` takes them, with a length.
            eval_dataset: the same, or several by name.
            processing_class: the tokenizer; loaded from beside the base if not given.
            peft_config: the adapter to put on a base.
            callbacks: Trainer's.
            optimizers: Trainer's.

        Raises:
            QAdapterError: the model or data cannot be trained; the message says why and what to change.
        """
        refuse_arguments(args)
        if train_dataset is None and eval_dataset is None:
            raise QAdapterError("Neither training nor evaluation data were given. Give train_dataset.")
        if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
            raise QAdapterError(
                f"processing_class is {type(processing_class).__name__}; expected a tokenizer of transformers'."
            )
        if args.n_gpu > 1:
            raise QAdapterError(
                f"{args.n_gpu} GPUs in one process would split pairs (DataParallel). "
                "Start with `accelerate launch`, or select one GPU with CUDA_VISIBLE_DEVICES."
            )
        objective = _objective(args)
        set_seed(args.seed)  # PEFT draws the adapter's weights
        policy = _policy(model, args, objective, peft_config)
        tokenizer = configured(
            processing_class or _tokenizer_of(policy, model, args),
            thinking=args.thinking,
            thoughts=args.thoughts,  # type: ignore[arg-type]
            template=args.chat_template_kwargs,
        )
        tokenizer = fit_tokenizer(tokenizer, policy.peft_model.get_base_model())  # type: ignore[arg-type]
        encode = _Encoder(tokenizer, _UNCUT if args.max_length is None else args.max_length)
        train_pairs = None if train_dataset is None else encode(train_dataset, "training", args.allow_truncation)
        eval_pairs: EncodedPairs | dict[str, EncodedPairs] | None = None
        if isinstance(eval_dataset, Mapping):
            eval_pairs = {name: encode(rows, f"evaluation ({name})") for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_pairs = encode(eval_dataset, "evaluation")
        every = [train_pairs, *(eval_pairs.values() if isinstance(eval_pairs, dict) else [eval_pairs])]
        for pairs in every:
            if pairs is not None:
                _refuse_misfit(policy, pairs)
        self.quarantined = [] if train_pairs is None else train_pairs.quarantined
        self.quarantined_eval = [entry for pairs in every[1:] if pairs is not None for entry in pairs.quarantined]

        super().__init__(
            model=policy,
            args=args,
            data_collator=PreferenceCollator(padding_id(tokenizer), args.pad_to_multiple_of),
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._train_sums, self._eval_sums = _Sums(), _Sums()
        self._encode = encode

    @property
    def policy(self) -> QAdapterForCausalLM:
        """The policy in training."""
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, QAdapterForCausalLM)
        return policy

    def _inner_training_loop(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's loop; what an earlier one had not logged yet is no part of this one's means."""
        self._train_sums.reset()
        return super()._inner_training_loop(*arguments, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's; rows that were not given with the trainer are tokenised as those are.

        Raises:
            QAdapterError: they cannot be evaluated.
        """
        return super().get_eval_dataloader(self._encoded(eval_dataset, "evaluation"))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`."""
        return super().get_test_dataloader(self._encoded(test_dataset, "test"))

    def _encoded(self, rows: Any, name: str) -> Any:
        if rows is None or isinstance(rows, (str, EncodedPairs)):
            return rows
        pairs = self._encode(rows, name)
        _refuse_misfit(self.policy, pairs)
        return pairs

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's hook; pairs are grouped by the tokens that they have together."""
        pairs = self.train_dataset if train_dataset is None else train_dataset
        grouped = by_length(self, pairs.lengths) if isinstance(pairs, EncodedPairs) else None
        return grouped or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Trainer's hook; pairs that are only measured stay in their order."""
        return in_order(self, eval_dataset)

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> BatchTotals | None:
        """What the loss of an optimiser step divides by, over its micro-batches and all processes."""
        if not batch_samples:
            return None
        each = [batch_totals(batch["response_mask"], self.policy.objective) for batch in batch_samples]
        pairs, length = sum(t.pairs for t in each), max(t.shifted_length for t in each)
        tokens = sum((t.tokens for t in each), start=torch.zeros((), device=device))
        if self.accelerator.num_processes > 1:
            mine = torch.stack(
                [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (pairs, tokens, length)]
            )
            everyone = self.accelerator.gather(mine[None])
            return BatchTotals(everyone[:, 0].sum(), everyone[:, 1].sum(), everyone[:, 2].max())
        return BatchTotals(pairs, tokens, length)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: BatchTotals | Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, QAdapterOutput]:
        """This batch's part of the step's loss (in evaluation: its own loss).

        Args:
            model: the policy, as Trainer wrapped it.
            inputs: a batch of `collate_pairs`.
            return_outputs: also return the policy's output.
            num_items_in_batch: the step's totals.
        """
        totals = num_items_in_batch if isinstance(num_items_in_batch, BatchTotals) else None
        output: QAdapterOutput = model(**inputs, totals=totals)
        own = batch_totals(inputs["response_mask"], self.policy.objective)
        sums = self._train_sums if self.policy.training else self._eval_sums
        sums.add(output, own, totals or own)
        assert output.loss is not None
        loss = output.loss
        if totals is not None:
            loss = loss * self.accelerator.num_processes  # gradients and logged losses are averaged over processes
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return only the loss: the logits of a whole evaluation set are not needed."""
        inputs = self._without_repeated_pairs(self._prepare_inputs(inputs))
        if len(inputs["input_ids"]) == 0:
            return torch.zeros((), device=self.args.device), None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        assert isinstance(loss, Tensor)
        return loss.detach(), None, None

    def _without_repeated_pairs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's batch without the pairs that are repeated in the last round to equalize batch sizes."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        pairs = len(inputs["input_ids"]) // 2
        own = min(max(state.remainder - self.accelerator.process_index * pairs, 0), pairs)
        return {name: torch.cat([value[:own], value[pairs : pairs + own]]) for name, value in inputs.items()}

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with the method's metrics added and the loss replaced by that of the whole set."""
        self._eval_sums.reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._eval_sums.take(self.accelerator)
        if metrics:
            metrics["loss"] = metrics["loss/preference"] + metrics["loss/regularization"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})  # type: ignore[union-attr]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the method's metrics beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._train_sums.take(self.accelerator)}
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter; a checkpoint does not contain the base."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, folder: str) -> None:
        policy = self.policy
        policy_files.load_adapter_weights(policy.peft_model, Path(folder), policy.trained_adapter())


class _Sums:
    """Sums of logged values as one tensor, so that the host waits for the device only when a log is written."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """Set all sums to zero."""
        self._sums = None

    def add(self, output: QAdapterOutput, own: BatchTotals, divisors: BatchTotals) -> None:
        """Add a batch whose losses were divided by `divisors`."""
        parts = output.pairwise
        assert parts is not None
        with torch.no_grad():
            chosen, rejected = parts.chosen_rewards, parts.rejected_rewards
            numbers = [
                torch.as_tensor(own.pairs, device=chosen.device),
                torch.as_tensor(own.tokens, device=chosen.device),
                chosen.sum(),
                rejected.sum(),
                (chosen > rejected).sum(),
                parts.preference_loss * divisors.pairs,
                parts.regularization * divisors.tokens,
                parts.kl * divisors.tokens,
            ]
            batch = torch.stack([number.detach().float() for number in numbers])
            self._sums = batch if self._sums is None else self._sums + batch

    def take(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes since the last time, by metric name; empty if there was no batch."""
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum").tolist()
        self.reset()
        pairs, tokens, chosen, rejected, correct, preference, regularization, kl = sums
        return {
            "rewards/chosen": chosen / pairs,
            "rewards/rejected": rejected / pairs,
            "rewards/accuracies": correct / pairs,
            "rewards/margins": (chosen - rejected) / pairs,
            "loss/preference": preference / pairs,
            "loss/regularization": regularization / tokens,
            "kl/base": kl / tokens,
        }


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, rows: Rows, name: str, allow_truncation: bool | None = None) -> EncodedPairs:
        if isinstance(rows, EncodedPairs):
            return rows
        if not hasattr(rows, "__len__"):
            raise QAdapterError(f"The {name} data have no length. Give a list or a datasets.Dataset, not a stream.")
        return encode_dataset(rows, self._tokenizer, self._max_length, name, allow_truncation=allow_truncation)


def _objective(args: QAdapterConfig) -> Objective:
    try:
        return args.to_objective()
    except ValueError as error:
        raise QAdapterError(f"QAdapterConfig: {error}") from error


def _policy(
    model: str | PreTrainedModel | PeftModel | QAdapterForCausalLM,
    args: QAdapterConfig,
    objective: Objective,
    peft_config: PeftConfig | None,
) -> QAdapterForCausalLM:
    if isinstance(model, str):
        model = load_network(model, **(args.model_init_kwargs or {}))
    fresh = peft_config is not None
    if isinstance(model, (QAdapterForCausalLM, PeftModel)):
        if peft_config is not None:
            raise QAdapterError(
                "The model carries an adapter already and peft_config asks for another. Give one of the two."
            )
        if isinstance(model, QAdapterForCausalLM):
            model.trained_adapter()  # what training would leave out of it is refused: other adapters, other weights
        peft_model = model.peft_model if isinstance(model, QAdapterForCausalLM) else model
        policy = QAdapterForCausalLM(peft_model, objective)
    elif peft_config is None:
        raise QAdapterError(
            f"{type(model).__name__} has no adapter to train. Give peft_config (for example peft.LoraConfig), "
            "or a PEFT model."
        )
    else:
        refuse_misbehaviour(model, type(model).__name__)
        policy = QAdapterForCausalLM.from_base(model, peft_config, objective)
    if args.loss_implementation not in ("fused", "readable"):
        raise QAdapterError(f"loss_implementation is {args.loss_implementation!r}; expected 'fused' or 'readable'.")
    policy.loss_implementation = args.loss_implementation  # type: ignore[assignment]
    policy.trained_adapter()
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise QAdapterError(
            "The adapter is frozen: none of its parameters is trainable. Load it with is_trainable=True."
        )
    refuse_wrong_start(policy, fresh)
    return policy


def _tokenizer_of(policy: QAdapterForCausalLM, model: Any, args: QAdapterConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the base; of a base that was given by name, in the same revision and with the same trust."""
    place = policy.config.name_or_path
    given = (args.model_init_kwargs or {}) if isinstance(model, str) else {}
    same = {name: given[name] for name in ("revision", "trust_remote_code") if name in given}
    try:
        if not place:
            raise QAdapterError("it was made in memory")
        return load_tokenizer(place, **same)
    except QAdapterError as error:
        raise QAdapterError(
            f"There is no tokenizer with the base ({place or 'made in memory'}). Give processing_class. ({error})"
        ) from error


def _refuse_misfit(policy: QAdapterForCausalLM, pairs: EncodedPairs) -> None:
    embeddings: Any = policy.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if pairs.largest_id >= vocabulary:
        raise QAdapterError(
            f"The tokenizer makes token id {pairs.largest_id}, but the base has only {vocabulary} embeddings. "
            "Use the tokenizer the base was trained with."
        )
    positions = position_limit(policy.config)
    if positions is not None and pairs.longest > positions:
        raise QAdapterError(
            f"A pair is {pairs.longest} tokens long, but the base knows only {positions} positions. "
            f"Set max_length to {positions} or less."
        )
