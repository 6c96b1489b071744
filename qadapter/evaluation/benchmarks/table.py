"""The generated benchmarks: which task each serves, what it is made of, and what writes its items. One line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qadapter.config.evaluation import BuiltBenchmarks
from qadapter.evaluation.benchmarks.bits_per_byte.build import write_texts
from qadapter.evaluation.benchmarks.preference.build import write_preference_items
from qadapter.evaluation.benchmarks.reply_matching.build import write_reply_matching
from qadapter.toyworld.world import DOMAIN_STYLES, PREFERENCES

Made = Literal["conversations", "pairs", "world"]
"""What items are made of: prompts and replies, preference pairs, or the toy world, which writes its own."""


@dataclass(frozen=True)
class Limits:
    """How many items, how long, drawn by which seed; see `BuiltBenchmarks`."""

    max_items: int
    max_chars: int
    seed: int


Write = Callable[[str, Sequence[Any], Limits, Path], dict[str, int]]
"""A benchmark's name, its material, the limits and the folder `benchmarks/` → names and numbers of what was counted."""


@dataclass(frozen=True)
class GeneratedBenchmark:
    """One benchmark whose items this project writes.

    Attributes:
        task: its task; `{name}` is replaced by the names in the config.
        made_of: the material.
        write: writes the items; None where another row's or the toy world's file is read.
        of_world: names for which the toy world writes it; an empty one for a task without `{name}`.
    """

    task: str
    made_of: Made
    write: Write | None = None
    of_world: tuple[str, ...] = ()


def _reply_matching(name: str, conversations: Sequence[Any], limits: Limits, folder: Path) -> dict[str, int]:
    file = folder / f"{name}_reply_matching.jsonl"
    written = write_reply_matching(
        conversations, file, seed=limits.seed, max_items=limits.max_items, max_chars=limits.max_chars
    )
    return {f"{name}_reply_matching": written.items}


def _texts(name: str, conversations: Sequence[Any], limits: Limits, folder: Path) -> dict[str, int]:
    replies = [reply for _, reply in conversations]
    file = folder / f"{name}_text.jsonl"
    return {f"{name}_text": write_texts(replies, file, max_items=limits.max_items, max_chars=limits.max_chars)}


def _preference(name: str, pairs: Sequence[Any], limits: Limits, folder: Path) -> dict[str, int]:
    file = folder / f"{name}_preference.jsonl"
    written = write_preference_items(
        pairs, file, seed=limits.seed, max_items=limits.max_items, max_chars=limits.max_chars
    )
    counts = {"": written.items, "_multi_turn": written.multi_turn, "_over_long": written.over_long}
    return {f"{name}_preference{which}": count for which, count in counts.items()}


GENERATED: tuple[GeneratedBenchmark, ...] = (
    GeneratedBenchmark("{name}_reply_matching", "conversations", _reply_matching),
    GeneratedBenchmark("{name}_bits_per_byte", "conversations", _texts),
    GeneratedBenchmark("{name}_word_order", "conversations"),
    GeneratedBenchmark("{name}_preference", "pairs", _preference, of_world=PREFERENCES),
    GeneratedBenchmark("toy_style_{name}", "world", of_world=DOMAIN_STYLES),
    GeneratedBenchmark("toy_facts", "world", of_world=("",)),
    GeneratedBenchmark("toy_sums", "world", of_world=("",)),
    GeneratedBenchmark("toy_advice", "world", of_world=("",)),
    GeneratedBenchmark("toy_howtos", "world", of_world=("",)),
    GeneratedBenchmark("toy_refusals", "world", of_world=("",)),
)


def tasks_made(built: BuiltBenchmarks | None, toy_world: bool) -> set[str]:
    """The tasks whose items an experiment writes.

    Args:
        built: the experiment's section, if it has one: then its benchmarks are read and not the toy world's.
        toy_world: whether there is one.
    """
    names: dict[Made, Iterable[str]] = {}
    if built:
        names = {"conversations": [*built.replies, *built.questions], "pairs": built.preferences}
        return {row.task.replace("{name}", name) for row in GENERATED for name in names.get(row.made_of, ())}
    return {row.task.replace("{name}", name) for row in GENERATED for name in row.of_world} if toy_world else set()
