"""The report of a sequence: what it recommends, its matrices, the heat map and the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.text import Text

from qadapter.evaluation.sequence.matrix import Passage
from qadapter.files.artifacts import read_json
from qadapter.report.panels import panels
from qadapter.report.sequence.build import Cost, build_continual_report, matrix_table, recommended
from qadapter.report.sequence.figure import heat_maps
from tests.qadapter.evaluation.test_sequence import passage

WAYS = {
    "continued": passage([[1.0], [0.4, 1.0], [0.1, 0.3, 1.0]], [1.0, 0.9, 0.8]),
    "composed": passage([[0.9], [0.9, 0.9], [0.8, 0.9, 0.9]], [1.0, 1.0, 1.0]),
    "retrained": passage([[1.0], [1.0, 1.0], [1.0, 1.0, 1.0]], [1.0, 0.9, 0.9]),
}
COSTS = {"continued": Cost(30, 300), "composed": Cost(30, 300), "retrained": Cost(60, 600)}


def test_what_is_recommended() -> None:
    """Within the budget first; then ACC; where two are not surely apart, the cheaper one."""
    assert recommended(WAYS, 0.02, COSTS) == "composed", "the others forget .1 and .2 of the base"
    assert recommended(WAYS, 0.15, COSTS) == "composed", "4 of 30 answers behind `retrained`, which is not sure"
    dearer = {**COSTS, "composed": Cost(90, 900)}
    assert recommended(WAYS, 0.15, dearer) == "retrained"
    assert recommended({"continued": WAYS["continued"], "retrained": WAYS["retrained"]}, 0.0, COSTS) == "retrained"
    same = {"a": WAYS["retrained"], "b": WAYS["retrained"]}
    assert recommended(same, 1.0, {"a": Cost(9, 900), "b": Cost(9, 100)}) == "b"


@pytest.mark.slow
def test_the_report_of_a_sequence(tmp_path: Path) -> None:
    build_continual_report(WAYS, title="A sequence <of> three", budget=0.02, costs=COSTS, out=tmp_path)
    text = (tmp_path / "continual.md").read_text(encoding="utf-8")
    assert "By default: composed. After 3 preferences it has ACC 0.867" in text
    assert "composed − continued: ACC +0.400" in text
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["continual/continued/accuracy"] == pytest.approx(1.4 / 3)
    assert metrics["continual/continued/backward_transfer"] == pytest.approx((-0.9 - 0.7) / 2)
    assert metrics["continual/retrained/forgetting"] == pytest.approx(0.1)
    table = read_json(tmp_path / "matrix.json")
    rows = list(zip(*table.values(), strict=True))
    assert ("continued", "two", "one", pytest.approx(0.4)) in rows
    assert ("continued", "three", "kept", pytest.approx(0.8)) in rows
    assert len(rows) == 3 * (1 + 2 + 3 + 3)
    page = (tmp_path / "continual.html").read_text(encoding="utf-8")
    assert "A sequence &lt;of&gt; three" in page
    assert page.count("<table") == 4
    HTMLParser().feed(page)
    assert (tmp_path / "continual.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(table)


def test_a_matrix_is_shown_below_its_diagonal() -> None:
    table = matrix_table(WAYS["continued"])
    assert table.columns == ("one", "two", "three", "kept")
    assert [[cell.text for cell in cells] for _, cells in table.rows] == [
        ["1.000", "", "", "1.000"],
        ["0.400", "1.000", "", "0.900"],
        ["0.100", "0.300", "1.000", "0.800"],
    ]


def test_the_heat_map_writes_every_number_once(tmp_path: Path) -> None:
    figure = heat_maps(WAYS, tmp_path / "heat.png", "heat")
    panel = figure.axes[0]
    shown = [text.get_text() for text in panel.findobj(Text) if text.get_text().startswith(("0.", "1."))]
    assert sorted(shown) == sorted(["1.00", "0.40", "1.00", "0.10", "0.30", "1.00", "1.00", "0.90", "0.80"])
    assert [axes.get_title() for axes in figure.axes[:3]] == list(WAYS)
    one = Passage(("a", "b"), WAYS["composed"].outcomes, WAYS["composed"].base)
    assert len(one.domains) == 2


def test_panels_fill_lines_of_so_many() -> None:
    """Four panels of 2 by 1 inches, three in a line: two lines, 6 by 2 inches and the margin, two places free."""
    figure, axes = panels(["a", "b", "c", "d"], beside=3, size=(2.0, 1.0), margin=(0.5, 0.25))
    assert figure.get_size_inches().tolist() == [6.5, 2.25]
    assert {name: panel.get_title() for name, panel in axes.items()} == {name: name for name in "abcd"}
    assert [panel.get_visible() for panel in figure.axes] == [True] * 4 + [False] * 2
    narrow, _ = panels(["a"], beside=3, size=(2.0, 1.0), narrowest=6.0)
    assert narrow.get_size_inches().tolist() == [6.0, 1.0]
