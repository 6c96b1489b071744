"""What `qadapter train --retain` measures: the user's own questions, asked of the base and of the policy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from qadapter.command.opened import note
from qadapter.command.speaking import LONGEST_ANSWER
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.catalog import check_own
from qadapter.files.artifacts import write_json_lines
from qadapter.inference.generate import context_of, longest_reply

if TYPE_CHECKING:
    from qadapter.evaluation.lm_eval.harness import TaskScores

ITEMS = "retained.jsonl"
"""File in the output folder: a row per question, with what base and policy answered."""


def own_benchmarks(files: Sequence[str]) -> dict[str, Path]:
    """The files of `--retain`, by the names that their benchmarks get, each checked whole.

    Raises:
        QAdapterError: two files of the same name, or one that cannot be used; the message has the line.
    """
    own: dict[str, Path] = {}
    for file in files:
        name = re.sub(r"[^a-z0-9_-]+", "-", Path(file).stem.lower()).strip("-_") or "questions"
        if name in own:
            raise QAdapterError(f"--retain {file} and {own[name]} would both be called {name!r}; rename one of them")
        own[name] = Path(file)
    for line in check_own(own):
        note(f"retain: {line}")
    return own


def ask(policy: Any, tokenizer: PreTrainedTokenizerBase, own: Mapping[str, Path], batch_size: int) -> TaskScores:
    """Ask the questions; a base without a chat template is asked without one."""
    from qadapter.evaluation.lm_eval.harness import evaluate_tasks  # lm-eval takes seconds to import

    return evaluate_tasks(
        policy,
        tokenizer,
        (),
        own=own,
        batch_size=batch_size,
        apply_chat_template=tokenizer.chat_template is not None,
        fewshot_as_multiturn=False,
        max_gen_toks=longest_reply(LONGEST_ANSWER, context_of(policy), asked_for=False),
    )


def compared(before: TaskScores, after: TaskScores, out: Path) -> dict[str, float]:
    """Say what each benchmark kept, write `ITEMS`, and return the pipeline's `retention/…` and `forgetting/…`."""
    metrics: dict[str, float] = {}
    rows = []
    for name, base_items in before.samples.items():
        items = after.samples[name]
        then, now = before.metrics[f"{name}/acc"], after.metrics[f"{name}/acc"]
        pairs = [(was["score"], item["score"]) for was, item in zip(base_items, items, strict=True)]
        lost, won = sum(was > new for was, new in pairs), sum(new > was for was, new in pairs)
        note(
            f"retain: {name} {then:.3f} before, {now:.3f} after: {now - then:+.3f} "
            f"({len(items)} questions: {lost} lost, {won} won)"
        )
        metrics |= {f"retention/{name}/acc": now, f"forgetting/{name}/acc": then - now + 0.0}
        rows += [
            {
                "benchmark": name,
                "prompt": item["prompt"],
                "target": item["target"],
                "base": was["response"],
                "base_score": was["score"],
                "reply": item["response"],
                "score": item["score"],
            }
            for was, item in zip(base_items, items, strict=True)
        ]
    write_json_lines(out / ITEMS, rows)
    return metrics
