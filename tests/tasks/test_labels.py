"""Labels of compared runs come from names that anybody may have given: they do nothing where they are shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qadapter.report.figures import retention_against_adaptation
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from tasks.tracking.past_runs import _FlowRun, _label, _labelled


def test_a_run_name_becomes_a_plain_label() -> None:
    name = "smoke · a|b](x) \x1b[31m`*<b>\u202e"
    label = _label(SimpleNamespace(info=SimpleNamespace(run_name=name, run_id="0123456789")), {})
    assert label == r"abx \x1b31mb\u202e"


def test_a_figure_draws_a_label_with_dollar_signs(tmp_path: Path) -> None:
    r"""`$\frac$` is no formula: as mathematics it would end in an error."""
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.5}
    rows = [Row("academy", method, 0, metrics) for method in ("base", r"sft ($\frac$)")]
    file = tmp_path / "figure.png"
    retention_against_adaptation(Measured(rows), file, r"title with $\frac$")
    assert file.stat().st_size > 1000


def flow_run(domain: str, beta: float, **trained: Any) -> _FlowRun:
    """A flow run of DPO in one domain, with the base there."""

    def run(**params: Any) -> SimpleNamespace:
        name = f"{domain} {params}"
        return SimpleNamespace(data=SimpleNamespace(tags={}, params=params), info=SimpleNamespace(run_id=name))

    cells: dict[Any, Any] = {(domain, "base", None): run(domain=domain)}
    settings = {"domain": domain, "base": "helpful", "seed": "0", "dpo.beta": str(beta), **trained}
    cells[domain, "dpo", 0] = run(**settings)
    return _FlowRun(domain, run(), [], cells)


def test_other_domains_are_of_one_method_only_with_its_settings() -> None:
    """A mean over `law` with β = 0.1 and `academy` with β = 1 is of two methods; a domain has its own epochs."""
    law = flow_run("law", 0.1, **{"training.epochs": "1"})
    assert _labelled([law, flow_run("academy", 1.0)]) == {"dpo"}
    assert _labelled([law, flow_run("academy", 0.1, **{"training.learning_rate": "0.01"})]) == {"dpo"}
    assert _labelled([law, flow_run("academy", 0.1, **{"training.epochs": "3"})]) == set()
