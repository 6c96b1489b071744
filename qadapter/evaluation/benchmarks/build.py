"""Generate benchmarks from the data: for models too small for the public suites, and for each preference."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.benchmarks.table import GENERATED, Limits, Made
from qadapter.files.artifacts import write_json, write_json_lines
from qadapter.preferences.pair import load_pairs

QUESTION_FIELDS = ("question", "answer")
HELD_OUT_SHARE = 0.25  # share of a question file that becomes a benchmark; the model learns the rest


def write_benchmarks(
    replies: Mapping[str, Path],
    questions: Mapping[str, Path],
    *,
    preferences: Mapping[str, Path] | None = None,
    max_items: int,
    max_chars: int,
    seed: int,
    out: Path,
) -> None:
    """Write benchmarks below `benchmarks/`, `corpus.jsonl` beside it, and the number of items to `metrics.json`.

    `replies` and `questions` give `<name>_reply_matching.jsonl` and `<name>_text.jsonl`, `preferences` give
    `<name>_preference.jsonl`; of a preference the pairs that are left out are counted too.

    Args:
        replies: name → `heldout.jsonl` of a prepared source; the chosen replies are used. HH has the same opening in
            several dialogues: a reply that is a turn of the source's own `train.jsonl` is left out.
        questions: name → JSON lines of `question` and `answer`; a quarter becomes benchmarks, the rest the corpus.
        preferences: name → `heldout.jsonl` of a prepared source, whose pairs are asked.
        max_items: largest number of items per benchmark.
        max_chars: longest prompt and reply of an item in characters; texts to predict are cut to it.
        seed: seed of the choice of items.
        out: an empty folder.
    """
    conversations: dict[str, list[tuple[str, str]]] = {}
    corpus = []
    for name, file in replies.items():
        seen = _turns(file.with_name("train.jsonl"))
        # one reply per prompt: the pairs of DSP repeat the chosen one
        distinct = {
            pair.prompt_digest: (pair.prompt[-1]["content"], pair.chosen)
            for pair in load_pairs(file)
            if len(pair.prompt) == 1 and pair.chosen.strip() not in seen
        }
        conversations[name] = list(distinct.values())
    for name, file in questions.items():
        # a question that is asked twice must not be on both sides
        rows = list({row["question"]: row["answer"] for row in read_items(file, QUESTION_FIELDS)}.items())
        random.Random(seed).shuffle(rows)
        held_out = max(1, int(len(rows) * HELD_OUT_SHARE))
        conversations[name] = rows[:held_out]
        corpus += rows[held_out:]
    material: dict[Made, Mapping[str, Sequence[Any]]] = {
        "conversations": conversations,
        "pairs": {name: load_pairs(file) for name, file in (preferences or {}).items()},
    }
    limits = Limits(max_items, max_chars, seed)
    summary: dict[str, int] = {}
    for kind, named in material.items():
        for name, some in named.items():
            for row in GENERATED:
                if row.made_of == kind and row.write is not None:
                    summary |= row.write(name, some, limits, out / "benchmarks")
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in corpus
    ]
    write_json_lines(out / "corpus.jsonl", ({"messages": messages} for messages in turns))
    write_json(out / "metrics.json", {f"data/{name}": count for name, count in summary.items()})


def _turns(file: Path) -> set[str]:
    """All turns of a file of pairs; empty if there is no file."""
    if not file.is_file():
        return set()
    pairs = load_pairs(file)
    return {turn["content"].strip() for pair in pairs for turn in pair.prompt} | {
        reply.strip() for pair in pairs for reply in (pair.chosen, pair.rejected)
    }
