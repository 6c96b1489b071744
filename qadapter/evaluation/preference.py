"""What a policy thinks of held-out preference pairs: accuracy, margin, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.divergence import right_padded
from qadapter.inference.generate import why_not
from qadapter.inference.pair_scores import implied_margin, mean_margin, won
from qadapter.inference.score import evaluating, item_results, reply_log_probs
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.tokenize import EncodedPair, UnusablePair, encode_pair, padding_id

CALIBRATION_BINS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairScores:
    """A policy's scores of n pairs, in the order the pairs were given.

    Attributes:
        chosen, rejected: [n], summed log-probability of each reply given the prompt, in nats.
        chosen_tokens, rejected_tokens: [n], reply tokens that were scored, the end of the turn included.
        indices: [n], which of the given pairs these are.
        left_out: given pairs that cannot be scored, because no difference is left within the maximal length.
    """

    chosen: Floats
    rejected: Floats
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]
    indices: NDArray[np.int64]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.chosen)


class NoneScoredError(QAdapterError):
    """No pair of some can be tokenised: both replies begin alike up to the limit, or no template takes the prompts."""


def score_pairs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    max_length: int,
    batch_size: int,
) -> PairScores:
    """Log-probabilities of both replies of each pair, tokenised as in training.

    Args:
        model: any policy.
        max_length: tokens of prompt and reply together; longer ones are shortened as in training.
        batch_size: pairs a forward pass, twice as many replies.

    Raises:
        NoneScoredError: not one pair can be scored.
        QAdapterError: a log-probability is not finite.
    """
    indices, encoded = encode_usable(tokenizer, pairs, max_length)
    if not encoded:
        raise NoneScoredError(
            f"None of the {len(pairs)} held-out pairs can be scored within {max_length} tokens. Hold out more pairs "
            f"or raise max_length."
        )
    given = [(tuple(e.prompt_ids), tuple(ids)) for e in encoded for ids in (e.chosen_ids, e.rejected_ids)]
    # Each reply once: DSP's four pairs of a prompt have one chosen reply.
    replies = list(dict.fromkeys(given))
    rows = [([*prompt, *reply], len(reply)) for prompt, reply in replies]

    def log_probs(part: list[int]) -> list[float]:
        batch = right_padded([rows[index] for index in part], padding_id(tokenizer))
        found: list[float] = reply_log_probs(model, batch).tolist()
        return found

    with evaluating(model):
        found = item_results(
            [len(ids) for ids, _ in rows],
            2 * batch_size,
            log_probs,
            lambda index: [list(part) for part in replies[index]],
            work="scoring",
            unit="reply",
        )
    of_reply = dict(zip(replies, found, strict=True))
    sums = np.array([of_reply[reply] for reply in given], dtype=np.float64).reshape(-1, 2).T
    if len(impossible := np.flatnonzero(np.isinf(sums).any(axis=0))):
        raise QAdapterError(
            f"{len(impossible)} of {len(encoded)} held-out pairs have a reply that the policy can never give (log-"
            f"probability -inf), the first one pair {indices[impossible[0]]}. Its numbers overflow: load it in float32."
        )
    return PairScores(
        chosen=sums[0],
        rejected=sums[1],
        chosen_tokens=np.array([len(e.chosen_ids) for e in encoded], dtype=np.int64),
        rejected_tokens=np.array([len(e.rejected_ids) for e in encoded], dtype=np.int64),
        indices=np.array(indices, dtype=np.int64),
        left_out=len(pairs) - len(encoded),
    )


def margins(scores: PairScores, base_scores: PairScores) -> Floats:
    """[n], log-ratio margin log π/π1(chosen) - log π/π1(rejected): the preference's reward that a policy implies."""
    return implied_margin(scores.chosen, scores.rejected, base_scores.chosen, base_scores.rejected)


def preference_metrics(scores: PairScores, base_scores: PairScores) -> dict[str, float]:
    """The measures of one policy, all over the same n pairs. Ties count one half, so the base implies 0.5 of itself.

    Returns:
        preference_accuracy: share of pairs whose chosen reply has the higher summed log-probability.
        preference_accuracy_length_normalised: the same for the mean over tokens.
        implied_reward_accuracy: share of pairs with a positive margin (see `margins`).
        margin: mean margin in nats.
        calibration: expected calibration error of σ(margin) as the probability that the chosen reply is preferred
            (see `calibration_error`).
        n: number of pairs.
        left_out: pairs that could not be scored (see `PairScores`).
    """
    if not np.array_equal(scores.indices, base_scores.indices):
        raise ValueError("The policy and the base scored different pairs. Score both with one tokenizer and length.")
    margin = margins(scores, base_scores)
    normalised = mean_margin(scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens)
    return {
        "preference_accuracy": float(won(scores.chosen - scores.rejected).mean()),
        "preference_accuracy_length_normalised": float(won(normalised).mean()),
        "implied_reward_accuracy": float(won(margin).mean()),
        "margin": float(margin.mean()),
        "calibration": calibration_error(margin),
        "n": float(len(scores)),
        "left_out": float(scores.left_out),
    }


def calibration_error(margin: Floats, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error Σ_b n_b/n · |accuracy_b - confidence_b| (Guo et al., 2017) of σ(margin).

    The confidence of a pair is the larger of σ(margin) and 1 - σ(margin), so it lies in [½, 1], in equal bins; the
    prediction is right if the margin is positive, and half right if it is 0.
    """
    size = np.abs(margin)
    confidence = 1 / (1 + np.exp(-size))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = np.bincount(which, weights=won(margin) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(margin))


def distinct_prompts(pairs: Sequence[PreferencePair], limit: int | None = None) -> list[list[Message]]:
    """Each prompt once, in order; at most `limit` of them."""
    return [list(pair.prompt) for pair in distinct_pairs(pairs, limit)]


def distinct_pairs(pairs: Sequence[PreferencePair], limit: int | None = None) -> list[PreferencePair]:
    """The first pair of each prompt, in the order of `distinct_prompts`."""
    first = {pair.prompt_digest: pair for pair in reversed(pairs)}
    return list(reversed(first.values()))[:limit]


def askable_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], limit: int | None = None
) -> list[PreferencePair]:
    """The first `distinct_pairs` whose prompt the tokenizer and its chat template have a form for.

    The empty reply to another one is no answer: it would count as one that is broken, unchanged, or a tie.
    """
    askable = (pair for pair in distinct_pairs(pairs) if why_not(tokenizer, pair.prompt) is None)
    return list(islice(askable, limit))


def encode_usable(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], max_length: int
) -> tuple[list[int], list[EncodedPair]]:
    """Which of the pairs can be tokenised within `max_length`, and their token ids; the others are left out."""
    indices, encoded = [], []
    for i, pair in enumerate(pairs):
        try:
            encoded.append(encode_pair(pair, tokenizer, max_length))
            indices.append(i)
        except UnusablePair:
            continue
    return indices, encoded
