"""Tables of a report: plain cells, which the page, Markdown and LaTeX each escape in their own way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    r"""A table whose first row is its head, and whose first column names the rows.

    Attributes:
        title: Words above the table.
        rows: Cells by row.
        note: A line below the table; empty for none.
        is_words: True for cells of words, which read better from the left.

    Example:
        >>> table = Table("losses", [("run", "loss"), ("a|b", "3.1 ± 0.2")])
        >>> print(table.markdown())
        | run | loss |
        | --- | ---: |
        | a\|b | 3.1 ± 0.2 |
    """

    title: str
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_words: bool = False

    @property
    def head(self) -> Sequence[str]:
        """The first row."""
        return self.rows[0]

    @property
    def body(self) -> Sequence[Sequence[str]]:
        """All further rows."""
        return self.rows[1:]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        rows = [list(map(_markdown_cell, row)) for row in self.rows]
        rows.insert(1, rule)
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def latex(self) -> str:
        r"""Returns the table in LaTeX, for the package booktabs.

        Example:
            >>> print(Table("", [("run", "loss"), ("a_b", "3.1 ± 0.2")]).latex())
            \begin{tabular}{lr}
            \toprule
            run & loss \\
            \midrule
            a\_b & 3.1 $\pm$ 0.2 \\
            \bottomrule
            \end{tabular}
        """
        rows = [" & ".join(map(_latex_cell, row)) + r" \\" for row in self.rows]
        columns = "l" + "r" * (len(self.head) - 1)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _markdown_cell(cell: str) -> str:
    """Returns a cell in which nothing is taken for the table's own bars, for HTML or for emphasis."""
    # Backslashes first: the escapes below add further ones, which must stay single.
    escaped = cell.replace("\\", "\\\\").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|*`\[\]])", r"\\\1", escaped)


_LATEX = {
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
    "±": r"$\pm$",
    "‖": r"$\|$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "→": r"$\to$",
}


def _latex_cell(cell: str) -> str:
    """Returns a cell in which LaTeX takes nothing for a command."""
    # Character by character, so that the backslash of one escape is not escaped by another.
    return "".join(_LATEX.get(character, character) for character in cell)
