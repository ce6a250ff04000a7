"""Tables, written as text for a screen, as Markdown, or as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Table",
    "format_bytes",
]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: one title for each column.
        rows: the cells.
        left: the number of columns, from the first, that are aligned to the left; the others hold numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Columns padded with blanks, for a screen."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        rule = ["─" * width for width in widths]
        return "\n".join(self._aligned(line, widths) for line in (self.header, rule, *self.rows))

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        padded = (
            cell.ljust(width) if column < self.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    def markdown(self) -> str:
        """For loggers that show Markdown."""
        rule = [":--" if column < self.left else "--:" for column in range(len(self.header))]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.header, rule, *self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """A ``<table>``; cells are escaped. Columns aligned to the left have the class ``left``."""
        body = "".join(f"<tr>{self._html_cells(row, 'td')}</tr>" for row in self.rows)
        head = self._html_cells(self.header, "th")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _html_cells(self, cells: Sequence[str], tag: str) -> str:
        shown = []
        for column, cell in enumerate(cells):
            if column < self.left:
                shown.append(f"<{tag} class=left>{escape(cell)}</{tag}>")
            else:
                number = cell.replace("-", "−") if tag == "td" else cell
                shown.append(f"<{tag}>{escape(number)}</{tag}>")
        return "".join(shown)


def format_bytes(count: float) -> str:
    """``1.23 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
