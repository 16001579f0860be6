"""Deadlines of many calls under one coarse timer. Pure: time comes in as an argument.

A timer per call costs more than the call. Deadlines are put into buckets; adding and removing touch one set, and one timer
waits for the earliest bucket that is not empty. A deadline is never early, and late by at most its bucket's width:
`RESOLUTION_S` for near ones, about a 500th of the time that was left for far ones. So the number of buckets is bounded,
however many calls come and go before the first is due.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

RESOLUTION_S: Final = 0.01
_SPAN_BITS: Final = 10
"""Up to 2 ** this many ticks ahead a bucket is one tick wide; twice as far, two; and so on."""

T = TypeVar("T", bound=Hashable)


class Deadlines(Generic[T]):
    """What is due when. The caller keeps the bucket that `add` answers, to `discard` by it."""

    __slots__ = ("_buckets", "_order")

    def __init__(self) -> None:
        self._buckets: dict[int, set[T]] = {}
        self._order: list[int] = []

    def add(self, item: T, due_s: float, now_s: float) -> int:
        """Remember `item` until `due_s`; the answer is its bucket."""
        bucket = math.ceil(due_s / RESOLUTION_S)
        ahead = bucket - int(now_s / RESOLUTION_S)
        if ahead >> _SPAN_BITS:
            width_bits = ahead.bit_length() - _SPAN_BITS
            bucket = ((bucket >> width_bits) + 1) << width_bits
        items = self._buckets.get(bucket)
        if items is None:
            self._buckets[bucket] = {item}
            heapq.heappush(self._order, bucket)
        else:
            items.add(item)
        return bucket

    def discard(self, item: T, bucket: int) -> None:
        """Forget `item`. Its bucket stays until its time or until `next_due_s` passes over it."""
        items = self._buckets.get(bucket)
        if items is not None:
            items.discard(item)

    def expire(self, now_s: float) -> list[T]:
        """Take out everything that is due."""
        due: list[T] = []
        while self._order and self._order[0] * RESOLUTION_S <= now_s:
            due += self._buckets.pop(heapq.heappop(self._order))
        return due

    def next_due_s(self) -> float | None:
        """When to call `expire` next; None when there is nothing to wait for. Drops empty buckets on the way."""
        while self._order:
            if self._buckets[self._order[0]]:
                return self._order[0] * RESOLUTION_S
            del self._buckets[heapq.heappop(self._order)]
        return None
