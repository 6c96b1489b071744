"""The pictures: the front's stairs end at the edges, and many policies can be told apart."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qadapter.report.figures import STYLES, retention_against_adaptation, styles_of
from qadapter.report.front import pareto_front, stairs
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row, Spread
from qadapter.report.sweep import build as sweep
from qadapter.report.sweep.figure import draw_sweep
from qadapter.report.sweep.points import (
    OfSeed,
    Point,
    Setting,
    best_by_trade,
    best_that_keeps,
    chosen_on_other_seeds,
    front_of,
)

FRONT = "Pareto front"


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def stairs_of(panel: Axes, style: str) -> list[list[float]]:
    (line,) = [line for line in panel.lines if line.get_linestyle() == style and len(np.asarray(line.get_xdata())) > 2]
    return [[float(x), float(y)] for x, y in np.asarray(line.get_xydata())]


# ---- the front


def test_what_was_not_measured_is_not_on_the_front() -> None:
    """A comparison with NaN is false, so nothing would beat such a point; it beats no other point either."""
    points = {"a": (0.5, 0.9), "b": (math.nan, 0.95), "c": (0.6, math.nan), "d": (0.4, 0.8)}
    assert pareto_front(points) == ["a"]
    assert pareto_front({"b": (math.nan, 0.95)}) == []


def test_stairs_by_hand() -> None:
    """From the left edge to the highest point, down to the next one's height and so on, at the last to the floor."""
    assert stairs([(0.9, 0.5), (0.6, 0.8), (0.6, 0.8)], 0.1, 0.2) == (
        [0.1, 0.6, 0.6, 0.9, 0.9],
        [0.8, 0.8, 0.5, 0.5, 0.2],
    )
    assert stairs([(0.9, 0.5)], 0.1, 0.2) == ([0.1, 0.9, 0.9], [0.5, 0.5, 0.2])
    assert stairs([], 0.1, 0.2) == ([], [])


def rows_of(**values: tuple[float, float]) -> list[Row]:
    return [Row("d", m, 0, {"adaptation/score": x, "retention/mean": y}) for m, (x, y) in values.items()]


def test_a_front_of_one_point_is_drawn(tmp_path: Path) -> None:
    """DPO beats SFT in both: a corner at DPO whose arms reach the panel's edges."""
    figure = retention_against_adaptation(
        Measured(rows_of(sft=(0.5, 0.5), dpo=(0.7, 0.9))), tmp_path / "figure.png", "T"
    )
    (panel,) = figure.axes
    left, bottom = panel.get_xlim()[0], panel.get_ylim()[0]
    assert left < 0.5
    assert bottom < 0.5
    assert stairs_of(panel, "--") == [[left, 0.9], [0.7, 0.9], [0.7, bottom]]
    assert legend(figure) == ["sft", "dpo", FRONT]


@pytest.mark.slow
def test_small_panels_share_their_edges(tmp_path: Path) -> None:
    """The second domain widens the axes of both: the first one's stairs still begin at the edge."""
    rows = [
        Row(domain, method, 0, {"adaptation/score": x, "retention/mean": y})
        for domain, method, x, y in (
            ("a", "sft", 0.5, 0.5),
            ("a", "dpo", 0.6, 0.4),
            ("b", "sft", 0.1, 0.9),
            ("b", "dpo", 0.2, 0.1),
        )
    ]
    figure = retention_against_adaptation(Measured(rows), tmp_path / "figure.png", "T")
    for panel in figure.axes:
        found = stairs_of(panel, "--")
        assert (found[0][0], found[-1][1]) == (panel.get_xlim()[0], panel.get_ylim()[0])
    assert figure.axes[1].get_xlim()[0] < 0.1


def test_no_front_no_entry(tmp_path: Path) -> None:
    figure = retention_against_adaptation(Measured([Row("d", "sft", 0, {})]), tmp_path / "figure.png", "T")
    assert legend(figure) == ["sft"]


# ---- the sweep's


def setting(name: str) -> Setting:
    return Setting(name, "sft", "sft", ("sft",), True, {}, name)


def point(name: str, adaptation: float, retention: float, kl: list[float], trades: list[float] | None = None) -> Point:
    """A setting with one seed a value of `kl`; its trade in each seed, by default that of the mean."""
    spreads = [Spread.of([value]) for value in (adaptation, math.nan, retention, 0.0)]
    each = trades or [0.5] * len(kl)
    by_seed: dict[int | None, OfSeed] = {
        seed: OfSeed(trade, retention, adaptation, of_seed)
        for seed, (trade, of_seed) in enumerate(zip(each, kl, strict=True))
    }
    return Point(setting(name), *spreads, Spread.of(kl), adaptation, retention, by_seed, len(kl), True)


