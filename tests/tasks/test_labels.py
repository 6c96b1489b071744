"""Labels of compared runs come from names that anybody may have given: they do nothing where they are shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from qadapter.report.figures import retention_against_adaptation
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from tasks.tracking.past_runs import _label


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
