"""Model cards of a comparison: for each domain and method what was learnt and forgotten, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qadapter.evaluation.statistics import Interval
from qadapter.export.card import Exported, card_text
from qadapter.export.facts import DataFile, Facts, Measurement
from qadapter.report.card_files import card_file
from qadapter.report.intervals import Measured
from qadapter.report.items import SCORE
from qadapter.report.rows import kind, spread


def write_cards(
    measured: Measured, data: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], out: Path
) -> None:
    """Write `cards/<domain>/<method>/README.md`.

    Args:
        measured: all rows.
        data: source → its `summary.json`.
        config: the experiment's settings.
        out: the report's folder.
    """
    for domain in measured.domains:
        for method in measured.methods:
            if kind(method) == "base" or not measured.seeds(method, [domain]):
                continue
            file = card_file(out, domain, method)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = card_text(f"{domain}, {method}", _facts(measured, domain, method, data, config), Exported("adapter"))
            file.write_text(text, encoding="utf-8")


def _facts(
    measured: Measured, domain: str, method: str, data: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> Facts:
    described = config.get("domains", {}).get(domain, {})
    source = str(described.get("source", domain))
    summary = data.get(source, {})
    model = config.get("model", {})
    base = str(model.get("pretrained") or f"{config.get('name', 'the run')}, trained from scratch in the run")
    files = [
        DataFile(f"{source}, {part}", str(summary[f"{part}_sha256"]))
        for part in ("train", "heldout")
        if f"{part}_sha256" in summary
    ]
    training = config.get("training", {})
    names = ("learning_rate", "max_steps", "epochs", "batch_size", "max_length")
    settings = {name: training[name] for name in names if training.get(name) is not None}
    own = config.get("methods", {}).get(method) or {}
    settings |= {f"{method}.{name}": value for name, value in own.items() if value is not None}
    settings |= {f"adapter.{name}": value for name, value in config.get("lora", {}).items()}
    settings["seeds"] = ", ".join(str(seed) for seed in measured.seeds(method, [domain]))
    return Facts(
        base=f"{base} ({described['base']})" if described.get("base") else base,
        method=method,
        settings=settings,
        dial="scale=1",
        data=tuple(files),
        learnt=tuple(_learnt(measured, domain, method)),
        forgotten=tuple(_forgotten(measured, domain, method)),
    )


def _learnt(measured: Measured, domain: str, method: str) -> list[Measurement]:
    found = spread(measured.rows, SCORE, domain, method)
    if not found.n:
        return []
    before = spread(measured.rows, SCORE, domain, measured.base_of(method))
    return [_measurement("adaptation score", found.mean, measured.score(method, domain), before.mean)]


def _forgotten(measured: Measured, domain: str, method: str) -> list[Measurement]:
    rows = []
    for measure in [*measured.measures, None]:
        name = measure.replace("retention/", "forgetting/", 1) if measure else "forgetting/mean"
        found = spread(measured.rows, name, domain, method)
        if found.n:
            sample = measured.forgetting(method, [domain], measure)
            lower = measure is not None and not measured.higher.get(measure, True)
            label = f"{name.split('/')[1]}, {'policy minus base' if lower else 'base minus policy'}"
            rows.append(_measurement(label, found.mean, sample.interval if sample else None, None))
    kl = spread(measured.rows, "forgetting/kl_per_token", domain, method)
    if kl.n:
        rows.append(Measurement("KL(base ‖ policy) on old text, nats per token", kl.mean, of_base=0.0))
    return rows


def _measurement(label: str, value: float, interval: Interval | None, of_base: float | None) -> Measurement:
    one = Measurement(label, value, of_base=of_base)
    return one if interval is None else replace(one, low=interval.low, high=interval.high, items=interval.items)
