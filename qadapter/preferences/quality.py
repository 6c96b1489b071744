"""What is wrong with preference data before anything is trained on it: one report for each source.

Everything is counted over the prepared pairs (`train.jsonl`, `judge.jsonl`, `heldout.jsonl`) in one pass that keeps 40
bytes per pair. docs/data.md, "Quality", defines each figure.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qadapter.preferences.languages import UNCLEAR, main_language
from qadapter.preferences.near_duplicates import NearDuplicates
from qadapter.preferences.overlap import Items, Overlap
from qadapter.preferences.pair import PreferencePair, iter_pairs
from qadapter.preferences.progress import Progress
from qadapter.preferences.records import Reason
from qadapter.preferences.scripts import main_script

logger = logging.getLogger(__name__)

LONGER_CHOSEN, REPEATED, ACROSS, QUARANTINED, REFUSED, OTHER_SCRIPTS = 0.65, 0.5, 0.05, 0.2, 0.3, 0.05
OTHER_LANGUAGES, ONE_LABEL, TIES = 0.05, 0.75, 0.2
"""Shares from which on a warning is given."""
FEW_PAIRS = 100
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


class Quality:
    """Collects the pairs of one source."""

    def __init__(self, is_refusal: Callable[[str], bool], benchmarks: Items | None = None) -> None:
        """Begin.

        Args:
            is_refusal: whether a reply refuses.
            benchmarks: the items that must not be trained on; None if they are not known here.
        """
        self._is_refusal = is_refusal
        self._overlap = Overlap(benchmarks) if benchmarks is not None else None
        self._near = NearDuplicates()
        self._lengths = {name: array("L") for name in ("prompt", "chosen", "rejected")}
        self._prompts = bytearray()
        self._scripts: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._sides: Counter[bool] = Counter()

    def add(self, pair: PreferencePair, *, held_out: bool = False) -> None:
        """Take a pair of the training or the held-out side."""
        turns = [turn["content"] for turn in pair.prompt]
        self._sides[held_out] += 1
        self._lengths["prompt"].append(sum(map(len, turns)))
        self._lengths["chosen"].append(len(pair.chosen))
        self._lengths["rejected"].append(len(pair.rejected))
        self._scripts[main_script(pair.chosen)] += 1
        self._languages[main_language(pair.chosen)] += 1
        self._refused["chosen"] += self._is_refusal(pair.chosen)
        self._refused["rejected"] += self._is_refusal(pair.rejected)
        digest = bytes.fromhex(pair.prompt_digest)[:16]
        self._prompts += digest
        self._near.add(digest, "\n".join(turns), held_out)
        if self._overlap is not None and not held_out:
            self._overlap.add(turns)

    def report(self, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All figures, shares between 0 and 1, lengths in characters.

        Args:
            summary: of the preparation, for what was quarantined.
        """
        pairs = sum(self._sides.values())
        lengths = {name: np.frombuffer(values, np.dtype("L")) for name, values in self._lengths.items()}
        chosen, rejected = lengths["chosen"], lengths["rejected"]
        _, pairs_of = np.unique(np.frombuffer(self._prompts, "S16"), return_counts=True)
        quarantined = dict((summary or {}).get("quarantined", {}))
        read = max(1, int((summary or {}).get("read", pairs)))
        labels, kept = ((summary or {}).get(name, {}) for name in ("labels", "ties"))
        report: dict[str, Any] = {
            "pairs": pairs,
            "train_pairs": self._sides[False],
            "heldout_pairs": self._sides[True],
            "length": {
                name: {key: int(np.quantile(values, share)) if pairs else 0 for key, share in QUANTILES.items()}
                for name, values in lengths.items()
            },
            "longer_chosen": _share(int((chosen > rejected).sum()), pairs),
            "equal_length": _share(int((chosen == rejected).sum()), pairs),
            "prompts": len(pairs_of),
            "repeated_prompts": _share(int(pairs_of[pairs_of > 1].sum()), pairs),
            "most_pairs_of_a_prompt": int(pairs_of.max(initial=0)),
            "prompts_on_both_sides": 0,  # the split is by prompt
            "near": self._near.counts(),
            "script": {name: _share(count, pairs) for name, count in self._scripts.most_common()},
            "language": {name: _share(count, pairs) for name, count in self._languages.most_common()},
            "label": {name: _share(count, sum(labels.values())) for name, count in labels.items()},
            "labels": sum(labels.values()),
            "refused": {side: _share(self._refused[side], pairs) for side in ("chosen", "rejected")},
            "empty_replies": quarantined.get(Reason.EMPTY_REPLY.value, 0),
            "ties": quarantined.get(Reason.NO_PREFERENCE.value, 0),
            "ties_kept": kept.get("equal scores", 0),
            "against_the_scores": kept.get("scores against the decision", 0),
            "quarantined": _share(sum(quarantined.values()), read),
            "contamination": self._overlap.counts() if self._overlap is not None else None,
        }
        return {**report, "warnings": warnings(report)}


