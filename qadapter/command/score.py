"""`qadapter score`: what a policy thinks of preference pairs, beside its base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qadapter.command.opened import as_base, note, open_policy, training_record
from qadapter.command.options import ScoreOptions
from qadapter.command.results import require_free, writing
from qadapter.command.speaking import look_at_answers
from qadapter.evaluation.preference import PairScores, margins, preference_metrics, score_pairs
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.stream import parse_files

DEFAULT_MAX_LENGTH = 512


def run(options: ScoreOptions) -> None:
    """Print the measures of policy and base as JSON, and write one row a pair if asked to.

    Raises:
        QAdapterError: data or policy that cannot be used.
    """
    file = require_free(options)
    parsed = parse_files(
        options.located(options.data, options.split),
        domain=options.domain,
        max_chars=options.max_chars,
        choices=Choices.of(options),
    )
    pairs = parsed.pairs[: options.limit]
    note(f"data: {parsed.read} pairs read, {len(parsed.rejected)} of them quarantined, {len(pairs)} to score")
    policy, tokenizer = open_policy(options)
    recorded = training_record(Path(options.adapter[0]).expanduser()).get("max_length")
    max_length = options.max_length or recorded or DEFAULT_MAX_LENGTH
    scores, base_scores = score_both(policy, tokenizer, pairs, max_length=max_length, batch_size=options.batch_size)
    columns = _columns(scores, base_scores)
    with writing(file) as write:
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            write({**row, **pairs[row["pair"]].to_trl()})
    speech = look_at_answers(
        policy, tokenizer, pairs, count=options.answers, max_length=max_length, batch_size=options.batch_size
    )
    result = {
        "policy": preference_metrics(scores, base_scores),
        "base": preference_metrics(base_scores, base_scores),
        "answers": speech,
        "max_length": max_length,
    }
    print(json.dumps(result, indent=2))


def score_both(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PreferencePair],
    *,
    max_length: int,
    batch_size: int,
) -> tuple[PairScores, PairScores]:
    """Scores of a policy and of its base, with a progress bar; see `score_pairs`."""
    settings: dict[str, int] = {"max_length": max_length, "batch_size": batch_size}
    with tqdm(total=2 * math.ceil(len(pairs) / batch_size), desc="scoring", unit="batch") as bar:

        def advance(*_: Any) -> None:  # a value would take the place of the model's output
            bar.update()

        hook = policy.register_forward_hook(advance)
        try:
            scores = score_pairs(policy, tokenizer, pairs, **settings)
            with as_base(policy):
                return scores, score_pairs(policy, tokenizer, pairs, **settings)
        finally:
            hook.remove()


def _columns(scores: PairScores, base_scores: PairScores) -> dict[str, list[Any]]:
    """The numbers of each pair, under the names of the pipeline's `pairs.jsonl`."""
    return {
        "pair": scores.indices.tolist(),
        "chosen_log_prob": scores.chosen.tolist(),
        "rejected_log_prob": scores.rejected.tolist(),
        "base_chosen_log_prob": base_scores.chosen.tolist(),
        "base_rejected_log_prob": base_scores.rejected.tolist(),
        "chosen_tokens": scores.chosen_tokens.tolist(),
        "rejected_tokens": scores.rejected_tokens.tolist(),
        "margin": margins(scores, base_scores).tolist(),
    }
