"""`qadapter dial`: the operating point of one adapter under a forgetting budget."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from qadapter.command.opened import base_of_adapter, base_settings, note, rendering_as_asked, require_adapter
from qadapter.command.options import DialOptions
from qadapter.command.retaining import own_benchmarks
from qadapter.config.budget import Budget
from qadapter.config.curve import CurveSettings
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.budget import Choice, choose_among, facts_of
from qadapter.evaluation.curve.measure import measure_curve
from qadapter.evaluation.curve.parts import SPLIT
from qadapter.evaluation.curve.points import read_curves
from qadapter.export.card import Exported, write_card
from qadapter.export.facts import FACTS, Facts, Measurement
from qadapter.export.known import read_facts
from qadapter.files.artifacts import read_json, storage_errors, write_json, write_json_lines
from qadapter.policy.base import load_tokenizer
from qadapter.policy.dial import Dial
from qadapter.policy.files import read_policy, write_dial
from qadapter.policy.tokenizer import policy_tokenizer, training_record
from qadapter.preferences.building import Choices
from qadapter.preferences.stream import parse_files

DEFAULT_MAX_LENGTH = 512


def run(options: DialOptions) -> None:
    """Measure the curve, choose under the budget, print what was found, and set the dial if asked to.

    Raises:
        QAdapterError: an adapter, data or benchmarks that cannot be used, or too few items to choose on.
    """
    adapter = Path(options.adapter[0]).expanduser()
    require_adapter(adapter)
    read_policy(adapter)
    base = options.base or base_of_adapter(adapter)
    model = base_settings(options, base, adapter)
    budget = Budget(
        max_forgetting=options.budget, per_task=options.per_task, max_over_refusals=options.max_over_refusals
    )
    if unmeasured := budget.unmeasured(options.tasks, old_answers=0):
        raise QAdapterError(f"--max-over-refusals: {unmeasured}")
    own = own_benchmarks(options.retain)
    of_base = load_tokenizer(base, revision=model.revision, trust_remote_code=options.trust_remote_code)
    tokenizer = rendering_as_asked(options, policy_tokenizer(adapter, of_base))
    retention = RetentionSettings(
        tasks=options.tasks,
        own={name: str(file) for name, file in own.items()},
        # as in `qadapter train --retain`
        plain_tasks=options.plain_tasks if tokenizer.chat_template else (*options.tasks, *own),
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="qadapter-dial-") as scratch:
        heldout = _heldout(options, adapter, Path(scratch))
        out = Path(scratch) / "curve"
        out.mkdir()
        measure_curve(
            base,
            adapter,
            heldout,
            model=model,
            adaptation=AdaptationSettings(batch_size=options.batch_size),
            retention=retention,
            curve=CurveSettings(kinds=options.kinds, points=options.points, values=options.values),
            max_length=options.max_length or training_record(adapter).get("max_length") or DEFAULT_MAX_LENGTH,
            world=None,
            style=None,
            benchmarks=Path(options.benchmarks) if options.benchmarks else None,
            out=out,
            official_data=Path(options.official_data) if options.official_data else None,
            own_tokenizer=tokenizer,
            own=own,
            allow_base_mismatch=options.allow_base_mismatch,
        )
        curves = read_curves(out)
    choice = choose_among(curves, budget)
    note(choice.sentence())
    points = [
        {"dial": str(Dial(curve.kind, p.value)), "adaptation": p.learnt.mean, "retention": p.retention}
        for curve in curves
        for p in curve.points
    ]
    print(json.dumps({**facts_of(choice), "points": points}, indent=2))
    if options.save:
        _save(adapter, base, choice)


def _heldout(options: DialOptions, adapter: Path, scratch: Path) -> Path:
    """Prepared pairs that adaptation is measured on.

    Raises:
        QAdapterError: there are none.
    """
    own = adapter / "data" / "heldout.jsonl"
    if options.data is None:
        if not own.is_file() or not own.stat().st_size:
            raise QAdapterError(f"{adapter} has no held-out pairs beside it; give --data, pairs it was not trained on")
        return own
    files = options.located(options.data, options.split)
    pairs = parse_files(files, domain=options.domain, max_chars=options.max_chars, choices=Choices.of(options)).pairs
    if not pairs:
        raise QAdapterError(f"no pair of {options.data} can be used; `qadapter data {options.data}` shows why")
    file = scratch / "heldout.jsonl"
    write_json_lines(file, (pair.to_trl() for pair in pairs))
    return file


def _save(adapter: Path, base: str, choice: Choice) -> None:
    """Set the adapter's dial; its card says what was measured there."""
    dial = choice.dial
    with storage_errors(adapter):
        write_dial(adapter, dial)
        known = Facts.from_json(read_json(adapter / FACTS)) if (adapter / FACTS).is_file() else Facts("")
        learnt, lost = choice.adaptation, choice.forgetting
        before = choice.adaptation.estimate - choice.gain.estimate
        measured = replace(
            known,
            dial=str(dial),
            learnt=(
                Measurement(
                    "pairs whose chosen reply is more likely per token",
                    learnt.estimate,
                    learnt.low,
                    learnt.high,
                    choice.items[0],
                    before,
                ),
            ),
            forgotten=(
                Measurement(
                    "mean of the benchmarks, base minus policy",
                    lost.estimate,
                    lost.low,
                    lost.high,
                    choice.items[1],
                    0.0,
                ),
            ),
            split=f"the half of the items that the dial was not chosen on (split {SPLIT})",
        )
        write_json(adapter / FACTS, measured.to_json())
        write_card(adapter, read_facts(adapter, base), Exported("adapter"))
    note(f"the dial of {adapter} stands at {dial}")
