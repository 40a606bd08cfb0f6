"""Tables in Markdown and LaTeX: a cell stays a cell."""

from __future__ import annotations

from reported_runs import HOSTILE

from fedsplit.reporting.text_table import Table


def test_cells_are_escaped() -> None:
    table = Table("", [("", "a|b"), (HOSTILE, "100%")])
    assert table.markdown().splitlines()[0] == "|  | a\\|b |"
    assert "<script" not in table.markdown()
    row = table.latex().splitlines()[4]
    assert row.startswith(r"\textless{}script\textgreater{}alert(1)")
    assert r"\& \$x\_1\$ \textbackslash{}frac & 100\% \\" in row


def test_a_backslash_does_not_free_the_bar_behind() -> None:
    """In Markdown `\\\\|` is a backslash and the end of the cell."""
    table = Table("", [("a\\|b", "")])
    assert table.markdown().splitlines()[0] == "| a\\\\\\|b |  |"
