"""Write the tables of a page as Markdown and as LaTeX, for papers."""

import re
from collections.abc import Iterator
from html import unescape
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from upright.tables import markdown

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "°": r"\textdegree{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""LaTeX for characters with a meaning of their own."""


class Table(NamedTuple):
    """A table of a page: its caption, and the cells of each row, the headings first."""

    caption: str
    rows: list[list[str]]

    @property
    def numbers(self) -> int:
        """Number of columns from the right, without the first, whose cells are all numbers or a hyphen."""
        columns = reversed([*zip(*self.rows[1:], strict=True)][1:])
        return len([*takewhile(lambda column: all(re.match(r"[\d+-]|$", cell) for cell in column), columns)])

    def latex(self) -> str:
        """Return the table in LaTeX, with the package booktabs."""
        columns = "l" * (len(self.rows[0]) - self.numbers) + "r" * self.numbers
        head, *body = [" & ".join(map(_escaped, row)) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escaped(self.caption)}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def write_tables(page: str, folder: Path) -> None:
    """Write all tables of a page into ``tables.md`` and ``tables.tex`` (with the package booktabs) of ``folder``."""
    tables = [*_tables(page)]
    sections = [f"{table.caption}\n\n{markdown(table.rows, numbers=table.numbers)}" for table in tables]
    (folder / "tables.md").write_text("\n".join(sections), encoding="utf-8")
    text = "\n\n".join(table.latex() for table in tables)
    (folder / "tables.tex").write_text(f"% needs \\usepackage{{booktabs}}\n{text}\n", encoding="utf-8")


def _tables(page: str) -> Iterator[Table]:
    """Yield the tables of a page. Its text is escaped, so every ``<`` begins a tag."""
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        caption, *rows = re.findall(r"<(?:caption|tr)>(.*?)</(?:caption|tr)>", table, re.DOTALL)
        yield Table(_text(caption), [[*map(_text, re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row))] for row in rows])


def _text(content: str) -> str:
    # An interval is small, on a line of its own in the page.
    text = re.sub(r"<.*?>", "", content.replace("<small>", " (").replace("</small>", ")"))
    return " ".join(unescape(text).split())


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
