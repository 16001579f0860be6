"""The contract's table of states and calls, as section 3 of the contract prints it, and how it is read."""

from __future__ import annotations

from typing import Final

from sandshift.conformance.side import Side

TABLE: Final = """\
| state | PrepareAndExport | Import | Task.Create | PrepareSandbox | CreateDuplicateSocket | Transfer | Finalize back | Finalize SRC STOP | Finalize DST RESUME | Cancel | Cleanup | Notifications |
| Idle | + | + | FP | FP | FP | FP | FP | FP | FP | FP | = | FP |
| SourceExported | = same blob, same options; else FP | FP | FP | FP | + | + waits | + | FP | - | + | FP | + |
| DestinationImported | FP | = same id and config; else FP | + | + | FP | FP | + | - | FP | + | FP | + |
| DestinationPrepared | FP | FP | FP | = | + | + waits | + | - | FP | + | FP | + |
| SocketWaiting | FP | FP | FP | FP | + | + joins | + | FP | FP | + | FP | + |
| SocketReady | FP | FP | FP | FP | AE | + | + | FP | FP | + | FP | + |
| Transferring | FP | FP | FP | FP | AE | + joins | + | FP | FP | + | FP | + |
| TransferCompleted | FP | FP | FP | FP | AE | = | + by right to run | + by right to run | + by right to run | + | FP | + |
| Cancelling | FP | FP | FP | FP | FP | FP | + joins, then | FP | FP | + joins | FP | + |
| Cancelled | FP | FP | FP | FP | FP | FP | + by right to run | + by right to run | + by right to run | = | + | + |
| Failed | FP | FP | FP | FP | FP | FP | + by right to run | + by right to run | + by right to run | = | + | + |
| Finalized | FP | FP | FP | FP | FP | FP | = same action, else FP | same | same | FP | + | + |
"""
"""`Finalize back` is SRC RESUME and DST STOP."""


def _read(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, *rows = lines
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


CELLS: Final = _read(TABLE)
"""State -> column -> what the cell says."""
STATES: Final = tuple(CELLS)
COLUMNS: Final = tuple(CELLS["Idle"])
ONE_SIDED: Final = {
    "SourceExported": Side.SOURCE,
    "DestinationImported": Side.DESTINATION,
    "DestinationPrepared": Side.DESTINATION,
    "Finalize SRC STOP": Side.SOURCE,
    "Finalize DST RESUME": Side.DESTINATION,
}
"""States that only one side is ever in, and columns that only one side has."""


def sides_of(state: str, column: str) -> tuple[Side, ...]:
    """On which sides a cell can be tried; none where no shim of the column's side is ever in the state."""
    wanted = {side for side in (ONE_SIDED.get(state), ONE_SIDED.get(column)) if side is not None}
    if state == "Idle" and column in ("PrepareAndExport", "Import"):
        # Only a side that has a sandbox exports, only one that has none imports.
        wanted = {Side.SOURCE if column == "PrepareAndExport" else Side.DESTINATION}
    if len(wanted) > 1:
        return ()
    return tuple(wanted) or tuple(Side)
