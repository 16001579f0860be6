"""The sixteen ways a call can fail: gRPC's codes, which ttrpc uses as they are."""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """How a call ended. A server may send any number; those that gRPC does not name read as UNKNOWN."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def of(cls, number: int) -> Code:
        """The code with this number, UNKNOWN for a number that gRPC does not name."""
        try:
            return cls(number)
        except ValueError:
            return cls.UNKNOWN
