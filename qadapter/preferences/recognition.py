"""The layout of a source, chosen once from its first records.

`recognise` looks at every field of the first records. What a layout does not read and could change the meaning of a
reply (context, history, tools, weights) makes the source refused, or the record quarantined where only a few have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices, Context
from qadapter.preferences.cells import are_lists_of_texts, columns_of_cells, columns_of_structs, opened
from qadapter.preferences.formats import BY_NAME, FORMATS, GROUPS, Format
from qadapter.preferences.mapping import FieldMapping
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.propose import proposal
from qadapter.preferences.reader import Reader
from qadapter.preferences.records import Reason
from qadapter.preferences.refusals import sentence_of
from qadapter.preferences.transcripts import style_of
from qadapter.preferences.turns import UnusableRecord
from qadapter.preferences.unread_fields import NOT_TEXT, suspects, unexplained


def recognise(
    records: Sequence[Any], *, where: str = "the data", domain: str | None = None, choices: Choices | None = None
) -> Reader:
    """The reader for a source, from its first records.

    Args:
        records: the first 100 or so, decoded; what could not be decoded left out.
        where: what to call the source in messages.
        domain: the preferred style of DSP data; must be None for every other layout.
        choices: what the user decided.

    Raises:
        QAdapterError: records of no known layout or of two, fields that would be ignored, a choice that is missing or
            means nothing here. The message shows fields, never contents.
    """
    context = Context(domain=domain, choices=choices or Choices())
    objects = [record for record in records if isinstance(record, dict)]
    cells, structs = columns_of_cells(objects), columns_of_structs(objects)
    if cells or structs:
        readable = [record for record in map(_opened_or_none(cells, structs), objects) if record is not None]
        if not readable:
            raise QAdapterError(
                f"{where} has messages written out as text ({', '.join(cells)}) that is neither JSON nor a Python "
                "list, such as numpy writes. Write the data again as JSON: `to_json(orient='records', lines=True)`."
            )
        objects = readable
    if context.choices.fields is not None:
        reader = _mapped(objects, context, where, cells, structs)
    else:
        reader = _detected(objects, context, where, cells, structs)
    _check_min_margin(reader, records, context, where)
    context.counts.clear()
    context.labels.clear()
    return reader


def _opened_or_none(cells: Sequence[str], structs: Sequence[str]) -> Any:
    def open_one(record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return opened(record, cells, structs)
        except UnusableRecord:
            return None

    return open_one


def _mapped(
    objects: Sequence[dict[str, Any]], context: Context, where: str, cells: Sequence[str], structs: Sequence[str]
) -> Reader:
    _refuse_meaningless(context, where, "a mapping (`fields`)", takes_domain=False, takes=None)
    mapping = FieldMapping(context.choices.fields or {})
    mapping.check(objects, where)
    inner = mapping.inner(objects)
    prompts = [words for record in inner for words in mapping.prompts(record)]
    if prompts:
        context.prompt_style = style_of(prompts, every=True)
    elif "prompt" not in mapping.paths:
        context.reply_style = style_of([words for record in inner for words in mapping.replies(record)])
    return Reader("mapping", context, mapping, None, cells, structs)


def _detected(
    objects: Sequence[dict[str, Any]], context: Context, where: str, cells: Sequence[str], structs: Sequence[str]
) -> Reader:
    if are_lists_of_texts(objects):
        raise QAdapterError(
            f"{where} has `chosen` and `rejected` that are lists of texts written out as text. They may be several "
            "replies or a reply that is a list. Write the data as JSON lines with lists, or take them as they are: set "
            "`fields: {prompt: prompt, chosen: chosen, rejected: rejected}`."
        )
    fitting = [_fits(record) for record in objects]
    winner = _winner(fitting)
    if not winner:
        raise _unknown(objects, where)
    others = [sentence_of(record) for record, names in zip(objects, fitting, strict=True) if not names]
    sentences = Counter(sentence for sentence in others if sentence)
    if sentences and sentences.most_common(1)[0][1] > fitting.count(winner):
        raise _unknown(objects, where, sentences.most_common(1)[0][0])
    if len(winner) > 1:
        shown = "".join(f"\n  {name}: {BY_NAME[name].example}" for name in winner)
        raise QAdapterError(
            f"{where} has records that fit {len(winner)} layouts:{shown}\nSay which fields to read: "
            f"{_suggestion(objects)}."
        )
    file_format = BY_NAME[winner[0]]
    chosen = [record for record, names in zip(objects, fitting, strict=True) if names == winner]
    _refuse_meaningless(context, where, f"the layout {file_format.name}", file_format.takes_domain, file_format.takes)
    _refuse_ignored(chosen, file_format, where)
    if file_format.takes_domain:
        _check_domain(chosen, context, where)
    name = _set_styles(objects, chosen, file_format, context)
    parse = file_format.choose(chosen, context, where) if file_format.choose else BY_NAME[name.split(":")[0]].parse
    return Reader(name, context, parse, file_format, cells, structs)


def vote(records: Sequence[Any]) -> tuple[str, ...]:
    """The layouts that most of some records fit; none where they fit none, several where they all fit."""
    objects = [record for record in records if isinstance(record, dict)]
    cells, structs = columns_of_cells(objects), columns_of_structs(objects)
    readable = (_opened_or_none(cells, structs)(record) for record in objects) if cells or structs else objects
    return _winner([_fits(record) for record in readable if record is not None])


def _winner(fitting: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    votes = Counter(names for names in fitting if names)
    return max(votes, key=lambda names: (votes[names], -FORMATS.index(BY_NAME[names[0]])), default=())


def _fits(record: dict[str, Any]) -> tuple[str, ...]:
    """The layouts that a record fits, of the first group that it fits any of."""
    found = [row for row in FORMATS if _looks(row, record)]
    for group in GROUPS:
        if names := tuple(row.name for row in found if row.group == group):
            return names
    return ()


def _looks(row: Format, record: dict[str, Any]) -> bool:
    try:
        return bool(row.looks_like(record))
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError):
        return False


def _set_styles(
    objects: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]], file_format: Format, context: Context
) -> str:
    """Decide how conversations are written out; the name of the layout with its style."""
    name = file_format.name
    if name in ("hh-dialogues", "transcript"):
        # A record without a mark votes for bare texts, but is still read as one of these.
        alike = [r for r in objects if isinstance(r.get("chosen"), str) and isinstance(r.get("rejected"), str)]
        columns = [[record[side] for record in alike] for side in ("chosen", "rejected")]
        styles = [style_of(column) for column in columns]
        if name == "hh-dialogues":
            return name
        if styles[0] is not None and styles[1] is not None and styles[0].name == styles[1].name:
            context.reply_style = styles[0]
            return f"transcript:{styles[0].name}"
        return "trl-plain" if all(record.get("prompt") is not None for record in chosen) else "trl-plain-implicit"
    if name == "text-score":
        inside = [words for record in chosen for words in record["text"] if isinstance(words, str)]
        context.reply_style = style_of(inside)
    else:
        prompts = [record["prompt"] for record in chosen if isinstance(record.get("prompt"), str)]
        context.prompt_style = style_of(prompts, every=True) if prompts else None
        context.repeats_prompt = name == "trl-plain" and _repeat_their_prompts(chosen)
    return name


def _repeat_their_prompts(records: Sequence[dict[str, Any]]) -> bool:
    """Whether, in every record, both replies begin with the prompt, and the prompts are not just a word or two."""
    prompts = [record["prompt"].strip() for record in records]
    return 2 * sum(len(prompt) >= 20 for prompt in prompts) > len(prompts) and all(
        record[side].lstrip().startswith(prompt)
        for record, prompt in zip(records, prompts, strict=True)
        for side in ("chosen", "rejected")
    )


def _refuse_meaningless(
    context: Context, where: str, layout: str, takes_domain: bool = False, takes: str | None = None
) -> None:
    """A choice that selects nothing is a mistake: of the data, or of the setting."""
    given = {"domain": None if takes_domain else context.domain}
    given |= {name: getattr(context.choices, name) for name in ("preferred", "score", "pairing") if name != takes}
    for name, value in given.items():
        if value is not None:
            uses = {
                "domain": "Domains select responses of DSP data only",
                "preferred": "It selects a judgement of pku-saferlhf only",
                "score": "It selects a score of ultrafeedback-raw only",
                "pairing": "It pairs rows of one reply and a label only",
            }[name]
            raise QAdapterError(f"{where} has {layout}, which does not support `{name}: {value}`. {uses}; remove it.")


def _refuse_ignored(records: Sequence[dict[str, Any]], file_format: Format, where: str) -> None:
    ignored = Counter(
        field
        for record in records
        if (field := unexplained(record, file_format, suspects(record, file_format))) and field not in NOT_TEXT
    )
    if 2 * sum(ignored.values()) <= len(records):
        return
    names = ", ".join(f"`{_printable(field)}`" for field in ignored)
    raise QAdapterError(
        f"{where} has the layout {file_format.name} and beside it {names}, which would be ignored and may be part of "
        f"what the replies answer. Map the fields ({_suggestion(records)}), or remove what means nothing from the data."
    )


def _check_domain(records: Sequence[dict[str, Any]], context: Context, where: str) -> None:
    domains = sorted({str(style) for record in records for style in record["responses"]})
    if context.domain not in domains:
        given = "no domain was given" if context.domain is None else f"there is no domain '{context.domain}' in it"
        raise QAdapterError(
            f"{where} is DSP data, and {given}. Its domains are {', '.join(map(_printable, domains[:20])) or '(none)'}"
            "; set `domain` to one of them."
        )


def _check_min_margin(reader: Reader, records: Sequence[Any], context: Context, where: str) -> None:
    if context.choices.min_margin is None:
        return
    # Rows of one reply are paired across records, and a pair of labels has no margin.
    pairs = [] if reader.across_records else [pair for record in records for pair in reader.read(record)]
    known = [
        p for p in pairs if p is Reason.WEAK_PREFERENCE or (isinstance(p, PreferencePair) and p.margin is not None)
    ]
    if reader.across_records or (not known and any(isinstance(pair, PreferencePair) for pair in pairs)):
        raise QAdapterError(
            f"{where} ({reader.name}) has no margins, for which `min_margin: {context.choices.min_margin:g}` means "
            "nothing. Remove it, or name the field that holds them as `margin` in `fields`."
        )


def _unknown(objects: Sequence[dict[str, Any]], where: str, sentence: str | None = None) -> QAdapterError:
    first = objects[0] if objects else {}
    sentence = sentence or next(iter(Counter(s for o in objects if (s := sentence_of(o))).most_common(1)), [None])[0]
    if sentence:
        return QAdapterError(f"{where} {sentence}")
    fields = ", ".join(f"{_printable(key)}: {type(value).__name__}" for key, value in list(first.items())[:8])
    known = ", ".join(row.name for row in FORMATS)
    return QAdapterError(
        f"{where} has records of an unknown format; the first one has the fields {{{fields}}}. Expected one of "
        f"the layouts of docs/data.md ({known}). Else say where prompt and replies lie: {_suggestion(objects)}."
    )


def _suggestion(records: Sequence[Any]) -> str:
    guess = proposal(records)
    if guess is None:
        return "set `fields`, such as `fields: {prompt: question, chosen: better, rejected: worse}` (docs/data.md)"
    return f"set `fields`; by their names it may be `fields: {guess}`, which nothing has checked"


def _printable(key: Any) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in str(key))
    return shown if len(shown) <= 30 else shown[:30] + "…"
