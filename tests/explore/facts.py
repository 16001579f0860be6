"""A state of the search, packed into one integer and unpacked again."""

from __future__ import annotations

from typing import NamedTuple

from sandshift.session.states import Side
from tests.explore.side import Cost

S, D = 0, 1
SIDES = (Side.SOURCE, Side.DESTINATION)
ID_BITS, QUEUE_BITS, MASK_BITS, BUDGET_BITS = 14, 10, 13, 7
ID_MAX, QUEUE_MAX, MASK_MAX, BUDGET_MAX = 1 << ID_BITS, 1 << QUEUE_BITS, 1 << MASK_BITS, 1 << BUDGET_BITS


class Bounds(NamedTuple):
    """How much may go wrong, at most. Calls have no bound."""

    crashes: int
    deaths: int
    refusals: int

    @property
    def cost(self) -> Cost:
        return Cost(self.crashes, self.deaths, self.refusals)


class Facts(NamedTuple):
    """A state, unpacked."""

    source: int
    destination: int
    to_destination: int
    to_source: int
    receipts: int
    budget: int
    flow: int
    source_fresh: int
    destination_fresh: int
    cut_to_destination: int
    cut_to_source: int
    late: int
    """The source's pending STOP was called after the destination's VM had died."""


class Violation(Exception):
    def __init__(self, what: str, label: int = -1) -> None:
        super().__init__(what)
        self.what = what
        self.label = label


def pack(f: Facts) -> int:
    low = (f.flow << 6) | (f.source_fresh << 5) | (f.destination_fresh << 4) | (f.cut_to_destination << 3)
    low |= (f.cut_to_source << 2) | (f.late << 1)
    high = (
        ((f.source << ID_BITS | f.destination) << QUEUE_BITS | f.to_destination) << QUEUE_BITS
    ) | f.to_source
    return ((high << MASK_BITS | f.receipts) << BUDGET_BITS | f.budget) << 9 | low


def unpack(state: int) -> Facts:
    low = state & 511
    rest = state >> 9
    budget, rest = rest & (BUDGET_MAX - 1), rest >> BUDGET_BITS
    receipts, rest = rest & (MASK_MAX - 1), rest >> MASK_BITS
    to_source, rest = rest & (QUEUE_MAX - 1), rest >> QUEUE_BITS
    to_destination, rest = rest & (QUEUE_MAX - 1), rest >> QUEUE_BITS
    return Facts(
        rest >> ID_BITS,
        rest & (ID_MAX - 1),
        to_destination,
        to_source,
        receipts,
        budget,
        low >> 6,
        low >> 5 & 1,
        low >> 4 & 1,
        low >> 3 & 1,
        low >> 2 & 1,
        low >> 1 & 1,
    )
