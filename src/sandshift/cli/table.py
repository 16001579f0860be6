"""Plain tables: columns aligned by spaces, so that they are read by people and by awk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

GAP: Final = "   "


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their header; an empty cell is a dash."""
    shown = [list(header), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(header))]
    return "\n".join(
        GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )
