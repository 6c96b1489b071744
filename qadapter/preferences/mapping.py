"""`fields:` — where prompt and replies lie in records that no layout describes, as JMESPath expressions.

Three forms: a decision (`chosen`, `rejected`), a judgement (`responses`, `preferred`), scored candidates (`candidates`,
or `texts` and `scores`). Most layouts of `formats.py` are presets of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from qadapter.errors import QAdapterError, did_you_mean, nearest
from qadapter.preferences.building import Context, Record, decision, margin_of, scored, system_of
from qadapter.preferences.pair import PreferencePair, Role
from qadapter.preferences.records import Reason
from qadapter.preferences.transcripts import Style
from qadapter.preferences.turns import ROLES, Candidates, UnusableRecord, is_turn, score

Getter = Callable[[Any], Any]

FORMS = {
    "a decision": ("chosen", "rejected"),
    "a judgement": ("responses", "preferred"),
    "scored candidates": ("candidates",),
    "scored texts": ("texts", "scores"),
}
_OF_FORMS = {
    "best": ("scored candidates", "scored texts"),
    "margin": ("a decision", "a judgement"),  # of scores it is their difference
}
COMMON = ("prompt", "system", "history", "margin")
SETTINGS = ("best", "roles", "records", "ties")
_KEYS = (*COMMON, *(key for form in FORMS.values() for key in form), *SETTINGS)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WHOLE_NUMBER = re.compile(r"\A(-?\d+)\.0+\Z")
_COMPARISON = re.compile(r"\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": float.__lt__,
    ">": float.__gt__,
    "<=": float.__le__,
    ">=": float.__ge__,
}


class FieldMapping:
    """A checked mapping: a record in, its candidate pairs out.

    Attributes:
        paths: every expression of the mapping by the key it stands under (`responses.A`).
    """

    def __init__(self, fields: Mapping[str, Any], *, preset: bool = False, prompt_style: Style | None = None) -> None:
        """Compile a mapping.

        Args:
            fields: the keys of `docs/data.md`, section "A mapping".
            preset: it describes a layout: a `system` field and the scores beside `chosen` and `rejected` are read too.
            prompt_style: how prompts are written, if the layout defines it.

        Raises:
            QAdapterError: an unknown key, a value of the wrong kind, a bad expression, no form or two.
        """
        if not isinstance(fields, Mapping) or not fields:
            raise QAdapterError(
                "`fields` must be a mapping such as {prompt: question, chosen: better, rejected: worse}."
            )
        for key in fields:
            if key not in _KEYS:
                raise QAdapterError(f"`fields` has no key '{key}'{did_you_mean(str(key), _KEYS)}")
        self.form = _form(fields)
        self.paths: dict[str, str] = {}
        self._get: dict[str, Getter] = {}
        for key in (*COMMON, "chosen", "rejected", "preferred", "candidates", "texts", "scores", "records"):
            if fields.get(key) is not None:
                self._compile(key, fields[key])
        if preset:
            self._get.setdefault("system", system_of)
            if self.form == "a decision":
                self._get.setdefault("margin", margin_of)
        self._responses = self._labels(fields.get("responses"))
        self._best = _choice(fields, "best", ("highest", "lowest"))
        self.ties = fields.get("ties") and _choice(fields, "ties", ("keep", "drop"))
        self._roles = _roles(fields.get("roles"))
        self._style = prompt_style
        for key, forms in _OF_FORMS.items():
            if fields.get(key) is not None and self.form not in forms:
                raise QAdapterError(
                    f"`fields.{key}` has no effect on {self.form}: it is for {' and '.join(forms)}. Leave it out."
                )

    # ---- compiling

    def _compile(self, key: str, expression: Any) -> Getter:
        self._get[key] = get = self._compiled(key, expression)
        return get

    def _compiled(self, key: str, expression: Any) -> Getter:
        if not isinstance(expression, str) or not expression.strip():
            raise QAdapterError(f"`fields.{key}` must be a field's name or a JMESPath expression, not {expression!r}.")
        expression = expression.strip()
        self.paths[key] = expression
        if _NAME.fullmatch(expression):
            return lambda record: record.get(expression) if isinstance(record, dict) else None
        try:
            search = jmespath.compile(expression).search
        except (JMESPathError, ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())[:200]
            raise QAdapterError(
                f"`fields.{key}` is no JMESPath expression: {problem}. A name with other characters than letters, "
                f"digits and underscores needs quotes inside the quotes: '\"{expression}\"'."
            ) from error

        def get(record: Any) -> Any:
            try:
                return search(record)
            except (JMESPathError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError):
                raise UnusableRecord(Reason.WRONG_FIELDS) from None

        return get

    def _labels(self, responses: Any) -> list[tuple[Callable[[Any], bool], str, Getter]]:
        if responses is None:
            return []
        if not isinstance(responses, Mapping) or len(responses) < 2:
            raise QAdapterError(
                "`fields.responses` must name at least two replies by their labels, such as {A: reply_a, B: reply_b}."
            )
        compiled = []
        for label, expression in responses.items():
            get = self._compile(f"responses.{label_text(label)}", expression)
            compiled.append((_matcher(label), expression.strip(), get))
        return compiled

    # ---- reading

    def records(self, record: Record) -> Sequence[Any]:
        """The records nested in a record, if `records` gives their key; otherwise the record itself."""
        if "records" not in self._get:
            return (record,)
        inner = self._get["records"](record)
        if not isinstance(inner, list) or not inner:
            raise UnusableRecord(Reason.WRONG_FIELDS)
        return inner

    def __call__(self, record: Record, context: Context) -> Candidates:
        """All candidate pairs of a record.

        Raises:
            UnusableRecord: it gives no pair at all.
        """
        if "records" not in self._get:
            return self._one(record, context)
        candidates: Candidates = []
        for inner in self.records(record):
            try:
                if not isinstance(inner, dict):
                    raise UnusableRecord(Reason.NOT_AN_OBJECT)
                candidates += self._one(inner, context)
            except UnusableRecord as unusable:
                candidates.append(unusable.reason)
        return candidates

    def _value(self, key: str, record: Record) -> Any:
        get = self._get.get(key)
        return None if get is None else get(record)

    def _one(self, record: Record, context: Context) -> Candidates:
        if self.form == "a decision":
            return [self._decision(record, context, self._value("chosen", record), self._value("rejected", record))]
        if self.form == "a judgement":
            return self._judgement(record, context)
        return self._scored(record, context)

    def _decision(self, record: Record, context: Context, chosen: Any, rejected: Any) -> PreferencePair:
        return decision(
            context,
            self._prompt(record),
            chosen,
            rejected,
            system=self._value("system", record),
            history=self._value("history", record),
            margin=self._margin(record),
            style=self._style,
            roles=self._roles,
        )

    def _prompt(self, record: Record) -> Any:
        """The prompt; a missing one is an error where the mapping names it."""
        get = self._get.get("prompt")
        if get is None:
            return None
        value = get(record)
        if value is None:
            raise UnusableRecord(Reason.WRONG_FIELDS)
        return value

    def _margin(self, record: Record) -> float | None:
        value = self._value("margin", record)
        try:
            return None if value is None else score(value)
        except UnusableRecord:
            return None

    def _judgement(self, record: Record, context: Context) -> Candidates:
        preferred = self._value("preferred", record)
        votes = preferred if isinstance(preferred, list) else [preferred]
        winners = {self._winner(vote) for vote in votes}
        winner = winners.pop() if len(winners) == 1 else None
        if winner is None:
            raise UnusableRecord(Reason.NO_PREFERENCE)
        context.labels[winner] += 1
        replies = {expression: get(record) for _, expression, get in self._responses}
        others = [reply for expression, reply in replies.items() if expression != winner]
        if len(others) > 1:  # Arrow gives each record all replies of the file, null where it has none
            others = [reply for reply in others if reply is not None] or others[:1]
        candidates: Candidates = []
        for other in others:
            try:
                pair = self._decision(record, context, replies[winner], other)
            except UnusableRecord as unusable:
                candidates.append(unusable.reason)
                continue
            if isinstance(preferred, list):
                pair = PreferencePair(pair.prompt, pair.chosen, pair.rejected, pair.margin, len(votes))
            candidates.append(pair)
        return candidates

    def _winner(self, label: Any) -> str | None:
        if label is None:
            return None
        return next((expression for matches, expression, _ in self._responses if matches(label)), None)

    def _scored(self, record: Record, context: Context) -> Candidates:
        if self.form == "scored candidates":
            found = self._value("candidates", record)
            if not isinstance(found, list) or not all(isinstance(item, list) and len(item) == 2 for item in found):
                raise UnusableRecord(Reason.WRONG_FIELDS)
            replies = [(reply, value) for reply, value in found]
        else:
            texts, scores = self._value("texts", record), self._value("scores", record)
            if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
                raise UnusableRecord(Reason.WRONG_FIELDS)
            replies = list(zip(texts, scores, strict=True))
        return scored(
            context,
            self._prompt(record),
            replies,
            best=self._best,
            system=self._value("system", record),
            history=self._value("history", record),
            roles=self._roles,
        )

    # ---- checking

    def prompts(self, record: Record) -> list[str]:
        """The prompt's text, if it is one, to decide how prompts are written out."""
        return [value for value in [self._quiet("prompt", record)] if isinstance(value, str)]

    def replies(self, record: Record) -> list[str]:
        """The replies' texts, to decide how dialogues are written out."""
        if self.form == "a decision":
            values = [self._quiet("chosen", record), self._quiet("rejected", record)]
        elif self.form == "a judgement":
            values = [_quietly(get, record) for _, _, get in self._responses]
        elif self.form == "scored candidates":
            found = self._quiet("candidates", record)
            values = [item[0] for item in found if isinstance(item, list) and item] if isinstance(found, list) else []
        else:
            found = self._quiet("texts", record)
            values = found if isinstance(found, list) else []
        return [value for value in values if isinstance(value, str)]

    def _quiet(self, key: str, record: Record) -> Any:
        get = self._get.get(key)
        return None if get is None else _quietly(get, record)

    def inner(self, records: Sequence[Any]) -> list[dict[str, Any]]:
        """The records that the paths look into, of the first ones of a source."""
        if "records" not in self._get:
            return [record for record in records if isinstance(record, dict)]
        found = [_quietly(self._get["records"], record) for record in records]
        lists = [inner for inner in found if isinstance(inner, list)]
        return [record for inner in lists for record in inner[:100] if isinstance(record, dict)]

    def check(self, records: Sequence[Any], where: str) -> None:
        """Check that every path gives something in at least one of a source's first records.

        Raises:
            QAdapterError: one that never does; the message names the nearest fields.
        """
        inner = self.inner(records)
        if "records" in self._get and not inner:
            raise QAdapterError(
                f"`fields.records: {self.paths['records']}` gives no list of objects in {where}; "
                f"it has the fields {_names(records)}. Name the one that holds the list."
            )
        for key, get in self._get.items():
            if key == "records" or any(_gives(key, _quietly(get, record)) for record in inner):
                continue
            path = self.paths[key]
            near = _nearest(path, inner)
            raise QAdapterError(
                f"`fields.{key}: {path}` gives nothing in the first {len(inner)} records of {where}. "
                + (f"Did you mean {' or '.join(near)}?" if near else f"The records have the fields {_names(inner)}.")
                + " Correct the path in `fields`."
            )
        self._check_labels(inner, where)

    def _check_labels(self, records: Sequence[Any], where: str) -> None:
        if self.form != "a judgement":
            return
        values = [self._quiet("preferred", record) for record in records]
        labels = [label for value in values for label in (value if isinstance(value, list) else [value])]
        if any(self._winner(label) is not None for label in labels):
            return
        single = [label for label in labels if not (label is None or isinstance(label, list | dict))]
        seen = list(dict.fromkeys(label_text(label)[:20] for label in single))
        named = ", ".join(key.removeprefix("responses.") for key in self._get if key.startswith("responses."))
        raise QAdapterError(
            f"`fields.preferred: {self.paths['preferred']}` gives none of the labels {named} in {where}, but "
            f"{', '.join(seen[:8]) or 'no single values'}. Name these labels in `fields.responses`."
        )


