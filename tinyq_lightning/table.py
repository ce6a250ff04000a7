"""Tables, written as text for a screen, as Markdown, or as HTML."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from shutil import get_terminal_size

__all__ = [
    "Table",
    "format_bytes",
    "screen_width",
]

_NARROWEST = 8  # Characters; no column of text is made narrower to fit a screen.
_GAP = "  "


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

    def text(self, width: int | None = None) -> str:
        """Columns padded with blanks, for a screen.

        Args:
            width: the characters of a line. Text that does not fit is wrapped within its column, the widest column
                first; numbers are not. None: lines of any length.
        """
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        if width is not None:
            self._narrow(widths, width)
        rule = ["─" * width for width in widths]
        return "\n".join(
            self._aligned(part, widths) for line in (self.header, rule, *self.rows) for part in _wrapped(line, widths)
        )

    def _narrow(self, widths: list[int], width: int) -> None:
        """Make the widest columns of text narrower until a line fits, or none can be."""
        while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
            column = max(range(self.left), key=lambda each: widths[each])
            if widths[column] <= _NARROWEST:
                return
            widths[column] -= 1

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        padded = (
            cell.ljust(width) if column < self.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return _GAP.join(padded).rstrip()

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


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The lines that a row takes on the screen, the cells that are shorter filled up with empty ones."""
    cells = (_folded(cell, width) for cell, width in zip(line, widths, strict=True))
    return zip_longest(*cells, fillvalue="")


def _folded(cell: str, width: int) -> list[str]:
    """The cell in lines of at most ``width`` characters, broken after blanks, underscores and dots where that fits."""
    lines, line = [], ""
    for piece in re.split(r"(?<=[\s_])|(?<=\.)(?!\d)", cell):
        if len(line + piece.rstrip()) > width and line:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def screen_width() -> int | None:
    """Characters of a line of the terminal that is stdout; None where it is no terminal, such as a file or a pipe."""
    return get_terminal_size().columns if sys.stdout.isatty() else None


def format_bytes(count: float) -> str:
    """``1.23 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
