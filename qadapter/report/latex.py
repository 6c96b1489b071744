"""The comparison as LaTeX: `\\input{report}` in a document with the packages booktabs and graphicx."""

from __future__ import annotations

import unicodedata
from itertools import accumulate

from qadapter.report.tables import Cell, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
    "‖": r"$\Vert$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "…": r"\ldots{}",
    "−": "$-$",
    "×": r"$\times$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "→": r"$\to$",
    "—": "---",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "⁄": "/",
    "●": r"$\bullet$",
}
_GREEK = dict(  # omicron and the capitals that look like Latin letters have no command
    zip(
        "αβγδεζηθικλμνξπρσςτυφχψωΓΔΘΛΞΠΣΥΦΨΩ",
        (
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma varsigma tau "
            "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
        ).split(),
        strict=True,
    )
)


def escape(text: str) -> str:
    """Text without a meaning of its own in LaTeX, in ASCII: pdflatex stops at most of what is not."""
    return "".join(_written(character) for character in text)


def _written(character: str) -> str:
    """One character: itself, its command, or the nearest that ASCII has."""
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character in _GREEK:
        return rf"$\{_GREEK[character]}$"
    if character.isascii():
        return character
    parts = unicodedata.normalize("NFKD", character)
    if parts == character:  # an accent on its own goes, what has no parts is named by its number
        return "" if unicodedata.combining(character) else f"(U+{ord(character):04X})"
    written = "".join(_written(part) for part in parts)
    place = {"<super>": "textsuperscript", "<sub>": "textsubscript"}
    command = place.get(unicodedata.decomposition(character).partition(" ")[0])
    return rf"\{command}{{{written}}}" if command else written


def latex(content: Table, caption: str) -> str:
    """A `table*` as wide as the page: grouped headings, intervals small under the numbers, the best bold."""
    ends = list(accumulate(span for _, span in content.groups))
    starts = [end - span for end, (_, span) in zip(ends, content.groups, strict=True)]
    heads = " & ".join(rf"\multicolumn{{{span}}}{{c}}{{{escape(name)}}}" for name, span in content.groups)
    rules = " ".join(rf"\cmidrule(lr){{{start + 2}-{end + 1}}}" for start, end in zip(starts, ends, strict=True))
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'c' * len(content.columns)}}}",
        r"\toprule",
        rf" & {heads} \\",
        rules,
        " & ".join(escape(name) for name in (content.corner, *content.columns)) + r" \\",
        r"\midrule",
    ]
    for heading, rows in content.parts:
        if heading:
            lines.append(
                rf"\addlinespace \multicolumn{{{len(content.columns) + 1}}}{{l}}{{\emph{{{escape(heading)}}}}} \\"
            )
        for label, cells in rows:
            lines.append(" & ".join([escape(label), *(_number(cell) for cell in cells)]) + r" \\")
            if any(cell.interval for cell in cells):
                lines.append(" & ".join(["", *(_interval(cell) for cell in cells)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _number(cell: Cell) -> str:
    text = escape(cell.text)
    return rf"\textbf{{{text}}}" if cell.best else text


def _interval(cell: Cell) -> str:
    # In braces: a bracket behind `\\` would be read as that command's optional argument.
    return rf"{{\tiny {escape(cell.interval)}}}" if cell.interval else ""
