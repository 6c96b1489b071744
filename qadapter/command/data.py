"""`qadapter data`: show how preference data are read, before training on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qadapter.command.options import ShowDataOptions
from qadapter.files.folders import shown_path
from qadapter.files.shown import visible
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted
from qadapter.preferences.shards import Findings
from qadapter.preferences.stream import no_usable_pair, stream_files

SHOWN_PAIRS, SHOWN_CHARACTERS = 3, 400


def run(options: ShowDataOptions) -> None:
    """Print the layout, three pairs as they are read, the counts and the reasons of the quarantine.

    Raises:
        QAdapterError: the data are not preference data, need a choice, or have no usable pair. The message proposes a
            mapping if the fields' names suggest one.
    """
    for line in report(options.located(options.file, options.split), options):
        print(line)


def report(files: list[Path], options: ShowDataOptions) -> Iterator[str]:
    """The lines of the report on some files."""
    choices = Choices.of(options)
    findings = Findings()
    reasons: Counter[str] = Counter()
    shown: list[PreferencePair] = []
    used = with_margin = 0
    for item in stream_files(files, findings, domain=options.domain, max_chars=options.max_chars, choices=choices):
        if not isinstance(item, Accepted):
            reasons[item.reason.value] += 1
            continue
        used += 1
        with_margin += item.pair.margin is not None
        if len(shown) < SHOWN_PAIRS:
            shown.append(item.pair)
    for name in sorted(set(findings.formats.values())):
        places = [shown_path(Path(file.name)) for file in files if findings.formats.get(file) == name]
        yield f"layout: {name} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''})"
    for file, layout in findings.odd.items():
        yield f"WARNING: {shown_path(Path(file.name))} looks like {layout}; it is read like the files beside it"
    for number, pair in enumerate(shown, 1):
        yield f"\n--- pair {number}" + ("" if pair.margin is None else f" (margin {pair.margin:g})")
        yield from (f"{turn['role']:>9}: {_short(turn['content'])}" for turn in pair.prompt)
        yield f"   chosen: {_short(pair.chosen)}"
        yield f" rejected: {_short(pair.rejected)}"
    quarantined = sum(reasons.values())
    margins = f", {with_margin} of them with a margin" if with_margin else ""
    yield f"\n{used + quarantined} pairs read, {used} can be used{margins}, {quarantined} cannot"
    if findings.labels:
        yield "  labels: " + ", ".join(f"{visible(name)} {count}" for name, count in sorted(findings.labels.items()))
    yield from (f"  {count} kept with {what}" for what, count in sorted(findings.counts.items()))
    yield from (f"  {count} quarantined: {reason}" for reason, count in sorted(reasons.items()))
    if not used:
        raise no_usable_pair(files, reasons)


def _short(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    return visible(shown).replace("\n", "\n           ")
