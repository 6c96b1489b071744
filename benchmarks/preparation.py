"""Preparing a large file of pairs: this project against `datasets.load_dataset(...).map` doing the same work.

python -m benchmarks.preparation                          # 1,000,000 pairs, 2 GB, in a temporary folder
python -m benchmarks.preparation --rows 100000
python -m benchmarks.preparation --sides ledger again mixture     # the same file as a growing source

Both sides read the same JSON lines, validate each record with this project's reader, drop duplicate pairs, split by
prompt, put the pairs in the same order and write training and held-out files, which must be the same bytes. Each side
runs in a process of its own; its peak memory is the kernel's (`VmHWM`), pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qadapter.files.artifacts import digest_file
from qadapter.preferences.ledger import RECORDS, update
from qadapter.preferences.mixture import write_mixture
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.prepare import prepare
from qadapter.preferences.records import Reason
from qadapter.preferences.split import HELDOUT, TRAIN, Drawn, Row, divide
from qadapter.preferences.stream import DEFAULT_MAX_CHARS

OURS, THEIRS = "prepare", "datasets"
LEDGER, AGAIN, MIXTURE = "ledger", "again", "mixture"
SIDES = (OURS, THEIRS, LEDGER, AGAIN, MIXTURE)
FILES = ("train.jsonl", "heldout.jsonl")
CHARACTERS = 2000
"""Of a row, so that a million rows are 2 GB."""


def write_rows(file: Path, rows: int, seed: int = 0) -> None:
    """Make-believe pairs: a fifth of the rows share their prompt with others, one in a hundred is a duplicate."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 9))) for _ in range(5000)]
    sentences = [" ".join(drawn.choices(words, k=12)) + "." for _ in range(20_000)]
    prompts: list[str] = []
    with file.open("w", encoding="utf-8") as stream:
        line = ""
        for number in range(rows):
            if line and drawn.random() < 0.01:
                stream.write(line)
                continue
            if prompts and drawn.random() < 0.2:
                prompt = drawn.choice(prompts)
            else:
                prompt = f"{number}: " + " ".join(drawn.choices(sentences, k=CHARACTERS // 160))
                prompts = [*prompts[-999:], prompt]
            chosen, rejected = (" ".join(drawn.choices(sentences, k=CHARACTERS // 320)) for _ in range(2))
            line = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n"
            stream.write(line)


def ours(file: Path, out: Path) -> None:
    """The data stage of this project."""
    prepare([file], out)


def theirs(file: Path, out: Path) -> None:
    """The same work with `datasets`: a map to rows, a filter for duplicates, a sort, a filter for each side."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(out / "cache"))

    def to_row(record: dict[str, Any]) -> dict[str, Any]:
        row = Row.of(PreferencePair(({"role": "user", "content": record["prompt"].strip()},), *replies(record)), 0)
        return {"order": row.order.hex(), "prompt": row.prompt.hex(), "text": row.text.decode()}

    def replies(record: dict[str, Any]) -> tuple[str, str]:
        chosen, rejected = record["chosen"].strip(), record["rejected"].strip()
        if not (chosen and rejected and chosen != rejected):
            raise ValueError(Reason.EMPTY_REPLY)
        return chosen, rejected

    mapped = data.map(to_row, remove_columns=data.column_names)
    seen: set[str] = set()
    distinct = mapped.filter(lambda order: not (order in seen or seen.add(order)), input_columns="order")  # type: ignore[func-returns-value]
    drawn = Drawn()
    for order, prompt in zip(distinct["order"], distinct["prompt"], strict=True):
        drawn.add(Row(bytes.fromhex(order), bytes.fromhex(prompt), b""))
    division = divide(drawn)
    ordered = distinct.sort("order")
    places = division.places(np.array([bytes.fromhex(prompt) for prompt in ordered["prompt"]], division.heldout.dtype))
    for name, place in zip(FILES, (TRAIN, HELDOUT), strict=True):
        side = ordered.select(np.flatnonzero(places == place))
        with (out / name).open("w", encoding="utf-8") as stream:
            stream.writelines(text + "\n" for text in _texts(side))


def _texts(side: Any) -> Iterator[str]:
    for batch in side.iter(batch_size=1000):
        yield from batch["text"]


def ledger(file: Path, out: Path) -> None:
    """The first ledger of a growing source."""
    update([file], None, out, domain=None, max_chars=DEFAULT_MAX_CHARS, rules="")


def again(file: Path, out: Path) -> None:
    """The ledger of the same file after the first one: every record is found there."""
    update([file], out.with_name(LEDGER), out, domain=None, max_chars=DEFAULT_MAX_CHARS, rules="")


def mixture(_: Path, out: Path) -> None:
    """The training mixture of the first ledger."""
    settings: dict[str, Any] = {"learnt": None, "rows": "all", "old_share": 0.0, "heldout": 0.1, "seed": 0}
    limits = {"max_train_pairs": None, "max_heldout_pairs": None, "max_chars": DEFAULT_MAX_CHARS}
    write_mixture(out.with_name(LEDGER), out, **settings, **limits, heldout_files=None, domain=None)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the file, run both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="for the temporary folder; needs four times the file")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what to measure, in this order")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        _run_side(options.side, *options.paths)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder, "pairs.jsonl")
        write_rows(file, options.rows)
        size = file.stat().st_size / 1e6
        found = {side: _measured(side, file, Path(folder, side)) for side in options.sides}
        print(f"{options.rows:,} pairs, {size:,.0f} MB")
        print(f"{'':<16}{'seconds':>10}{'rows/s':>10}{'peak MB':>10}{'written':>10}")
        for side, result in found.items():
            speed = options.rows / result["seconds"]
            print(f"{side:<16}{result['seconds']:>10.1f}{speed:>10,.0f}{result['peak']:>10,.0f}{result['pairs']:>10,}")
        if MIXTURE in found and OURS in found:
            print(f"the mixture is what was prepared: {'yes' if _same(found, MIXTURE, OURS) else 'NO'}")
        if not {OURS, THEIRS} <= found.keys():
            return
        first, second = found[OURS], found[THEIRS]
        print(f"time {second['seconds'] / first['seconds']:.2f}x, peak memory {second['peak'] / first['peak']:.2f}x")
        print(f"same files: {'yes' if _same(found, OURS, THEIRS) else 'NO'}")


def _same(found: dict[str, dict[str, Any]], one: str, other: str) -> bool:
    return bool(found[one]["digests"] == found[other]["digests"])


def _run_side(side: str, file: Path, out: Path) -> None:
    start = time.perf_counter()
    work = {OURS: ours, THEIRS: theirs, LEDGER: ledger, AGAIN: again, MIXTURE: mixture}
    work[side](file, out)
    seconds = time.perf_counter() - start
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000
    print(json.dumps({"seconds": seconds, "peak": peak}))


def _measured(side: str, file: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    command = [sys.executable, "-m", "benchmarks.preparation", "--side", side, str(file), str(out)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    files = [out / name for name in (FILES if (out / FILES[0]).exists() else (RECORDS,))]
    result["pairs"] = sum(sum(1 for _ in file.open("rb")) for file in files)
    result["digests"] = [digest_file(file) for file in files]
    return result


if __name__ == "__main__":
    main()
