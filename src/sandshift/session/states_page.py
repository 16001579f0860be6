"""Prints docs/reference/migration-states.md from the tables of states.py, right_source.py and right_destination.py.

python -m sandshift.session.states_page > docs/reference/migration-states.md
"""

from __future__ import annotations

import sys
from typing import Final

from sandshift.session import right_destination, right_source
from sandshift.session.right_licence import MAY_RUN
from sandshift.session.states import LEGALITY, MOVES, Column, Event, Outcome, State

_LEGEND: Final = {
    Outcome.PROCEED: "proceeds",
    Outcome.WAITS: "proceeds, and waits for the socket",
    Outcome.JOINS: "the same work is under way: waits for its outcome",
    Outcome.JOINS_THEN: "waits for the cancellation under way, then proceeds as in Cancelled",
    Outcome.BY_RIGHT: "the [right to run](../explanation/right-to-run.md) decides",
    Outcome.NO_EFFECT: "succeeds and changes nothing",
    Outcome.SAME_EXPORT: "succeeds with the same blob for the same options; else FAILED_PRECONDITION",
    Outcome.SAME_IMPORT: "succeeds for the same id and config; else FAILED_PRECONDITION",
    Outcome.SAME_ACTION: "succeeds for the action that it was finalized with; else FAILED_PRECONDITION",
    Outcome.ILLEGAL: "refused: FAILED_PRECONDITION, with the state and what it takes",
    Outcome.EXISTS: "refused: ALREADY_EXISTS",
    Outcome.NEVER: "cannot be: no shim of this side is ever in this state",
}


def legality_table() -> str:
    """Which call is legal in which state, as a Markdown table."""
    lines = [_row("state", *(column.value for column in Column)), _row(*["---"] * (len(Column) + 1))]
    lines += [
        _row(state.value, *(outcome.value for outcome in row.values())) for state, row in LEGALITY.items()
    ]
    return "\n".join(lines)


def diagram() -> str:
    """The moves from state to state, as a mermaid diagram; events that lead the same way share an arrow."""
    arrows: dict[tuple[State, State], list[Event]] = {}
    for (state, event), after in MOVES.items():
        arrows.setdefault((state, after), []).append(event)
    lines = ["stateDiagram-v2", f"    [*] --> {State.IDLE.value}"]
    lines += [
        f"    {state.value} --> {after.value}: {', '.join(event.value for event in events)}"
        for (state, after), events in arrows.items()
    ]
    return "\n".join(lines)


def cell_diagram() -> str:
    """The moves from cell to cell on both sides."""
    lines = ["stateDiagram-v2"]
    for side, moves in (("Source", right_source.MOVES), ("Destination", right_destination.MOVES)):
        lines.append(f"    state {side} {{")
        lines.append(f"        [*] --> {next(iter(moves)).name}")
        lines += [
            f"        {cell.name} --> {after.name}"
            for cell, afters in moves.items()
            for after in sorted(afters, key=lambda cell: cell.value)
        ]
        lines.append("    }")
    return "\n".join(lines)


def cell_table() -> str:
    """Which cell may run the guest, and which may destroy its VM."""
    destroys = ("GONE", "REFUSED")
    lines = [_row("side", "cell", "may run the guest", "may destroy its VM", "leads to"), _row(*["---"] * 5)]
    for side, moves in (("source", right_source.MOVES), ("destination", right_destination.MOVES)):
        for cell, afters in moves.items():
            leads = ", ".join(after.name for after in sorted(afters, key=lambda cell: cell.value)) or "final"
            runs = "yes" if cell in MAY_RUN else "no"
            lines.append(_row(side, cell.name, runs, "yes" if cell.name in destroys else "no", leads))
    return "\n".join(lines)


def page() -> str:
    legend = "\n".join(f"* `{outcome.value}`: {meaning}" for outcome, meaning in _LEGEND.items())
    return f"""# States of a migration session

Printed from the tables that the shim decides by (`python -m sandshift.session.states_page`); a test keeps it current.

## Which call is legal when

{legality_table()}

{legend}

With a session active, another session's id is INVALID_ARGUMENT and both ids are named; so is an empty one, always. In
Idle the last ended session's id and action are remembered: the same FinalizeSandbox, the same Cancel and Cleanup of it
succeed and change nothing.

## From state to state

```mermaid
{diagram()}
```

## Cells of the right to run

A session has, beside its state, one durable cell on each side: see [the right to run](../explanation/right-to-run.md).

{cell_table()}

```mermaid
{cell_diagram()}
```
"""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(page())
