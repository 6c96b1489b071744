"""`qadapter train`: from preference data to a folder with an adapter, what it learnt and how."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.command.opened import RECORD, as_base, note, open_base
from qadapter.command.options import TrainOptions
from qadapter.command.retaining import ask, compared, own_benchmarks
from qadapter.command.score import score_both
from qadapter.command.speaking import look_at_answers
from qadapter.config.training import DEFAULT_EVAL_PAIRS
from qadapter.errors import QAdapterError
from qadapter.evaluation.distance import far_from_base
from qadapter.evaluation.preference import margins, preference_metrics
from qadapter.evaluation.prompts import by_prompt
from qadapter.evaluation.statistics import mean_interval
from qadapter.export.card import Exported, write_card
from qadapter.export.facts import FACTS, Facts, Measurement
from qadapter.export.known import read_facts
from qadapter.files.artifacts import read_json, storage_errors, write_json, write_json_lines
from qadapter.files.yaml_text import read_yaml
from qadapter.inference.pair_scores import won
from qadapter.planning.small import MOST_PASSES, Knobs, passes, too_small
from qadapter.policy.adapters import fitted
from qadapter.policy.dial import AS_TRAINED
from qadapter.policy.loading import lora_config
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair, load_pairs
from qadapter.preferences.prepare import PreparationSummary, prepare
from qadapter.preferences.stream import first_usable_pair
from qadapter.training.arguments import (
    measured_cost,
    name_for_trackers,
    save_weights,
    tokens_seen,
    trainer_arguments,
    watch_checkpoints,
    write_training_record,
)
from qadapter.training.checkpoints import last_checkpoint, trained_to_the_end
from qadapter.training.config import QAdapterConfig
from qadapter.training.encoded_pairs import EncodedPairs, encode_dataset
from qadapter.training.evaluated import evaluate_while_training, set_aside, stopped_early
from qadapter.training.trainer import QAdapterTrainer

METRICS = "metrics.json"  # written last: a folder that has it is finished
_NO_PART_OF_THE_RESULT = {"output", "resume", "overwrite", "logging_steps", "save_steps", "report_to"}


def run(options: TrainOptions) -> None:
    """Train, evaluate, save. `docs/command.md` lists the files.

    Raises:
        QAdapterError: data, base or settings that cannot be used, or an output folder that holds something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QAdapterError(
            "the command trains in one process, but WORLD_SIZE is set for several; for several GPUs write a script "
            "around QAdapterTrainer and start it with accelerate launch"
        )
    out = Path(options.output)
    resuming = _check_output(out, options)
    if resuming and (out / METRICS).is_file():
        note(f"{out} is finished already")
        _print_outcome(out, read_json(out / METRICS))
        return
    options.check_trackers()
    own = own_benchmarks(options.retain)
    files = heldout_files = None
    if not resuming:
        files = options.located(options.data, options.split)
        first_usable_pair(files, options.domain, options.max_chars, Choices.of(options))
        if options.heldout_data or options.heldout_split:
            heldout_files = options.located(options.heldout_data or options.data, options.heldout_split)
    adapter = lora_config(options.lora_settings())
    network, tokenizer = open_base(options.base, options.model_settings())
    fitted(adapter, network, "--target-modules")
    if files is not None:  # nothing of an earlier training is deleted before data and base are seen to be usable
        with storage_errors(out):
            _start_anew(out, options)
        prepare(
            files,
            out / "data",
            domain=options.domain,
            heldout=options.heldout,
            heldout_files=heldout_files,
            seed=options.seed,
            max_train_pairs=options.max_train_pairs,
            max_heldout_pairs=options.max_heldout_pairs,
            max_chars=options.max_chars,
            choices=Choices.of(options),
        )
    _describe_data(out / "data")
    with storage_errors(out):
        _train(options, out, network, tokenizer, own)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    _print_outcome(out, read_json(out / METRICS))


