"""What the champion and a candidate make of the pairs that a delivery brought, and which labels may be flipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qadapter.config.model import ModelSettings
from qadapter.evaluation.new_rows_text import NEW_ROWS
from qadapter.evaluation.preference import Floats, NoneScoredError, PairScores, margins, score_pairs
from qadapter.evaluation.reversed_labels import View, look_reversed
from qadapter.files.artifacts import read_json_lines, write_json, write_json_lines
from qadapter.inference.pair_scores import implied_margin, mean_margin, won
from qadapter.policy.loading import load_base, load_policy
from qadapter.preferences.pair import PreferencePair, load_pairs
from qadapter.progress.kept import keeping, leads

T = TypeVar("T")

MOST = 200
"""New pairs that are scored, and earlier ones; of more, some at even distances."""


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
    trained: Path | None = None,
) -> None:
    """Score the new training pairs by champion and candidate.

    A label is suspected to be flipped where the champion prefers the rejected reply by more than its median margin of
    the held-out pairs that it gets right (it is as sure of the opposite as it usually is of what is right), and the
    base does not see the pair as it usually sees pairs. Whether the whole delivery looks reversed:
    `qadapter.evaluation.reversed_labels`.

    Args:
        base, champion, candidate: folder or hub id of the base, folders of the adapters; no champion before the first.
        fresh: the new pairs (`fresh.jsonl` of the mixture).
        champion_adaptation: folder that `measure_adaptation` wrote for the champion; None where there is none.
        model: of the experiment.
        max_length, batch_size: as for the held-out pairs.
        out: gets `new_rows.jsonl` (pair, margins of both, whether its label is suspected) and `metrics.json`
            (`new_rows/…`). Where no new pair can be scored, only how many were left out.
        scratch: keeps scores, as in `measure_adaptation`.
        trained: all pairs that the candidate was trained on; those that are not new are the earlier ones.
    """
    pairs = _some(load_pairs(fresh))
    earlier = _earlier(trained, fresh) if trained and champion else []

    def scores(adapter: Path | None, asked: Sequence[PreferencePair]) -> PairScores:
        network, tokenizer = load_base(base, model)
        policy = load_policy(network, adapter)
        return score_pairs(policy, tokenizer, asked, max_length=max_length, batch_size=batch_size)

    with keeping(scratch):
        try:
            of_new = scores(candidate, pairs)
        except NoneScoredError:
            if leads():
                write_json_lines(out / NEW_ROWS, [])
                write_json(out / "metrics.json", {"new_rows/n": 0.0, "new_rows/left_out": float(len(pairs))})
            return
        of_all = scores(None, [*pairs, *earlier])
        new = of_all.indices < len(pairs)
        of_base = _part(of_all, new)
        of_candidate = margins(of_new, of_base)
        of_both = margins(scores(champion, [*pairs, *earlier]), of_all) if champion else None
        of_champion = None if of_both is None else of_both[new]
        if not leads():
            return
    base_margins = mean_margin(of_all.chosen, of_all.rejected, of_all.chosen_tokens, of_all.rejected_tokens)
    scored = [*pairs, *earlier]
    prompts = np.array([scored[place].prompt_digest for place in of_all.indices])
    asked = tuple(prompts[~new].tolist()), tuple(prompts[new].tolist())
    base_view = View(won(base_margins[~new]), won(base_margins[new]), *asked)
    suspected = np.zeros(len(of_base), dtype=bool)
    if of_champion is not None and champion_adaptation is not None:
        right = [margin for margin in _heldout_margins(champion_adaptation) if margin > 0]
        if right:
            suspected = of_champion < -float(np.median(right))
            suspected &= base_margins[new] * base_view.direction <= 0
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
    if of_both is not None and not new.all():
        champion_view = View(won(of_both[~new]), won(of_both[new]), *asked)
        metrics |= {
            "new_rows/base_accuracy": float(base_view.new.mean()),
            "new_rows/earlier/n": float(len(base_view.known)),
            "new_rows/earlier/base_accuracy": float(base_view.known.mean()),
            "new_rows/earlier/champion_accuracy": float(champion_view.known.mean()),
            "new_rows/look_reversed": float(look_reversed(base_view, champion_view)),
        }
    write_json_lines(out / NEW_ROWS, rows)
    write_json(out / "metrics.json", metrics)


def _some(items: Sequence[T]) -> list[T]:
    return [items[i * len(items) // MOST] for i in range(MOST)] if len(items) > MOST else list(items)


def _earlier(trained: Path, fresh: Path) -> list[PreferencePair]:
    """Some of the training pairs that are not new; only these are held in memory."""
    new = {_digest(line) for line in _lines(fresh)}
    with trained.open("rb") as stream:
        chosen = set(_some([place for place, line in enumerate(stream) if _digest(line.rstrip()) not in new]))
    with trained.open("rb") as stream:
        return [PreferencePair.from_trl(json.loads(line)) for place, line in enumerate(stream) if place in chosen]


def _lines(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().splitlines() if line]


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()[:16]


def _part(scores: PairScores, kept: NDArray[np.bool_]) -> PairScores:
    return PairScores(
        scores.chosen[kept],
        scores.rejected[kept],
        scores.chosen_tokens[kept],
        scores.rejected_tokens[kept],
        scores.indices[kept],
    )


def _heldout_margins(adaptation: Path) -> Floats:
    rows = read_json_lines(adaptation / "pairs.jsonl")
    columns = ("chosen_log_prob", "rejected_log_prob", "base_chosen_log_prob", "base_rejected_log_prob")
    return implied_margin(*(np.array([row[name] for row in rows], dtype=np.float64) for name in columns))
