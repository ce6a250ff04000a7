"""Tables, written as text for a screen, as Markdown, or as HTML."""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import zip_longest
from shutil import get_terminal_size

__all__ = [
    "Table",
    "fill",
    "first_of",
    "format_bytes",
    "screen_width",
]

_NARROWEST = 8  # Characters; no column of text is made narrower to fit a screen.
_COMFORTABLE = 12  # Nor than so many, if the table can be cut in parts instead, or a word is so long.
_SHORT_REASON = 20  # A reason of so many characters stays in its row.
_LONG = 30  # Characters from which a cell of HTML is a sentence that wraps.
_NAMED = 3  # Rows, or layers, that a sentence names.
_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: one title for each column.
        rows: the cells.
        left: the number of columns, from the first, that are aligned to the left; the others hold numbers.
        kept: the number of columns, from the first, that are repeated where a table too wide is cut in parts.
        step: the number of columns after these that stay together.
        reasons: the column whose cells ``what: why`` leave the second half to lines below where the screen is narrow.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    kept: int = 1
    step: int = 1
    reasons: int | None = None

    def text(self, width: int | None = None) -> str:
        """Columns padded with blanks, for a screen.

        Args:
            width: the characters of a line. Where they are too few, reasons go below the table, and so do columns of
                text that say the same in every row; text is wrapped within its column, the widest column first; and
                what is still too wide is cut into tables below each other. Numbers are never wrapped. None: lines of
                any length.
        """
        natural = self._natural()
        if width is None or _line(natural) <= width:
            return self._drawn(natural)
        table, notes = self._with_reasons_below()
        table, same = table._without_what_is_the_same()
        parts = [part._drawn(part._fitting(width)) for part in table._parts(width)]
        return "\n".join(["\n\n".join(parts), *(fill(note, width) for note in [*same, *notes])])

    def _natural(self) -> list[int]:
        """The widths of columns that are not wrapped."""
        lines = [self.header, *self.rows]
        return [max(len(line[column]) for line in lines) for column in range(len(self.header))]

    def _narrowest(self, comfortable: int = _NARROWEST) -> list[int]:
        """The widths below which no column goes: a number, a word of a title, a part of a name that is not long."""
        floors = []
        for column, natural in enumerate(self._natural()):
            words = [len(word) for word in self.header[column].split()]
            if column >= self.left:
                floors.append(max([*(len(row[column]) for row in self.rows), *words]))
            else:
                pieces = [len(piece.rstrip()) for row in self.rows for piece in _pieces(row[column])]
                floor = max(comfortable, min(_COMFORTABLE, max([*pieces, *words, 0])))
                floors.append(min(natural, floor))
        return floors

    def _fitting(self, width: int) -> list[int]:
        """The widths with which a line fits, or the narrowest: long titles of numbers first, then the widest text."""
        widths, floors = self._natural(), self._narrowest()
        if _line(widths) > width:
            widths[self.left :] = floors[self.left :]
        while _line(widths) > width:
            wide = [column for column in range(self.left) if widths[column] > floors[column]]
            if not wide:
                break
            widths[max(wide, key=lambda each: widths[each])] -= 1
        return widths

    def _parts(self, width: int) -> list[Table]:
        """The table, or tables of some of its columns that fit."""
        floors = self._narrowest(_COMFORTABLE)
        kept, rest = list(range(self.kept)), list(range(self.kept, len(floors)))
        parts, columns = [], kept
        for first in range(0, len(rest), self.step):
            together = rest[first : first + self.step]
            if columns != kept and _line([floors[column] for column in (*columns, *together)]) > width:
                parts.append(columns)
                columns = kept
            columns = columns + together
        return [self._of(columns) for columns in (*parts, columns)]

    def _of(self, columns: Sequence[int]) -> Table:
        """The table of some columns."""
        rows = [[row[column] for column in columns] for row in self.rows]
        left = sum(column < self.left for column in columns)
        return replace(self, header=[self.header[column] for column in columns], rows=rows, left=left, reasons=None)

    def _with_reasons_below(self) -> tuple[Table, list[str]]:
        """The table with short reasons, and a sentence for each that was longer."""
        if self.reasons is None:
            return self, []
        rows, told = [], defaultdict(list)
        for row in self.rows:
            what, colon, why = row[self.reasons].partition(": ")
            if colon and len(row[self.reasons]) > _SHORT_REASON:
                told[what, why].append(row[0])
                row = [*row[: self.reasons], what, *row[self.reasons + 1 :]]
            rows.append(row)
        notes = []
        for (what, why), names in told.items():
            notes.append(f"{what}, {first_of(names)}: {why}")
        return replace(self, rows=rows), notes

    def _without_what_is_the_same(self) -> tuple[Table, list[str]]:
        """The table without columns of text that say the same in three rows or more and in all; and what they say."""
        same = {}
        for column in range(1, self.left):
            cells = [row[column] for row in self.rows]
            cells = cells if cells[-1:] != [""] else cells[:-1]  # a sum in the last row says nothing
            if len(cells) > 2 and len(set(cells)) == 1:
                same[column] = f"{self.header[column]} {cells[0]}"
        columns = [column for column in range(len(self.header)) if column not in same]
        return (self._of(columns), [f"in every row: {', '.join(same.values())}"]) if same else (self, [])

    def _drawn(self, widths: Sequence[int]) -> str:
        header = [_folded(cell, width) for cell, width in zip(self.header, widths, strict=True)]
        height = max(map(len, header))
        titles = zip(*([""] * (height - len(cell)) + cell for cell in header), strict=True)
        rule = ["─" * width for width in widths]
        body = (part for line in self.rows for part in _wrapped(line, widths))
        return "\n".join(self._aligned(line, widths) for line in (*titles, rule, *body))

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
        """A ``<table>``; cells are escaped. Those aligned to the left have the class ``left``, long ones ``long``."""
        body = "".join(f"<tr>{self._html_cells(row, 'td')}</tr>" for row in self.rows)
        head = self._html_cells(self.header, "th")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _html_cells(self, cells: Sequence[str], tag: str) -> str:
        shown = []
        for column, cell in enumerate(cells):
            if column < self.left:
                kind = "left" if len(cell) <= _LONG or not column else '"left long"'
                shown.append(f"<{tag} class={kind}>{escape(cell)}</{tag}>")
            else:
                number = cell.replace("-", "−") if tag == "td" else cell
                shown.append(f"<{tag}>{escape(number)}</{tag}>")
        return "".join(shown)


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The lines that a row takes on the screen, the cells that are shorter filled up with empty ones."""
    cells = (_folded(cell, width) for cell, width in zip(line, widths, strict=True))
    return zip_longest(*cells, fillvalue="")


def _line(widths: Sequence[int]) -> int:
    """The characters of a line of columns."""
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _pieces(cell: str) -> list[str]:
    """What a cell can be broken into: after blanks, underscores, and dots before no digit."""
    return re.split(r"(?<=[\s_])|(?<=\.)(?!\d)", cell)


def _folded(cell: str, width: int) -> list[str]:
    """The cell in lines of at most ``width`` characters, broken between pieces where that fits."""
    lines, line = [], ""
    for piece in _pieces(cell):
        if len(line + piece.rstrip()) > width and line:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def fill(sentence: str, width: int | None) -> str:
    """A sentence in lines of at most ``width`` characters, the second and later ones indented; paths are not broken."""
    if width is None:
        return sentence
    return textwrap.fill(sentence, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def first_of(names: Sequence[str]) -> str:
    """The first of many names for a sentence, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


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