def _gives(key: str, value: Any) -> bool:
    """Whether a path gave something; a list of candidates does if a reply and its score are both there."""
    if key == "candidates" and isinstance(value, list):
        return any(isinstance(item, list) and item and None not in item for item in value)
    return value is not None


def label_text(label: Any) -> str:
    """A label as text: `1`, `1.0`, `"1"` and `"1.0"` are one label, and so are `true` and `"True"`.

    A table with an empty cell in a column of whole numbers is written with decimals, and truths are written as Python
    spells them.
    """
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    words = str(label).strip()
    return words.lower() if words in ("True", "False") else _WHOLE_NUMBER.sub(r"\1", words)


def _matcher(label: Any) -> Callable[[Any], bool]:
    comparison = _COMPARISON.fullmatch(label) if isinstance(label, str) else None
    if comparison is not None:
        compare, limit = _COMPARE[comparison.group(1)], float(comparison.group(2))

        def compares(value: Any) -> bool:
            try:
                return compare(score(value), limit)
            except UnusableRecord:
                return False

        return compares
    wanted = label_text(label)
    return lambda value: not isinstance(value, list | dict) and label_text(value) == wanted


def _form(fields: Mapping[str, Any]) -> str:
    named = [form for form, keys in FORMS.items() if any(fields.get(key) is not None for key in keys)]
    shown = "; ".join(f"{form}: {' and '.join(keys)}" for form, keys in FORMS.items())
    if len(named) != 1:
        given = f"has {' and '.join(named)}" if named else "names no replies"
        raise QAdapterError(f"`fields` {given}; exactly one form was expected ({shown}).")
    (form,) = named
    if missing := [key for key in FORMS[form] if fields.get(key) is None]:
        raise QAdapterError(f"`fields` has {form} without `{missing[0]}`; set it ({shown}).")
    return form


