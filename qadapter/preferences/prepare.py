"""From preference files to training, held-out and judge's pairs, with every candidate pair accounted for.

`parse_files` reads, `split.split_pairs` divides; `prepare` does both and writes the result. Two sums must hold, and are
checked against the files as written:

    read = used + quarantined
    used = training, held-out and judge's pairs + duplicates + pairs with a held-out prompt + pairs cut by the limits
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import json_line
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import SINGLE
from qadapter.preferences.records import Reason
from qadapter.preferences.sides import CODES, REASONS, Output, Rejections, Side
from qadapter.preferences.split import (
    CROSSING,
    DIGEST_BYTES,
    HELDOUT,
    JUDGE,
    TRAIN,
    Division,
    check_limits,
    cut,
    divide,
)
from qadapter.preferences.stream import DEFAULT_MAX_CHARS

logger = logging.getLogger(__name__)

OUTPUTS = ("train.jsonl", "heldout.jsonl", "quarantine.jsonl", "summary.json", "judge.jsonl", SINGLE)


@dataclass(frozen=True, slots=True)
class PreparationSummary:
    """What became of every candidate pair. All counts are of candidate pairs unless named otherwise.

    Attributes:
        read: candidate pairs that entered.
        used: those that are valid, whether kept or not.
        quarantined: the others, by reason.
        duplicates, cross_split_pairs, cross_split_prompts, cut_train, cut_heldout: see `Split`.
        train_pairs, heldout_pairs: pairs written to `train.jsonl` and `heldout.jsonl`.
        train_prompts, heldout_prompts: distinct prompts among them.
        train_sha256, heldout_sha256: digests of the two files.
        formats: the detected format of every file, by the name it has in `quarantine.jsonl`.
        odd_files: files that were read like the others of their data set although their own first records look like
            another layout, with that one; not in `summary.json` where there are none.
        ties: pairs that were kept although their scores are equal, or against the decision (`equal scores`, …), and
            candidates that were left out because they are no preference (`left out`); not in `summary.json` where there
            are none.
        labels: how often each label was given, or each side preferred, where the source has such; before anything is
            removed.
        single_rows: rows in `single.jsonl`.
        incomplete_files: names of files that are truncated or damaged, so that part of their content is unknown.
        judge_pairs, judge_prompts, judge_sha256: of `judge.jsonl`; 0 and empty where no pair was set apart, and then
            not in `summary.json`.
    """

    read: int
    used: int
    quarantined: dict[str, int]
    duplicates: int
    cross_split_pairs: int
    cross_split_prompts: int
    cut_train: int
    cut_heldout: int
    train_pairs: int
    train_prompts: int
    heldout_pairs: int
    heldout_prompts: int
    train_sha256: str
    heldout_sha256: str
    formats: dict[str, str]
    incomplete_files: list[str] = field(default_factory=list)
    odd_files: dict[str, str] = field(default_factory=dict)
    ties: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    single_rows: int = 0
    judge_pairs: int = 0
    judge_prompts: int = 0
    judge_sha256: str = ""

    def check(self) -> None:
        """Raises RuntimeError if a pair was lost or counted twice: a fault of this program, never of the data."""
        quarantined = sum(self.quarantined.values())
        kept_or_removed = (
            self.train_pairs
            + self.heldout_pairs
            + self.judge_pairs
            + self.duplicates
            + self.cross_split_pairs
            + self.cut_train
            + self.cut_heldout
        )
        if self.read != self.used + quarantined or self.used != kept_or_removed:
            raise RuntimeError(
                f"the preparation does not add up: read {self.read}, used {self.used}, quarantined {quarantined}, "
                f"kept or removed {kept_or_removed}: {self}"
            )

    @classmethod
    def load(cls, file: Path) -> PreparationSummary:
        """Reads a `summary.json`."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def prepare(
    files: Sequence[Path],
    out_dir: Path,
    *,
    domain: str | None = None,
    heldout: float | int | None = 0.1,
    heldout_files: Sequence[Path] | None = None,
    seed: int = 0,
    max_train_pairs: int | None = None,
    max_heldout_pairs: int | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    judge_pairs: int = 0,
    choices: Choices | None = None,
) -> PreparationSummary:
    """Validates preference files, splits them by prompt and writes the result.

    Writes to `out_dir`: `train.jsonl`, `heldout.jsonl` (one pair per line, `PreferencePair.to_row`), `quarantine.jsonl`
    (file, line and reason of every rejected candidate, no contents), `summary.json`, if pairs are set apart for a
    judge, `judge.jsonl`, and for a source of single replies `single.jsonl`: every row on the training side with its
    label, those without a partner too. None of them is left behind if it raises.

    Args:
        files: training data, and held-out data too unless `heldout_files` is given.
        out_dir: an existing or new folder.
        domain: the preferred style of DSP data; None for every other format.
        heldout: how much to hold out, see `split_pairs`; without effect if `heldout_files` is given.
        heldout_files: data to hold out whole.
        seed: decides the split and the order.
        max_train_pairs, max_heldout_pairs: keep at most so many pairs a side, drawn by the seed.
        max_chars: a pair with more characters (prompt and longer reply) is quarantined as over-long.
        judge_pairs: pairs that no policy is to see, for a judge to be trained on; see `split_pairs`.
        choices: what the data leave open (`fields`, `score`, `pairing` …).

    Raises:
        QAdapterError: no files, a file of an unknown format, no usable pair, or a split that leaves a side empty.
        RuntimeError: the counts do not add up (a fault of this program).
    """
    check_limits(max_train_pairs=max_train_pairs, max_heldout_pairs=max_heldout_pairs)
    unpaired = choices is not None and choices.pairing == "none"
    if unpaired and (heldout_files is None or judge_pairs):
        raise QAdapterError(
            "`pairing: none` keeps single replies as they are, so there is no pair to hold out or to train a judge on. "
            "Give held-out pairs of their own (heldout_path), and leave judge_pairs out."
        )
    if unpaired and max_train_pairs is not None:
        raise QAdapterError(
            "`pairing: none` keeps single replies as they are, so max_train_pairs has no pair to limit. Leave it out."
        )
    started_with = out_dir.exists()
    train = Side(files, out_dir / ".rows-train")
    held = None if heldout_files is None else Side(heldout_files, out_dir / ".rows-heldout")
    sides = [side for side in (train, held) if side]
    try:
        train.read(seed, domain=domain, max_chars=max_chars, choices=choices)
        if held is not None:
            paired = replace(choices, pairing=None) if unpaired and choices else choices
            held.read(seed, domain=domain, max_chars=max_chars, choices=paired)
        division = divide(
            train.rows.drawn,
            heldout=heldout,
            heldout_pairs=None if held is None else held.rows.drawn,
            judge_pairs=judge_pairs,
            needs_pairs=not unpaired,
        )
        out_dir.mkdir(parents=True, exist_ok=True)
        started_with = True
        return _write(out_dir, sides, division, max_train_pairs, max_heldout_pairs)
    except BaseException as error:
        for name in OUTPUTS:
            (out_dir / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise QAdapterError(
                f"The prepared data cannot be written to {out_dir}: {error.strerror or error}. "
                "Free some space there or choose another folder."
            ) from error
        raise
    finally:
        for side in sides:
            side.close()
        if not started_with:
            with contextlib.suppress(OSError):
                out_dir.rmdir()


def _write(
    out_dir: Path,
    sides: Sequence[Side],
    division: Division,
    max_train_pairs: int | None,
    max_heldout_pairs: int | None,
) -> PreparationSummary:
    formats = {file: name for side in sides for file, name in side.findings.formats.items()}
    names = _short_names(formats)
    train, heldout, quarantine, summary_file, judge, single = (out_dir / name for name in OUTPUTS)
    single_rows = 0
    with ExitStack() as stack:
        outputs = {
            TRAIN: stack.enter_context(Output(train, max_train_pairs)),
            HELDOUT: stack.enter_context(Output(heldout, max_heldout_pairs)),
        }
        if len(division.judge):
            outputs[JUDGE] = stack.enter_context(Output(judge, None))
        for rows in sides[0].rows.buckets():
            places = division.places(np.array([row.prompt for row in rows], f"S{DIGEST_BYTES}"))
            for row, place in zip(rows, places.tolist(), strict=True):
                if place != CROSSING:
                    outputs[place].add(row)
        if division.given:
            for rows in sides[1].rows.buckets():
                for row in rows:
                    outputs[HELDOUT].add(row)
        if sides[0].single.drawn:
            singles = stack.enter_context(Output(single, None))
            for rows in sides[0].single.buckets():
                places = division.places(np.array([row.prompt for row in rows], f"S{DIGEST_BYTES}"))
                for row, place in zip(rows, places.tolist(), strict=True):
                    if place == TRAIN:
                        singles.add(row)
            single_rows = singles.lines
            if not single_rows and not division.train_pairs:
                raise QAdapterError(
                    "No training row is left: all usable single replies have prompts that are held out too. "
                    "Give training data with other prompts."
                )
        written = {place: (output.lines, output.prompts(), output.sha256()) for place, output in outputs.items()}
    _write_lines(quarantine, _quarantined(sides, names))
    reasons = sum((side.reasons() for side in sides), Counter())
    incomplete = {
        names[file]
        for side in sides
        for file, rejections in side.rejected.items()
        if any(CODES[reason] in rejections.codes for reason in (Reason.BREAKS_OFF, Reason.BUDGET, Reason.EMPTY_FILE))
    }
    judge_lines, judge_prompts, judge_sha256 = written.get(JUDGE, (0, 0, ""))
    summary = PreparationSummary(
        read=sum(side.read_count for side in sides),
        used=sum(len(side.rows.drawn) for side in sides),
        quarantined=dict(sorted(reasons.items())),
        duplicates=division.duplicates,
        cross_split_pairs=division.cross_split_pairs,
        cross_split_prompts=division.cross_split_prompts,
        cut_train=cut(division.train_pairs, max_train_pairs),
        cut_heldout=cut(division.heldout_pairs, max_heldout_pairs),
        train_pairs=written[TRAIN][0],
        train_prompts=written[TRAIN][1],
        heldout_pairs=written[HELDOUT][0],
        heldout_prompts=written[HELDOUT][1],
        train_sha256=written[TRAIN][2],
        heldout_sha256=written[HELDOUT][2],
        formats={names[file]: name for file, name in sorted(formats.items())},
        incomplete_files=sorted(incomplete),
        odd_files={names[file]: name for side in sides for file, name in side.findings.odd.items()},
        ties=_ties(sides, reasons),
        labels=dict(sorted(sum((side.findings.labels for side in sides), Counter()).items())),
        single_rows=single_rows,
        judge_pairs=judge_lines,
        judge_prompts=judge_prompts,
        judge_sha256=judge_sha256,
    )
    summary.check()
    fields = {name: value for name, value in asdict(summary).items() if value or name not in _WHERE_ANY}
    if not judge_lines:
        fields = {name: value for name, value in fields.items() if not name.startswith("judge_")}
    summary_file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


_WHERE_ANY = ("odd_files", "ties", "labels", "single_rows")
"""Fields that are in `summary.json` only where they say something."""


def _ties(sides: Sequence[Side], reasons: Mapping[str, int]) -> dict[str, int]:
    """Ties by what became of them; those that did not occur left out."""
    counts = sum((side.findings.counts for side in sides), Counter({"left out": reasons.get(Reason.NO_PREFERENCE, 0)}))
    return {name: count for name, count in sorted(counts.items()) if count}


def _quarantined(sides: Sequence[Side], names: Mapping[Path, str]) -> Iterator[dict[str, Any]]:
    """File, line and reason of every rejected candidate, in this order."""
    found: dict[str, list[Rejections]] = {}
    for side in sides:
        for file, rejections in side.rejected.items():
            found.setdefault(names[file], []).append(rejections)
    for name, parts in sorted(found.items()):
        lines, codes = (np.concatenate([getattr(part, kind) for part in parts]) for kind in ("lines", "codes"))
        for at in np.lexsort((codes, lines)).tolist():
            yield {"file": name, "line": int(lines[at]), "reason": REASONS[codes[at]].value}


def _write_lines(file: Path, rows: Iterable[Any]) -> tuple[str, int]:
    """Writes JSON lines; returns the sha256 of the file and the number of lines in it."""
    digest, count = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for row in rows:
            line = json_line(row)
            stream.write(line)
            digest.update(line)
            count += 1
    return digest.hexdigest(), count


def _short_names(files: Collection[Path]) -> dict[Path, str]:
    """Names to tell files apart: relative to the folder that holds them all."""
    places = [file.absolute() for file in files]
    common = Path(os.path.commonpath([place.parent for place in places]))
    shown = (shown_path(place.relative_to(common)) for place in places)
    return dict(zip(files, shown, strict=True))
