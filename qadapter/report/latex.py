"""The comparison as LaTeX: `\\input{report}` in a document with the packages booktabs and graphicx."""

from __future__ import annotations

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
}


def escape(text: str) -> str:
    """Text without a meaning of its own in LaTeX."""
    return "".join(_SPECIAL.get(character, character) for character in text)


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
    for label, cells in content.rows:
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