def _choice(fields: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Any:
    value = fields.get(key, known[0])
    if value not in known:
        raise QAdapterError(f"`fields.{key}` must be {' or '.join(known)}, not {value!r}.")
    return value


def _roles(roles: Any) -> Mapping[str, Role]:
    if roles is None:
        return ROLES
    if not isinstance(roles, Mapping) or not set(map(str, roles.values())) <= {"user", "assistant", "system"}:
        raise QAdapterError("`fields.roles` must give user, assistant or system for each name: {customer: user}.")
    return {
        **ROLES,
        **{str(name): role for name, role in roles.items()},
        **{str(n).lower(): r for n, r in roles.items()},
    }


def _quietly(get: Getter, record: Any) -> Any:
    try:
        return get(record)
    except UnusableRecord:
        return None


def field_paths(record: Any, depth: int = 3) -> dict[str, Any]:
    """The fields of a record by their JMESPath expressions, those of objects inside it too, in order."""
    found: dict[str, Any] = {}
    if not isinstance(record, dict) or depth == 0:
        return found
    for key, value in list(record.items())[:50]:
        name = str(key) if _NAME.fullmatch(str(key)) else '"' + str(key).replace("\\", "\\\\").replace('"', '\\"') + '"'
        found[name] = value
        if isinstance(value, dict) and not is_turn(value):
            found.update({f"{name}.{inner}": v for inner, v in field_paths(value, depth - 1).items()})
    return found


def _nearest(path: str, records: Sequence[Any]) -> list[str]:
    known = {name for record in records for name in field_paths(record)}
    return nearest(path, sorted(known), 3)


def _names(records: Sequence[Any]) -> str:
    names = dict.fromkeys(name for record in records for name in field_paths(record, 1))
    return ", ".join(name[:40] for name in list(names)[:12]) or "(none)"