def _train(
    options: TrainOptions,
    out: Path,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own: Mapping[str, Path],
) -> None:
    heldout = load_pairs(out / "data" / "heldout.jsonl")
    allowed = options.allow_truncation
    train_pairs, aside = _apart(load_pairs(out / "data" / "train.jsonl"), options)
    train_set = encode_dataset(train_pairs, tokenizer, options.max_length, "training", allow_truncation=allowed)
    heldout_set = encode_dataset(heldout, tokenizer, options.max_length, "held-out") if heldout else None
    _write_unused(out / "unused.jsonl", train_set, heldout_set)
    # As in the pipeline: an explicit number of steps, the last one of an epoch with what is left of the pairs.
    epochs = options.epochs or fitting_epochs(len(train_set), options.batch_size)
    steps = options.max_steps or math.ceil(len(train_set) / options.batch_size * epochs)
    say_small(options, len(train_set), len(heldout), steps, epochs)
    settings = options.model_copy(update={"max_steps": steps, "epochs": epochs})
    arguments = trainer_arguments(settings, seed=options.seed, scratch=out / "checkpoints")
    arguments |= {"disable_tqdm": False, "per_device_eval_batch_size": options.micro_batch}
    trainer = QAdapterTrainer(
        model=network,
        args=QAdapterConfig(**options.objective(), **arguments),
        train_dataset=train_set,
        eval_dataset=encode_dataset(aside, tokenizer, options.max_length, "set aside") if aside else heldout_set,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora_settings()),
    )
    if aside:
        evaluate_while_training(trainer, options)
        note(f"evaluation: every {options.eval_steps} steps, on {len(aside)} training pairs that are set aside")
    checkpoint = last_checkpoint(out / "checkpoints")
    watch_checkpoints(trainer, "training", checkpoint)
    name_for_trackers(trainer, _label(out))
    before = None
    if own:
        with as_base(trainer.policy):
            before = ask(trainer.policy, tokenizer, own, options.micro_batch)
    note(f"training: {steps} steps of {options.batch_size} pairs" + (f", from {checkpoint}" if checkpoint else ""))
    with measured_cost() as cost:
        if checkpoint is None or not (stopped_early(trainer, checkpoint) or trained_to_the_end(trainer, checkpoint)):
            trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
            trainer.train(resume_from_checkpoint=checkpoint)
    steps, history = trainer.state.global_step, list(trainer.state.log_history)
    save_weights(trainer, out)
    metrics = _evaluate(trainer, heldout, heldout_set, options) if heldout else {}
    if aside:
        trainer.state.log_history = history  # the curve of the pairs set aside has no point of the held-out ones
    if before is not None:
        metrics |= compared(before, ask(trainer.policy, tokenizer, own, options.micro_batch), out)
    metrics |= train_set.truncation.metrics()
    _write_card(out, options, metrics, len(heldout))
    write_training_record(out, trainer, cost, tokens_seen(train_set.lengths, steps, options.batch_size), **metrics)


def _label(out: Path) -> str:
    """Folder and time of the start, which a resumed training keeps and one that overwrites it does not."""
    began = datetime.fromtimestamp((out / RECORD).stat().st_mtime).astimezone()
    return f"{out.absolute().name} {began:%Y-%m-%d %H.%M.%S}"


