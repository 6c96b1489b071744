"""What `max_length` took from the training pairs, as a sentence of the summary."""

from __future__ import annotations

from collections.abc import Sequence

from qadapter.report.rows import Row, listed, ordered

_CUTS = (
    ("train/truncated_prompts", "the beginning of {} prompt{s}"),
    ("train/truncated_replies", "the end of a reply in {} pair{s}"),
)


def cut_sentences(rows: Sequence[Row]) -> list[str]:
    """How many training pairs of each domain lost tokens; nothing where none did.

    Args:
        rows: of a comparison. The methods of a domain read the same pairs, so the largest count of them is said.
    """
    parts = []
    for domain in ordered(row.domain for row in rows):
        found = []
        for metric, words in _CUTS:
            count = round(max(row.metrics.get(metric, 0.0) for row in rows if row.domain == domain))
            if count:
                found.append(words.format(f"{count:,}", s="" if count == 1 else "s"))
        if found:
            parts.append(f"{listed(found)} ({domain})")
    return [f"training.max_length cut {'; '.join(parts)}."] if parts else []
