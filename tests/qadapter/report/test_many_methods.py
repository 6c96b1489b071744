"""A report with every method there is: rows and columns by group, pictures that stay within their edges."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from qadapter.methods.method import Group
from qadapter.methods.table import METHODS, NAMES
from qadapter.report import markdown
from qadapter.report.curves import training_curves
from qadapter.report.figures import retention_against_adaptation
from qadapter.report.intervals import Measured
from qadapter.report.latex import latex
from qadapter.report.rows import Row, groups_of, methods_of
from qadapter.report.tables import cost_table, main_table


def rows_of(names: tuple[str, ...], folder: Path | None = None) -> list[Row]:
    found = []
    for place, (domain, name) in enumerate(product(("harmless", "academy"), ("base", *names))):
        training = None
        if folder is not None and name != "base":
            training = folder / f"{domain}-{name}"
            training.mkdir()
            (training / "history.jsonl").write_text(
                "".join(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in (1, 2, 3))
            )
        metrics = {"adaptation/score": place % 7 / 7, "retention/mean": 1 - place % 5 / 20, "cost/train_seconds": 1.5}
        found.append(Row(domain, name, None if name == "base" else 0, metrics, training=training))
    return found


def test_few_methods_stay_in_the_tables_order() -> None:
    few = ("q-adapter", "sft", "dpo", "replay", "orpo")
    assert methods_of(rows_of(few)) == ["base", *few]
    assert groups_of(["base", *few]) == ()
    assert main_table(Measured(rows_of(few))).sections == ()


def test_many_methods_are_listed_by_group() -> None:
    listed = methods_of(rows_of(NAMES))
    groups = {method.name: method.group for method in METHODS}
    order = list(get_args(Group))
    assert listed[0] == "base"
    assert sorted(listed[1:]) == sorted(NAMES)
    places = [order.index(groups[name]) for name in listed[1:]]
    assert places == sorted(places)
    for group in order:
        members = [name for name in NAMES if groups[name] == group]
        assert [name for name in listed if groups.get(name) == group] == members, "in the table's order"
    sections = groups_of(listed)
    assert [name for name, _ in sections] == ["", *order]
    assert sum(count for _, count in sections) == len(listed)
    assert groups_of([*listed, "own (other run)"])[-1] == ("others", 1)


def test_tables_have_a_heading_for_each_group(tmp_path: Path) -> None:
    measured = Measured(rows_of(NAMES))
    table = main_table(measured)
    lines = markdown.table(table).splitlines()
    assert [line.split("|")[1].strip() for line in lines if "*" in line.split("|")[1]] == [
        f"*{group}*" for group in get_args(Group)
    ]
    assert [label for _, part in table.parts for label, _ in part] == measured.methods
    assert latex(table, "many").count(r"\emph{") == len(get_args(Group))
    assert [name for name, _ in cost_table(measured).groups] == ["", *get_args(Group)], "there they are columns"


@pytest.mark.slow
def test_pictures_of_many_methods_stay_readable(tmp_path: Path) -> None:
    """The legend's entries do not overlap each other or the edge; curves are drawn in bands of eight."""
    rows = rows_of(NAMES, tmp_path)
    figure = retention_against_adaptation(Measured(rows), tmp_path / "trade.png", "many")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) >= len(NAMES) + 1
    width, height = figure.canvas.get_width_height()
    assert all(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height for box in boxes)
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    assert training_curves(rows, tmp_path / "curves.png", "many")
    assert Image.open(tmp_path / "curves.png").size[0] < 120 * 30
