"""From preference files to training, held-out and judge's pairs, with every candidate pair accounted for.

`parse_files` reads, `split.split_pairs` divides; `prepare` does both and writes the result. Two sums must hold, and are
checked against the files as written:

    read = used + quarantined
    used = training, held-out and judge's pairs + duplicates + pairs with a held-out prompt + pairs cut by the limits
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.preferences.formats import Accepted, Rejected, detect_format, read_pairs
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.records import Reason
from qadapter.preferences.split import Split, split_pairs

OUTPUTS = ("train.jsonl", "heldout.jsonl", "quarantine.jsonl", "summary.json", "judge.jsonl")

DEFAULT_MAX_CHARS = 20_000
"""Ten times what 512 tokens, the paper's length, hold: a longer pair would be cut to a small part of itself."""


@dataclass(slots=True)
class ParsedFiles:
    """All candidate pairs of some files, in reading order.

    Attributes:
        read: number of candidate pairs, counted as they came in.
        pairs: the usable ones.
        rejected: the others.
        formats: the detected format of every file.
    """

    read: int
    pairs: list[PreferencePair]
    rejected: list[Rejected]
    formats: dict[Path, str]


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
        incomplete_files: names of files that broke off or are damaged, so that nobody knows what else they held.
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
    heldout: float | int = 0.1,
    heldout_files: Sequence[Path] | None = None,
    seed: int = 0,
    max_train_pairs: int | None = None,
    max_heldout_pairs: int | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    judge_pairs: int = 0,
) -> PreparationSummary:
    """Validates preference files, splits them by prompt and writes the result.

    Writes to `out_dir`: `train.jsonl` and `heldout.jsonl` (a pair a line, `PreferencePair.to_trl`), `quarantine.jsonl`
    (file, line and reason of every rejected candidate, no contents), `summary.json` and, if pairs are set apart for a
    judge, `judge.jsonl`. None of them is left behind if it raises.

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

    Raises:
        QAdapterError: no files, a file of an unknown format, no usable pair, or a split that leaves a side empty.
        RuntimeError: the counts do not add up (a fault of this program).
    """
    train_side = parse_files(files, domain=domain, max_chars=max_chars)
    _require_usable(train_side)
    heldout_side = None
    if heldout_files is not None:
        heldout_side = parse_files(heldout_files, domain=domain, max_chars=max_chars)
        _require_usable(heldout_side)
    split = split_pairs(
        train_side.pairs,
        heldout=heldout,
        heldout_pairs=None if heldout_side is None else heldout_side.pairs,
        seed=seed,
        max_train_pairs=max_train_pairs,
        max_heldout_pairs=max_heldout_pairs,
        judge_pairs=judge_pairs,
    )
    sides = [train_side] if heldout_side is None else [train_side, heldout_side]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        return _write(out_dir, sides, split)
    except BaseException as error:
        for name in OUTPUTS:
            (out_dir / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise QAdapterError(
                f"The prepared data cannot be written to {out_dir}: {error.strerror or error}. "
                "Free some space there or choose another folder."
            ) from error
        raise


def _write(out_dir: Path, sides: Sequence[ParsedFiles], split: Split) -> PreparationSummary:
    rejected = [item for side in sides for item in side.rejected]
    formats = {file: name for side in sides for file, name in side.formats.items()}
    names = _short_names(formats)
    places = sorted((names[item.file], item.line, item.reason.value) for item in rejected)
    train, heldout, quarantine, summary_file, judge = (out_dir / name for name in OUTPUTS)
    train_sha256, train_lines = _write_lines(train, (pair.to_trl() for pair in split.train))
    heldout_sha256, heldout_lines = _write_lines(heldout, (pair.to_trl() for pair in split.heldout))
    judge_sha256, judge_lines = _write_lines(judge, (pair.to_trl() for pair in split.judge)) if split.judge else ("", 0)
    _write_lines(quarantine, ({"file": file, "line": line, "reason": reason} for file, line, reason in places))
    summary = PreparationSummary(
        read=sum(side.read for side in sides),
        used=sum(len(side.pairs) for side in sides),
        quarantined=_by_reason(rejected),
        duplicates=split.duplicates,
        cross_split_pairs=split.cross_split_pairs,
        cross_split_prompts=split.cross_split_prompts,
        cut_train=split.cut_train,
        cut_heldout=split.cut_heldout,
        train_pairs=train_lines,
        train_prompts=len({pair.prompt_digest for pair in split.train}),
        heldout_pairs=heldout_lines,
        heldout_prompts=len({pair.prompt_digest for pair in split.heldout}),
        train_sha256=train_sha256,
        heldout_sha256=heldout_sha256,
        formats={names[file]: name for file, name in sorted(formats.items())},
        incomplete_files=sorted({names[item.file] for item in rejected if item.reason is Reason.BREAKS_OFF}),
        judge_pairs=judge_lines,
        judge_prompts=len({pair.prompt_digest for pair in split.judge}),
        judge_sha256=judge_sha256,
    )
    summary.check()
    fields = asdict(summary)
    if not split.judge:
        fields = {name: value for name, value in fields.items() if not name.startswith("judge_")}
    summary_file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def parse_files(files: Sequence[Path], *, domain: str | None = None, max_chars: int = DEFAULT_MAX_CHARS) -> ParsedFiles:
    """Reads files to pairs and rejections. Every file's format is checked before the first is read whole.

    Raises:
        QAdapterError: no files, an unreadable file or one of an unknown format, a wrong domain.
    """
    if not files:
        raise QAdapterError("No preference file was given; at least one was expected.")
    parsed = ParsedFiles(0, [], [], {file: detect_format(file).value for file in files})
    for file in files:
        for item in read_pairs(file, domain=domain, max_chars=max_chars):
            parsed.read += 1
            if isinstance(item, Accepted):
                parsed.pairs.append(item.pair)
            else:
                parsed.rejected.append(item)
    return parsed


def load_pairs(file: Path) -> list[PreferencePair]:
    """Pairs of a `train.jsonl`, `heldout.jsonl` or `judge.jsonl` that `prepare` wrote.

    Raises:
        QAdapterError: the file is missing or not one of ours.
    """
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            return [PreferencePair.from_trl(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise QAdapterError(
            f"{file} cannot be read as prepared pairs ({type(error).__name__}). A train.jsonl or heldout.jsonl of the "
            "data preparation was expected; run the preparation again."
        ) from error


def first_usable_pair(
    files: Sequence[Path], domain: str | None = None, max_chars: int = DEFAULT_MAX_CHARS
) -> PreferencePair:
    """The first pair that can be used, found without reading further than needed. Checks the format of every file.

    Raises:
        QAdapterError: as `parse_files`, or no usable pair; the message counts the reasons.
    """
    if not files:
        raise QAdapterError("No preference file was given; at least one was expected.")
    for file in files:
        read_pairs(file, domain=domain)  # checks format and domain on the call
    rejected: list[Rejected] = []
    for file in files:
        for item in read_pairs(file, domain=domain, max_chars=max_chars):
            if isinstance(item, Accepted):
                return item.pair
            rejected.append(item)
    raise _no_usable_pair(files, rejected)


def _require_usable(parsed: ParsedFiles) -> None:
    if not parsed.pairs:
        raise _no_usable_pair(list(parsed.formats), parsed.rejected)


def _no_usable_pair(files: Sequence[Path], rejected: Sequence[Rejected]) -> QAdapterError:
    names = ", ".join(str(file) for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    counts = "; ".join(f"{reason}: {count}" for reason, count in _by_reason(rejected).items())
    return QAdapterError(
        f"No usable preference pair in {names}: {len(rejected)} read, all of them quarantined ({counts}). "
        "Correct the data or name another source."
    )


def _by_reason(rejected: Iterable[Rejected]) -> dict[str, int]:
    return dict(sorted(Counter(item.reason.value for item in rejected).items()))


def _write_lines(file: Path, rows: Iterable[Any]) -> tuple[str, int]:
    """Writes JSON lines; returns the sha256 of the file and the number of lines in it."""
    digest, count = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            digest.update(line)
            count += 1
    return digest.hexdigest(), count


def _short_names(files: Collection[Path]) -> dict[Path, str]:
    """Names to tell files apart: relative to the folder that holds them all."""
    places = [file.absolute() for file in files]
    common = Path(os.path.commonpath([place.parent for place in places]))
    shown = (os.fsencode(place.relative_to(common)).decode(errors="replace") for place in places)
    return dict(zip(files, shown, strict=True))
