"""The report's pages: complete in themselves, safe for any text that a model wrote, and well formed."""

from __future__ import annotations

import base64
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

from qadapter.files.artifacts import write_json_lines
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.quality import Quality
from qadapter.report import page as page_module
from qadapter.report.answers import side_by_side
from qadapter.report.build import build_report
from qadapter.report.curves import training_curves
from qadapter.report.latex import escape, latex
from qadapter.report.markdown import plain
from qadapter.report.page import TEMPLATE
from qadapter.report.rows import Row
from qadapter.report.tables import Cell, Table
from tests.support.paths import PROJECT_ROOT
from tests.support.report_files import prompt, rule_row, toy_rows

ATTACK = '<script>alert("1")</script><img src=x onerror=alert(2)>'
DATA = {"academy": {"quarantined": {ATTACK: 1}, "train_sha256": "a" * 64, "heldout_sha256": "b" * 64}}
EMPTY = {"img", "meta", "br", "link", "hr"}


class Page(HTMLParser):
    """Reads a page as a browser does: its tags, what they hold, and whether they close."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("report")
    rows = toy_rows(tmp_path / "rows")
    more = {"base_follows": [0, 0, 0, 1], "base_kept": {"facts": [1, 1, 1, 1], "sums": [1, 1, 1, 0]}}
    kept = {"facts": [1, 1, 1, 1], "sums": [1, 1, 0, 0]}
    rows.append(rule_row(tmp_path / "rows", "academy", "dpo", 0, follows=[0, 0, 0, 0], kept=kept, reply=ATTACK, **more))
    out = tmp_path / "out"
    out.mkdir()
    build_report(rows, title="A <b>bold</b> title", data=DATA, config={"name": ATTACK}, out=out)
    return out


def test_what_a_model_wrote_is_text_and_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert "b" not in names
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(ATTACK) >= 4 + 1 + 1  # four replies, a reason of the quarantine, the config
    assert "A <b>bold</b> title" in page.text


def test_the_page_needs_nothing_else(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    places = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert all(place is not None and place.startswith(("#", "data:image/png;base64,")) for place in places)
    assert {"link", "script", "iframe"} & {tag for tag, _ in page.tags} == set()
    images = [place for place in places if place and place.startswith("data:")]
    assert len(images) == 2
    figure = (report / "retention_adaptation.png").read_bytes()
    assert base64.b64decode(images[0].partition(",")[2]) == figure
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert {place.removeprefix("#") for place in places if place and place.startswith("#")} <= anchors


def test_the_template_is_installed_with_the_package() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["qadapter"]
    assert any(fnmatch(f"report/{TEMPLATE}", pattern) for pattern in patterns)
    assert (Path(page_module.__file__).parent / TEMPLATE).is_file()


def test_the_page_shows_the_numbers(report: Path) -> None:
    """The Q-Adapter's adaptation 0.750 with its interval, SFT's forgetting 0.750 with a star, a sentence."""
    text = (report / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<td class="best">\s*<span class="value">0.750</span><span class="interval">\[0\.', text)
    assert re.search(r'<span class="value">0.750\*</span>', text)
    assert "degradation avoided +0.625 [" in Page(text).text
    assert text.count('class="verdict win"') == 4  # the Q-Adapter and SFT on two prompts each


def test_markdown_shows_replies_as_they_are(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text.partition("## Answers")[2].partition("## Data")[0]
    assert "- dpo [loss]: &lt;script&gt;alert" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("# no heading\n- no item", r"\# no heading ⏎ \- no item"),
        ("a | b", r"a \| b"),
        ("**x** `y` [z](u)", r"\*\*x\*\* \`y\` \[z\]\(u\)"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_plain(given: str, shown: str) -> None:
    assert plain(given) == shown


# ---- answers side by side


def test_all_answers_are_in_a_table(report: Path) -> None:
    table = pd.read_csv(report / "answers.csv", dtype=str, keep_default_na=False)
    assert list(table["prompt"]) == [f"user: q{i}" for i in range(4)]
    verdicts = ("q-adapter: verdict", "sft: verdict", "dpo: verdict")
    assert [table[name][3] for name in verdicts] == ["tie", "loss", "loss"]
    assert table["dpo"][0] == ATTACK


def test_twenty_prompts_at_even_distances(tmp_path: Path) -> None:
    """Two domains, ten each: of 30 prompts the 0th, 3rd, 6th … and of 10 all."""
    rows = []
    for domain, count in (("a", 30), ("b", 10)):
        for method, seed in (("base", None), ("dpo", 0), ("dpo", 1)):
            folder = tmp_path / f"{domain}{method}{seed}"
            answers = [
                {"prompt": prompt(f"{domain}{i}"), "reply": f"{method}{seed} on {i}", "verdict": "tie", "judge": "rule"}
                for i in range(count)
            ]
            write_json_lines(folder / "answers.jsonl", answers)
            rows.append(Row(domain, method, seed, {}, adaptation=folder))
    shown = side_by_side(rows)
    assert [entry.turns[-1][1] for entry in shown] == [
        *(f"a{i}" for i in range(0, 30, 3)),
        *(f"b{i}" for i in range(10)),
    ]
    assert [(r.method, r.text, r.verdict) for r in shown[1].answers] == [
        ("base", "baseNone on 3", ""),
        ("dpo", "dpo0 on 3", "tie"),
    ]


def test_the_bases_reply_is_taken_from_where_it_is(tmp_path: Path) -> None:
    answers = [{"prompt": prompt("q"), "base": "before", "reply": "after", "verdict": "undecided", "judge": "none"}]
    write_json_lines(tmp_path / "answers.jsonl", answers)
    (entry,) = side_by_side([Row("d", "dpo", 0, {}, adaptation=tmp_path)])
    assert [(r.method, r.text, r.verdict) for r in entry.answers] == [("base", "before", ""), ("dpo", "after", "")]


def test_the_quality_of_the_data_is_a_section(tmp_path: Path) -> None:
    quality = Quality(lambda reply: False, {"quiz": [["How many legs has a spider?"]]})
    prompt = Message(role="user", content="How many legs has a spider?")
    quality.add(PreferencePair((prompt,), "eight legs", "six"))
    rows = [Row("d", "dpo", 0, {"adaptation/score": 0.5})]
    build_report(rows, title="T", data={}, quality={"mine": quality.report()}, config={}, out=tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "mine: training prompts contain 1 of 1 items of quiz (items 1)" in text
        assert "27 / 10 / 3" in text


def test_no_answers_no_section(tmp_path: Path) -> None:
    build_report([Row("d", "dpo", 0, {"adaptation/score": 0.5})], title="T", data={}, config={}, out=tmp_path)
    assert "## Answers" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert 'id="answers"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "training_curves.png").exists()


# ---- LaTeX and curves


def test_latex_by_hand() -> None:
    table = Table(
        "method",
        (("Learnt", 1), ("Kept", 2)),
        ("toy_facts", "50 %", "KL ↓"),
        (("q-adapter", (Cell("0.9", "[0.8, 1.0]", best=True), Cell("1"), Cell("–"))),),
    )
    assert latex(table, "A & B").splitlines() == [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        r"\caption{A \& B}",
        r"\resizebox{\textwidth}{!}{%",
        r"\begin{tabular}{lccc}",
        r"\toprule",
        r" & \multicolumn{1}{c}{Learnt} & \multicolumn{2}{c}{Kept} \\",
        r"\cmidrule(lr){2-2} \cmidrule(lr){3-4}",
        r"method & toy\_facts & 50 \% & KL $\downarrow$ \\",
        r"\midrule",
        r"q-adapter & \textbf{0.9} & 1 & -- \\",
        r" & {\tiny [0.8, 1.0]} &  &  \\",
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]


def test_latex_escapes_all_that_has_a_meaning() -> None:
    assert escape(r"\ & % $ # _ { } ~ ^") == (
        r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{}"
    )


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("residual α0=0.1", r"residual $\alpha$0=0.1"),
        ("dpo · β=1", r"dpo $\cdot$ $\beta$=1"),
        ("Δ π̃ γ", r"$\Delta$ $\pi$ $\gamma$"),
        ("1 − 2 ± 3 × 4 ≤ 5", r"1 $-$ 2 $\pm$ 3 $\times$ 4 $\le$ 5"),
        ("10⁻³ x₀ ½", r"10\textsuperscript{$-$}\textsuperscript{3} x\textsubscript{0} 1/2"),
        ("“café”, l’été", "``cafe'', l'ete"),
        ("中‰", "(U+4E2D)(U+2030)"),
    ],
)
def test_latex_is_ascii(given: str, written: str) -> None:
    assert escape(given) == written
    assert written.isascii()


def test_a_table_with_a_sweeps_labels_is_ascii() -> None:
    rows = tuple(
        (label, (Cell("0.9 ± 0.1", "[0.8, 1.0]"), Cell("−1")))
        for label in ("dpo · β=1", "residual, then α0=2", "q-adapter (naïve run)")
    )
    text = latex(Table("method", (("Learnt", 2),), ("KL ↓", "β × lr"), rows), "α0 · 95 % … “x” 中")
    assert text.isascii()
    assert text.splitlines()[9] == r"method & KL $\downarrow$ & $\beta$ $\times$ lr \\"
    assert text.splitlines()[11] == r"dpo $\cdot$ $\beta$=1 & 0.9 $\pm$ 0.1 & $-$1 \\"


def test_the_reports_latex_is_well_formed(report: Path) -> None:
    text = (report / "report.tex").read_text(encoding="utf-8")
    assert text.isascii()
    assert text.count("{") == text.count("}")
    assert re.findall(r"\\(begin|end)\{([a-z*]+)\}", text) == [
        ("begin", "table*"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("end", "table*"),
    ]
    (columns,) = re.findall(r"\\begin\{tabular\}\{l(c+)\}", text)
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 4 + 3  # base, and three methods with a line of intervals each
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(columns)}
    assert all(line.endswith(r"\\") for line in body)


def test_curves_are_drawn(tmp_path: Path) -> None:
    rows = toy_rows(tmp_path)
    assert training_curves(rows, tmp_path / "curves.png", "T")
    height, width = matplotlib.image.imread(tmp_path / "curves.png").shape[:2]
    assert width > height > 200
    assert not training_curves([r for r in rows if r.method == "base"], tmp_path / "none.png", "T")
    assert not (tmp_path / "none.png").exists()
