"""Aligned plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Table",
    "format_bytes",
    "format_table",
]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: one title for each column.
        rows: the cells.
        left: how many columns, from the first, are aligned to the left; the others to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Aligned, for a screen."""
        return format_table(self.header, self.rows, self.left)

    def markdown(self) -> str:
        """For loggers that show Markdown."""
        rule = [":--" if column < self.left else "--:" for column in range(len(self.header))]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.header, rule, *self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns aligned under ``header``; the first ``left`` of them to the left, the rest to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def shown(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([shown(lines[0]), rule, *map(shown, lines[1:])])


def format_bytes(count: float) -> str:
    """``1.23 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