@pytest.mark.slow
def test_the_sweeps_front_of_one_point_is_drawn(tmp_path: Path) -> None:
    points = [point("a", 0.7, 0.9, [0.1]), point("b", 0.5, 0.8, [0.1])]
    base = (Spread.of([0.4]), Spread.of([0.7]))
    figure = draw_sweep(points, front_of(points), base, tmp_path / "sweep.png", "Sweep")
    for panel in figure.axes:
        left, bottom = panel.get_xlim()[0], panel.get_ylim()[0]
        assert stairs_of(panel, "-") == [[left, 0.9], [0.7, 0.9], [0.7, bottom]]
    assert legend(figure) == ["sft", "base", FRONT]
    assert legend(draw_sweep([], [], base, tmp_path / "none.png", "Sweep")) == ["base"]


def test_ties_are_broken_by_divergence_in_any_order() -> None:
    """Both have the same trade in every seed; `near` moved less from the base, of `dark` that is not known.

    On the other seeds of seed 0 `near` has 0.1 and `far` 0.3, on those of seed 1 0.2 and 0.1: there `far` is chosen.
    """
    near = point("near", 0.6, 0.8, [0.2, 0.1], [0.5, 0.5])
    far = point("far", 0.6, 0.8, [0.1, 0.3], [0.5, 0.5])
    dark = point("dark", 0.6, 0.8, [math.nan, math.nan], [0.5, 0.5])
    for points in ([near, far, dark], [dark, far, near]):
        assert best_by_trade(points).setting.name == "near"
        best = best_that_keeps(points, 0.5)
        assert best is not None
        assert best.setting.name == "near"
    odd = point("odd", 0.6, 0.8, [0.1, 0.4], [0.9, 0.5])
    even = point("even", 0.6, 0.8, [0.2, 0.2], [0.1, 0.5])
    # Seed 0 is left out: both have 0.5 on seed 1, and `even` diverged less there; its trade on seed 0 is 0.1.
    for points in ([odd, even], [even, odd]):
        assert chosen_on_other_seeds(points)[0] == 0.1


# ---- styles


def test_known_methods_keep_their_looks() -> None:
    assert styles_of(list(STYLES)) == STYLES
    assert STYLES["q-adapter"] == ("#D55E00", "o")


@pytest.mark.parametrize("names", [["q-adapter"], ["q-adapter", "sft", "dpo", "replay", "new"]])
def test_fifty_policies_look_different(names: list[str]) -> None:
    methods = ["base", *(f"{names[i % len(names)]} (run {i})" for i in range(50))]
    styles = list(styles_of(methods).values())
    assert len(set(styles)) == 51
    for one, other in pairwise(styles):
        assert one[0] != other[0]
        assert one[1] != other[1]


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as an eye sees it; 2.3 is a difference that can just be noticed."""
    given = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(EYES[eye]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", EYES)
def test_colours_differ_to_every_eye(eye: str) -> None:
    """Of the 50 policies' colours no two are nearer than 15, and none is nearer than 25 to the white behind them."""
    colours = sorted({colour for colour, _ in styles_of([f"m{i}" for i in range(50)]).values()})
    assert len(colours) == 7
    for one, other in combinations(colours, 2):
        assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 15, (one, other)
    assert min(np.linalg.norm(lab(colour, eye) - lab("#FFFFFF", eye)) for colour in colours) > 25


@pytest.mark.slow
def test_a_long_legend_stays_within_the_figure(tmp_path: Path) -> None:
    """Thirty runs with long names: fewer columns, nothing beyond the edges."""
    names = [f"q-adapter · residual w={i} lr=0.0003 (lazy-fox)" for i in range(30)]
    rows = [
        Row("d", name, 0, {"adaptation/score": i / 40, "retention/mean": 1 - i / 60}) for i, name in enumerate(names)
    ]
    figure = retention_against_adaptation(Measured(rows), tmp_path / "figure.png", "T")
    (panel,) = figure.axes
    assert panel.get_window_extent().height > 400  # pixels: the legend does not eat it
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert legend(figure) == [*names, FRONT]


def test_incomplete_settings_are_not_drawn_and_ties_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost` has the easy domain alone, where all are good: among means over both it would be the best of all."""
    drawn: list[str] = []
    monkeypatch.setattr(sweep, "draw_sweep", lambda points, *_: drawn.extend(point.setting.name for point in points))
    rows = [Row(d, "base", None, {"adaptation/score": 0.5, "retention/mean": 1.0}) for d in ("easy", "hard")]
    for domain, score in (("easy", 0.9), ("hard", 0.6)):
        for name, kl in (("far", 0.4), ("near", 0.2), *([("lost", 0.1)] if domain == "easy" else [])):
            metrics = {"adaptation/score": score, "retention/mean": 1.0, "forgetting/kl_per_token": kl}
            rows.append(Row(domain, name, 0, metrics))
    settings = [setting(name) for name in ("far", "near", "lost")]
    sweep.build_sweep_report(rows, settings, expected=2, title="Sweep", out=tmp_path)
    assert drawn == ["far", "near"]
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "Not complete, so listed but not compared: lost." in text
    listed = [line.split("|")[1].strip() for line in text.partition("## Every setting")[2].splitlines() if "|" in line]
    assert listed[2:] == ["near", "far", "lost", "base"]