def _share(count: int, of: int) -> float:
    return round(count / of, 6) if of else 0.0


def measure(
    prepared: Path, benchmarks: Items | None, is_refusal: Callable[[str], bool], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """The report of a folder that `prepare.prepare` or `mixture.write_mixture` wrote.

    Args:
        prepared: the folder.
        benchmarks, is_refusal: see `Quality`.
        summary: the folder's `summary.json`.
    """
    quality = Quality(is_refusal, benchmarks)
    files = [prepared / name for name in ("train.jsonl", "judge.jsonl", "heldout.jsonl")]
    progress = Progress([file for file in files if file.exists()])
    with progress.reported("looking at pairs"):
        for file in files:
            if file.exists():
                progress.next_file(file)
                for pair in iter_pairs(file):
                    quality.add(pair, held_out=file.name == "heldout.jsonl")
                    progress.count()
    return quality.report(summary)


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What usually makes a customisation fail, as sentences."""
    found = []
    contaminated = {name: c for name, c in (report["contamination"] or {}).items() if c["shared"]}
    for name, counts in contaminated.items():
        numbers = ", ".join(map(str, counts["numbers"]))
        found.append(
            f"training prompts contain {counts['shared']} of {counts['items']} items of {name} (items {numbers}): "
            "its score may come from having seen them"
        )
    if report["pairs"] < FEW_PAIRS:
        found.append(f"there are only {report['pairs']} pairs")
    for share, word in ((report["longer_chosen"], "longer"), (_shorter(report), "shorter")):
        if share >= LONGER_CHOSEN:
            found.append(f"in {share:.0%} of the pairs the chosen reply is the {word} one: training may teach length")
    if report["repeated_prompts"] >= REPEATED:
        found.append(f"{report['repeated_prompts']:.0%} of the pairs share their prompt with another pair")
    near, held_out = report["near"], report["heldout_pairs"]
    if held_out and near["across"] >= ACROSS * held_out:
        found.append(f"{near['across']} held-out prompts nearly repeat one of training: their accuracy flatters")
    if report["quarantined"] >= QUARANTINED:
        found.append(f"{report['quarantined']:.0%} of what was read is quarantined")
    if report["refused"]["chosen"] >= REFUSED:
        found.append(f"{report['refused']['chosen']:.0%} of the chosen replies refuse")
    if report["label"] and report["labels"] >= FEW_PAIRS and max(report["label"].values()) >= ONE_LABEL:
        found.append(f"one label is far more frequent than the others: {_listed(report['label'])}")
    for name, words in (("ties_kept", "equal scores"), ("against_the_scores", "scores against the decision")):
        if report[name] >= TIES * max(1, report["pairs"]):
            found.append(f"{report[name]:,} pairs have {words}; `ties: drop` leaves them out")
    languages = {name: share for name, share in report["language"].items() if name != UNCLEAR}
    if languages and sum(languages.values()) - max(languages.values()) >= OTHER_LANGUAGES:
        found.append(f"the replies are in several languages: {_listed(languages)}")
    shares = list(report["script"].values())
    if shares and 1 - shares[0] >= OTHER_SCRIPTS:
        found.append(f"the replies are in several scripts: {_listed(report['script'])}")
    return found


def _shorter(report: Mapping[str, Any]) -> float:
    return float(1 - report["longer_chosen"] - report["equal_length"]) if report["pairs"] else 0.0


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:5])


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report for people, in a few lines, without the warnings."""
    length = {name: values["median"] for name, values in report["length"].items()}
    contamination, near = report["contamination"], report["near"]
    shared = sum(counts["shared"] for counts in (contamination or {}).values())
    return [
        f"median length {length['prompt']:,} characters per prompt, {length['chosen']:,} chosen, "
        f"{length['rejected']:,} rejected; the chosen reply is longer in {report['longer_chosen']:.0%} of the pairs",
        f"{report['prompts']:,} prompts, {near['near_duplicates']:,} of {near['compared']:,} nearly repeat another; "
        f"none is on both sides, {near['across']:,} held-out ones nearly repeat a training one",
        f"languages {_listed(report['language'])}; scripts {_listed(report['script'])}; "
        f"refusals {report['refused']['chosen']:.0%} of chosen, "
        f"{report['refused']['rejected']:.0%} of rejected; {report['empty_replies']:,} empty replies, "
        f"{report['ties']:,} ties, {report['quarantined']:.0%} quarantined",
        f"{shared:,} benchmark items in training prompts ({', '.join(contamination) or 'no benchmark known'})"
        if contamination is not None
        else "benchmark items are looked for in the run",
    ]


def metrics(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of the report under a flat name, for MLflow: `length/chosen/median`, `contamination/mmlu/shared`."""
    found: dict[str, float] = {}
    for name, value in report.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= metrics(value, f"{key}/")
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found