def _apart(pairs: list[PreferencePair], options: TrainOptions) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to train on, and those that the training evaluates.

    Raises:
        QAdapterError: none would be left to train on.
    """
    if not options.eval_steps:
        return pairs, []
    order, held = set_aside(pairs, options.eval_pairs or DEFAULT_EVAL_PAIRS)
    return [pairs[i] for i in order[:-held]], [pairs[i] for i in order[-held:]]


def _write_card(out: Path, options: TrainOptions, metrics: dict[str, float], heldout: int) -> None:
    """The facts of this training, and the model card that says them."""
    learnt, forgotten = [], []
    if (name := "adaptation/implied_reward_accuracy") in metrics:
        low, high = metrics.pop(f"{name}/low"), metrics.pop(f"{name}/high")
        learnt.append(
            Measurement(
                "held-out pairs whose chosen reply gained more than the rejected one",
                metrics[name],
                low,
                high,
                int(metrics["adaptation/n"]),
                0.5,
            )
        )
        kl = metrics["heldout/kl/base"]
        forgotten.append(
            Measurement("KL to the base on held-out pairs, nats per token", kl, items=heldout, of_base=0.0)
        )
    facts = Facts("", dial=str(AS_TRAINED), learnt=tuple(learnt), forgotten=tuple(forgotten))
    write_json(out / FACTS, facts.to_json())
    write_card(out, read_facts(out, options.base), Exported("adapter"))


def fitting_epochs(pairs: int, batch_size: int) -> float:
    """Passes over the data where none are named: one, or for few pairs as many as give `ENOUGH_STEPS`, at most 10."""
    return float(min(MOST_PASSES, max(1, passes(pairs, batch_size))))


def say_small(options: TrainOptions, train: int, heldout: int, steps: int, epochs: float) -> None:
    """Before a training that is too small to show anything: what is small, and what to set."""
    if not options.max_steps and options.epochs is None and epochs > 1:
        note(f"{train} pairs are few: {epochs:g} passes over them make {steps} steps (--epochs sets another number)")
    by_steps = "--max-steps {}" if options.max_steps else None
    knobs = Knobs(by_steps, "--epochs {}", "--batch-size {}", "--heldout {}", "--heldout-data")
    for sentence in too_small(knobs, pairs=train, steps=steps, batch_size=options.batch_size, heldout=heldout):
        note(f"WARNING: {sentence}")
    if steps < options.logging_steps:
        note(f"  fewer steps than --logging-steps {options.logging_steps}: give --logging-steps 1 for a curve")


def _evaluate(
    trainer: QAdapterTrainer, heldout: list[PreferencePair], encoded: Any, options: TrainOptions
) -> dict[str, float]:
    """The objective on the held-out pairs (`heldout/…`), and the pipeline's measures of them (`adaptation/…`).

    Raises:
        QAdapterError: the training diverged.
    """
    evaluated = trainer.evaluate(encoded)
    names = [name for name in evaluated if name.startswith(("eval_rewards/", "eval_loss", "eval_kl/"))]
    metrics = {f"heldout/{name.removeprefix('eval_')}": float(evaluated[name]) for name in names}
    if not all(map(math.isfinite, metrics.values())):
        raise QAdapterError(
            f"the training diverged: the held-out loss is {metrics['heldout/loss']}; lower --learning-rate and start "
            "again with --overwrite"
        )
    if far := far_from_base(metrics.get("heldout/kl/base")):
        note(f"WARNING: the policy is {far}. Lower --learning-rate, train fewer steps, or take --preset residual.")
    tokenizer: Any = trainer.processing_class
    scores, base_scores = score_both(
        trainer.policy, tokenizer, heldout, max_length=options.max_length, batch_size=options.micro_batch
    )
    metrics |= {f"adaptation/{name}": value for name, value in preference_metrics(scores, base_scores).items()}
    prompts = by_prompt([heldout[place].prompt_digest for place in scores.indices], scores.indices.tolist())
    wins = prompts.means(won(margins(scores, base_scores)))
    sure = mean_interval(wins, weights=prompts.pairs)  # for the card; its ends are no metrics of the training
    metrics |= {f"adaptation/implied_reward_accuracy/{end}": getattr(sure, end) for end in ("low", "high")}
    speech = look_at_answers(
        trainer.policy,
        tokenizer,
        heldout,
        count=options.answers,
        max_length=options.max_length,
        batch_size=options.micro_batch,
    )
    return metrics | {f"adaptation/{name}": value for name, value in speech.items()}


# ---- the output folder ------------------------------------------------------------------------------------------


def _check_output(out: Path, options: TrainOptions) -> bool:
    """Whether to resume an existing training in the folder.

    Raises:
        QAdapterError: it holds something that must not be touched, or a training with other settings.
    """
    if out.exists() and not out.is_dir():
        raise QAdapterError(f"--output {out} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not (out / RECORD).is_file():
        raise QAdapterError(f"{out} is not empty and holds no training (no {RECORD}); give another --output")
    if options.resume:
        _require_same_settings(out / RECORD, options)
        return (out / "data" / "summary.json").is_file()  # written when the data are whole
    finished, begun = (out / METRICS).is_file(), last_checkpoint(out / "checkpoints") is not None
    if (finished or begun) and not options.overwrite:
        what, way = ("a finished training", "") if finished else ("an unfinished training", "--resume to continue, ")
        raise QAdapterError(f"{out} holds {what}; add {way}--overwrite to train anew, or give another --output")
    return False


def _record(options: TrainOptions) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude={"resume", "overwrite"})


def _require_same_settings(file: Path, options: TrainOptions) -> None:
    before, now = read_yaml(file.read_text(encoding="utf-8")), _record(options)
    names = (before.keys() | now.keys()) - _NO_PART_OF_THE_RESULT
    if changed := sorted(name for name in names if before.get(name) != now.get(name)):
        listed = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed)
        raise QAdapterError(
            f"--resume needs the settings of the start, but {listed}; use --config {file}, or --overwrite in place of "
            "--resume to train anew"
        )


def _start_anew(out: Path, options: TrainOptions) -> None:
    """An empty folder but for the record of what was asked for."""
    if (out / RECORD).is_file():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_record(options), sort_keys=False, allow_unicode=True)
    (out / RECORD).write_text(f"# qadapter train --config {RECORD}\n{text}", encoding="utf-8")


def _write_unused(file: Path, train_set: EncodedPairs, heldout_set: EncodedPairs | None) -> None:
    """The pairs that are nothing within the maximal length, by side and place in its file, with the reason."""
    sides = {"train": train_set.quarantined, "heldout": heldout_set.quarantined if heldout_set else []}
    rows = [{"side": side, "pair": index, "reason": why} for side, left in sides.items() for index, why in left]
    write_json_lines(file, rows)


# ---- what people read -------------------------------------------------------------------------------------------


def _describe_data(folder: Path) -> None:
    summary = PreparationSummary.load(folder / "summary.json")
    formats = ", ".join(sorted(set(summary.formats.values())))
    note(f"data: {summary.read} pairs read ({formats}), {summary.used} used, {summary.read - summary.used} quarantined")
    for reason, count in summary.quarantined.items():
        note(f"  {count} quarantined: {reason}")
    if summary.quarantined:
        note(f"  line by line: {folder / 'quarantine.jsonl'}")
    note(
        f"  {summary.train_pairs} to train on, {summary.heldout_pairs} held out, {summary.duplicates} duplicates, "
        f"{summary.cross_split_pairs} with a held-out prompt, {summary.cut_train + summary.cut_heldout} over the limits"
    )


def _print_outcome(out: Path, metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name:<50}{value:.6g}")
    print(f"adapter: {out}\ntry:     qadapter chat --adapter {out}")
