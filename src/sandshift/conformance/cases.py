"""What a case is, and the list of all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from sandshift.conformance.scene import Scene

Work = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that the contract says. `work` raises Broken if it is not so, Skipped if it cannot be tried."""

    name: str
    line: str
    """Where the contract says it: "3" the table, "4.6" a promise, "5" a limit."""
    work: Work
    moves: bool = False
    """Leaves the sandbox on the other side: fresh shims are needed afterwards."""
    revision: str = "head"


CASES: Final[dict[str, Case]] = {}


def case(name: str, line: str, *, moves: bool = False, revision: str = "head") -> Callable[[Work], Work]:
    """Register a function as a case."""

    def register(work: Work) -> Work:
        add(Case(name, line, work, moves=moves, revision=revision))
        return work

    return register


def add(made: Case) -> None:
    if made.name in CASES:
        raise ValueError(f"two cases are named {made.name!r}")
    CASES[made.name] = made
