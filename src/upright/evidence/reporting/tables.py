"""Write the tables of a page as Markdown and as LaTeX, for papers."""

from collections.abc import Iterator
from html.parser import HTMLParser
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
    """A table of a page.

    Args:
        caption: text above it.
        rows: the headings, then the cells of each row.
    """

    caption: str
    rows: list[list[str]]


class _Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("caption", "th", "td"):
            self.words = []
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag == "small":
            self.words.append(" (")  # an interval, on a line of its own in the page

    def handle_endtag(self, tag: str) -> None:
        text = " ".join("".join(self.words).split())
        if tag == "caption":
            self.tables.append(Table(text, []))
        elif tag in ("th", "td"):
            self.tables[-1].rows[-1].append(text)
        elif tag == "small":
            self.words.append(")")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write_tables(page: str, folder: Path) -> None:
    """Write all tables of a page into ``tables.md`` and ``tables.tex`` (with the package booktabs) of ``folder``."""
    tables = _Reader(page).tables
    sections = [f"{table.caption}\n\n{markdown(table.rows, numbers=_numbers(table))}" for table in tables]
    (folder / "tables.md").write_text("\n".join(sections), encoding="utf-8")
    text = "% needs \\usepackage{booktabs}\n" + "\n".join("\n".join(_latex(table)) + "\n" for table in tables)
    (folder / "tables.tex").write_text(text, encoding="utf-8")


def _latex(table: Table) -> Iterator[str]:
    numbers = _numbers(table)
    yield r"\begin{table}"
    yield rf"\caption{{{_escaped(table.caption)}}}"
    yield rf"\begin{{tabular}}{{{'l' * (len(table.rows[0]) - numbers)}{'r' * numbers}}}"
    yield r"\toprule"
    for number, row in enumerate(table.rows):
        yield " & ".join(map(_escaped, row)) + r" \\"
        if number == 0:
            yield r"\midrule"
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _numbers(table: Table) -> int:
    """Return the number of columns from the right, without the first, whose cells are all numbers or a hyphen."""
    count = 0
    for column in reversed(list(zip(*table.rows[1:], strict=True))[1:]):
        if not all(cell[:1].isdigit() or cell[:1] in "+-" for cell in column):
            break
        count += 1
    return count


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
