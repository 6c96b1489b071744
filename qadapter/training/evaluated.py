"""Evaluation while an adapter trains, on pairs that are set aside: curves, early stopping, the best checkpoint.

The held-out pairs of the experiment are not used: a checkpoint that was chosen on them would be measured too well.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from qadapter.config.training import AdapterTraining
from qadapter.errors import QAdapterError
from qadapter.preferences.pair import PreferencePair

log = logging.getLogger(__name__)

_OF_TIME = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")
_SMALLER_IS_BETTER = ("loss", "kl", "perplexity", "entropy", "nll")


@dataclass(frozen=True)
class Aside:
    """What is evaluated while a training runs.

    Attributes:
        pairs: number of all pairs of the training.
        held: number of those at their end that are set aside.
        settings: how often, and what is done with the result.
    """

    pairs: int
    held: int
    settings: AdapterTraining


_aside: ContextVar[Aside | None] = ContextVar("what is evaluated while a training runs", default=None)


@contextmanager
def evaluating_while_training(aside: Aside | None) -> Iterator[None]:
    """Let the training in this block evaluate; None: it does not."""
    token = _aside.set(aside)
    try:
        yield
    finally:
        _aside.reset(token)


def set_aside(pairs: Sequence[PreferencePair], count: int) -> tuple[list[int], int]:
    """Choose pairs to evaluate: whole prompts, by their digests.

    Args:
        pairs: the training pairs.
        count: how many to set aside at least.

    Returns:
        A new order of the pairs, as indices, and how many pairs at its end are set aside.

    Raises:
        QAdapterError: nothing would be left to train on.
    """
    sizes = Counter(pair.prompt_digest for pair in pairs)
    held: set[str] = set()
    size = 0
    for digest in sorted(sizes):
        if size >= count:
            break
        held.add(digest)
        size += sizes[digest]
    if size >= len(pairs):
        raise QAdapterError(
            f"training.eval_pairs sets aside {size} of {len(pairs)} training pairs (whole prompts), so none is left to "
            "train on; set a smaller number"
        )
    places = range(len(pairs))
    kept = [i for i in places if pairs[i].prompt_digest not in held]
    return kept + [i for i in places if pairs[i].prompt_digest in held], size


def larger_is_better(metric: str) -> bool:
    """Whether a larger value of an evaluation's metric is better, by its name."""
    return not any(part in metric.lower().replace("/", "_").split("_") for part in _SMALLER_IS_BETTER)


def prepare_evaluation(trainer: Trainer, name: str) -> None:
    """Set a trainer up for the evaluation that `evaluating_while_training` asks for.

    The rows that its method made of the pairs that are set aside become its evaluation data.

    Args:
        trainer: with rows for whole pairs: row i belongs to pair i modulo their number.
        name: of the method, for messages.

    Raises:
        QAdapterError: the method's rows are none of pairs.
    """
    aside, rows = _aside.get(), trainer.train_dataset
    if aside is None:
        return
    count = len(rows)  # type: ignore[arg-type]
    if count % aside.pairs:
        raise QAdapterError(
            f"training.eval_steps: the method {name} trains on {count} rows that it makes itself, not on the "
            f"{aside.pairs} pairs, so none can be set aside for evaluation; leave eval_steps out"
        )
    first = aside.pairs - aside.held
    held = [i for i in range(count) if i % aside.pairs >= first]
    kept = [i for i in range(count) if i % aside.pairs < first]
    trainer.train_dataset, trainer.eval_dataset = rows.select(kept), rows.select(held)  # type: ignore[union-attr]
    evaluate_while_training(trainer, aside.settings)
    every = aside.settings.eval_steps
    log.info("%s: evaluates every %s steps on %d of its %d pairs", name, every, aside.held, aside.pairs)


def evaluate_while_training(trainer: Trainer, settings: AdapterTraining) -> None:
    """Let a trainer evaluate its `eval_dataset` every `eval_steps`, keep the best checkpoint and stop early."""
    args = trainer.args
    args.eval_strategy = IntervalStrategy.STEPS
    args.eval_steps = settings.eval_steps
    args.eval_on_start = True
    args.per_device_eval_batch_size = args.per_device_train_batch_size
    if (metric := settings.chosen_by) is not None:
        args.metric_for_best_model = f"eval_{metric}"
        args.greater_is_better = larger_is_better(metric)
        args.load_best_model_at_end = True
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, settings.eval_steps  # type: ignore[assignment]
        trainer.add_callback(RequireMetric(metric))
        if settings.early_stopping is not None:
            trainer.add_callback(StopEarly(settings.early_stopping))


def evaluation_row(entry: Mapping[str, float]) -> dict[str, float] | None:
    """A point of the evaluation's curves: {"step": n, "eval/loss": value, ...}; None if the entry is none.

    Args:
        entry: what Trainer logged, with its step. Times are left out: a resumed training has others.
    """
    found = {name.removeprefix("eval_"): value for name, value in sorted(entry.items()) if name.startswith("eval_")}
    values = {f"eval/{name}": value for name, value in found.items() if name not in _OF_TIME}
    return {"step": entry["step"], **values} if values else None


class RequireMetric(TrainerCallback):
    """Refuses a metric that the evaluation does not have, before the first step."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Trainer's hook: after each evaluation.

        Raises:
            QAdapterError: the evaluation has no such metric.
        """
        names = sorted(name.removeprefix("eval_") for name in metrics or {} if name.startswith("eval_"))
        if self.metric not in names:
            known = ", ".join(name for name in names if name not in _OF_TIME)
            raise QAdapterError(f"training.best_by: the evaluation has no {self.metric!r}; it has {known}")


class StopEarly(TrainerCallback):
    """Stops a training when so many evaluations in a row were no better than the best one.

    It counts in the log, which a checkpoint holds, so that a resumed training stops where an undisturbed one does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Trainer's hook: after each evaluation."""
        if state.global_step and waited(state, args) >= self.patience:
            log.info("%s was no better in %d evaluations: stops early", args.metric_for_best_model, self.patience)
            control.should_training_stop = True
        return control


def waited(state: TrainerState, args: TrainingArguments) -> int:
    """Evaluations since the best one, by `metric_for_best_model`; the one before the first step does not count."""
    name = str(args.metric_for_best_model)
    values = [float(entry[name]) for entry in state.log_history if name in entry and entry["step"] > 0]
    if not values:
        return 0
    best = max(values) if args.greater_is_better else min(values)
    return len(values) - 1 - values.index(best)


def stopped_early(trainer: Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint is that at which an early stop ended the training; the trainer then has the best weights."""
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, StopEarly)]
    if not callbacks or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if waited(state, trainer.args) < callbacks[0].patience or state.best_model_checkpoint is None:
        return False
    trainer.state = state
    trainer._load_best_model()
    return True
