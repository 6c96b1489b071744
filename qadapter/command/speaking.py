"""What `qadapter train` and `score` say of a policy's own answers to a few of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.command.opened import note
from qadapter.evaluation.hearing import beside_base
from qadapter.evaluation.preference import askable_pairs
from qadapter.evaluation.speech import Speech
from qadapter.files.shown import visible
from qadapter.inference.generate import context_of, longest_reply
from qadapter.preferences.pair import PreferencePair

LONGEST_ANSWER = 64
_EXAMPLES = 3


def look_at_answers(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    count: int,
    max_length: int,
    batch_size: int,
) -> dict[str, float]:
    """Let policy and base answer the first prompts, and say on stderr whether the policy speaks; the measures.

    Args:
        policy, tokenizer: with an adapter that can be switched off.
        pairs: whose prompts are asked, each once.
        count: of prompts; 0 asks none and measures nothing.
        max_length, batch_size: as for the scores.
    """
    asked = askable_pairs(tokenizer, pairs, count)
    if not asked:
        note("answers: none were generated, so it is not known whether the policy answers in language (--answers)")
        return {}
    longest = longest_reply(LONGEST_ANSWER, context_of(policy), asked_for=False)
    speech, replies, of_base = beside_base(
        policy,
        tokenizer,
        [list(pair.prompt) for pair in asked],
        wanted=[pair.chosen for pair in asked],
        max_new_tokens=longest,
        max_length=max_length,
        batch_size=batch_size,
    )
    _say(speech, replies, of_base)
    return speech.metrics()


def _say(speech: Speech, replies: Sequence[str], of_base: Sequence[str]) -> None:
    if speech.speaks:
        changed = sum(reply != before for reply, before in zip(replies, of_base, strict=True))
        note(
            f"answers: {len(replies)} generated, {100 * speech.broken:.0f} % of them broken, {changed} differ from the "
            "base's; not judged: qadapter generate --compare-base shows both"
        )
        if not changed:
            note(
                "WARNING: the policy writes the base's answers word for word; accuracies on pairs do not show that. "
                "Train longer, or with a higher --learning-rate."
            )
        return
    note(
        f"WARNING: the policy does not speak: of its replies {speech.reasons()}. Accuracies on pairs do not show that."
    )
    broken = [reply for reply, faults in zip(replies, speech.faults, strict=True) if faults]
    for reply in broken[:_EXAMPLES]:
        note(f"  {visible(reply)[:80]!r}")
    note("  Train with a smaller --learning-rate, fewer steps or a larger --alpha-0, and look at the answers again.")
