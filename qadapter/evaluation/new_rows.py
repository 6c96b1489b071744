"""What the champion and a candidate make of the pairs that a delivery brought, and which labels may be flipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qadapter.config.model import ModelSettings
from qadapter.evaluation.new_rows_text import NEW_ROWS
from qadapter.evaluation.preference import Floats, PairScores, margins, score_pairs
from qadapter.files.artifacts import read_json_lines, write_json, write_json_lines
from qadapter.inference.pair_scores import implied_margin, won
from qadapter.policy.loading import load_base, load_policy
from qadapter.preferences.pair import load_pairs
from qadapter.progress.kept import keeping, leads

MOST = 200
"""New pairs that are scored; of more, some at even distances."""


def measure_new_rows(
    base: str | Path,
    champion: Path | None,
    candidate: Path,
    fresh: Path,
    champion_adaptation: Path | None,
    *,
    model: ModelSettings,
    max_length: int,
    batch_size: int,
    out: Path,
    scratch: Path | None = None,
) -> None:
    """Score the new training pairs by champion and candidate.

    A label is suspected to be flipped where the champion prefers the rejected reply by more than its median margin of
    the held-out pairs that it gets right: it is as sure of the opposite as it usually is of what is right.

    Args:
        base, champion, candidate: folder or hub id of the base, folders of the adapters; no champion before the first.
        fresh: the new pairs (`fresh.jsonl` of the mixture).
        champion_adaptation: folder that `measure_adaptation` wrote for the champion; None where there is none.
        model: of the experiment.
        max_length, batch_size: as for the held-out pairs.
        out: gets `new_rows.jsonl` (pair, margins of both, whether its label is suspected) and `metrics.json`
            (`new_rows/…`).
        scratch: keeps scores, as in `measure_adaptation`.

    Raises:
        QAdapterError: not one pair can be scored.
    """
    pairs = load_pairs(fresh)
    if len(pairs) > MOST:
        pairs = [pairs[i * len(pairs) // MOST] for i in range(MOST)]

    def scores(adapter: Path | None) -> PairScores:
        network, tokenizer = load_base(base, model)
        policy = load_policy(network, adapter)
        return score_pairs(policy, tokenizer, pairs, max_length=max_length, batch_size=batch_size)

    with keeping(scratch):
        of_base = scores(None)
        of_candidate = margins(scores(candidate), of_base)
        of_champion = margins(scores(champion), of_base) if champion else None
        if not leads():
            return
    suspected = np.zeros(len(of_base), dtype=bool)
    if of_champion is not None and champion_adaptation is not None:
        right = [margin for margin in _heldout_margins(champion_adaptation) if margin > 0]
        if right:
            suspected = of_champion < -float(np.median(right))
    rows = [
        {
            **pairs[place].to_row(),
            "candidate_margin": of_candidate[i].item(),
            "champion_margin": None if of_champion is None else of_champion[i].item(),
            "suspected": bool(suspected[i]),
        }
        for i, place in enumerate(of_base.indices)
    ]
    metrics = {"new_rows/n": float(len(rows)), "new_rows/candidate_accuracy": float(won(of_candidate).mean())}
    if of_champion is not None:
        metrics |= {
            "new_rows/champion_accuracy": float(won(of_champion).mean()),
            "new_rows/suspected_flips": float(suspected.sum()),
        }
    write_json_lines(out / NEW_ROWS, rows)
    write_json(out / "metrics.json", metrics)


def _heldout_margins(adaptation: Path) -> Floats:
    rows = read_json_lines(adaptation / "pairs.jsonl")
    columns = ("chosen_log_prob", "rejected_log_prob", "base_chosen_log_prob", "base_rejected_log_prob")
    return implied_margin(*(np.array([row[name] for row in rows], dtype=np.float64) for name in columns))
