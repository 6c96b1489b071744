"""Small stage folders for the report's tests: items, answers, pairs and curves as the evaluation writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qadapter.files.artifacts import write_json_lines
from qadapter.report.rows import Row

TASKS = ("facts", "sums")
DIRECTIONS = {"retention/facts/acc": True, "retention/sums/acc": True}


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def kept_files(folder: Path, scores: Mapping[str, Sequence[float]], metric: str = "acc") -> Path:
    """A retention folder with these item scores."""
    items = [
        {"task": task, "doc_id": i, "scores": {metric: score}}
        for task, values in scores.items()
        for i, score in enumerate(values)
    ]
    write_json_lines(folder / "items.jsonl", items)
    (folder / "directions.json").write_text(json.dumps(DIRECTIONS))
    return folder


def rule_row(
    root: Path,
    domain: str,
    method: str,
    seed: int | None,
    *,
    follows: Sequence[int],
    base_follows: Sequence[int],
    kept: Mapping[str, Sequence[float]],
    base_kept: Mapping[str, Sequence[float]],
    reply: str = "a reply",
) -> Row:
    """A policy of the toy world: per prompt whether it follows the rule, per task and item whether it is right."""
    folder = root / f"{domain}-{method}-{seed}"
    verdicts = ["win" if a > b else "loss" if a < b else "tie" for a, b in zip(follows, base_follows, strict=True)]
    write_json_lines(
        folder / "adaptation" / "answers.jsonl",
        [
            {"prompt": prompt(f"q{i}"), "base": f"before {i}", "reply": reply, "verdict": verdict, "judge": "rule"}
            for i, verdict in enumerate(verdicts)
        ],
    )
    kept_files(folder / "retention", kept)
    write_json_lines(folder / "training" / "history.jsonl", [{"step": s, "train/loss": 1 / s} for s in (1, 2, 3)])
    shares = {task: sum(values) / len(values) for task, values in kept.items()}
    lost = {task: sum(values) / len(values) - shares[task] for task, values in base_kept.items()}
    score = sum(follows) / len(follows)
    metrics = {
        "adaptation/score": score,
        "adaptation/exact_rule": score,
        "retention/mean": sum(shares.values()) / len(shares),
        "forgetting/mean": sum(lost.values()) / len(lost),
        "cost/train_seconds": 2.0,
        **{f"retention/{task}/acc": share for task, share in shares.items()},
        **{f"forgetting/{task}/acc": share for task, share in lost.items()},
    }
    training = None if method == "base" else folder / "training"
    return Row(domain, method, seed, metrics, training, folder / "adaptation", folder / "retention")


def pair_row(root: Path, domain: str, method: str, seed: int | None, margins: Sequence[float], kept: float) -> Row:
    """A policy on real data: the margin of each held-out pair's implied reward."""
    folder = root / f"{domain}-{method}-{seed}"
    pairs = [
        {
            "pair": i,
            "chosen_log_prob": -1.0 + margin,
            "rejected_log_prob": -2.0,
            "base_chosen_log_prob": -1.0,
            "base_rejected_log_prob": -2.0,
        }
        for i, margin in enumerate(margins)
    ]
    write_json_lines(folder / "pairs.jsonl", pairs)
    score = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins)
    return Row(domain, method, seed, {"adaptation/score": score, "retention/mean": kept}, adaptation=folder)


def toy_rows(root: Path) -> list[Row]:
    """One domain, four prompts, two tasks of four items; the Q-Adapter keeps more than SFT and learns as much."""
    base_follows, base_kept = [0, 0, 0, 1], {"facts": [1, 1, 1, 1], "sums": [1, 1, 1, 0]}
    more = {"base_follows": base_follows, "base_kept": base_kept}
    return [
        rule_row(root, "academy", "base", None, follows=base_follows, kept=base_kept, **more),
        rule_row(
            root,
            "academy",
            "q-adapter",
            0,
            follows=[1, 1, 0, 1],
            kept={"facts": [1, 1, 1, 0], "sums": [1, 1, 1, 0]},
            **more,
        ),
        rule_row(
            root,
            "academy",
            "sft",
            0,
            follows=[1, 1, 0, 0],
            kept={"facts": [0, 0, 0, 0], "sums": [1, 0, 0, 0]},
            **more,
        ),
    ]
