"""Which script a text is written in. A script is not a language: Latin is English, French and Turkish alike."""

from __future__ import annotations

import re

# Ranges of The Unicode Standard's blocks, letters of the scripts that most text on the web is in.
_RANGES = {
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
    "Hangul": "\uac00-\ud7a3\u1100-\u11ff",
    "Kana": "\u3040-\u30ff",
    "Han": "\u4e00-\u9fff\u3400-\u4dbf",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _RANGES.items()}
_MOST_CHARACTERS = 1000


def main_script(text: str) -> str:
    """The script of most letters in a text's first 1,000 characters; `Japanese` where a tenth of its letters is kana;
    `none` without letters of a known script."""
    start = text[:_MOST_CHARACTERS]
    if start.isascii():
        return "Latin" if _LETTERS["Latin"].search(start) else "none"
    counts = {name: len(letters.findall(start)) for name, letters in _LETTERS.items()}
    total = sum(counts.values())
    if not total:
        return "none"
    if counts["Kana"] >= total / 10 and counts["Kana"] + counts["Han"] > total / 2:
        return "Japanese"
    return max(counts, key=lambda name: counts[name])
