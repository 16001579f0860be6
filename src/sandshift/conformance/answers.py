"""What came of a call: an answer is data here, so that a case can say which one it expects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final

import ttrpc

OK: Final = "OK"
NO_ANSWER: Final = "NO ANSWER"
IA: Final = "INVALID_ARGUMENT"
FP: Final = "FAILED_PRECONDITION"
AE: Final = "ALREADY_EXISTS"
UNIMPLEMENTED: Final = "UNIMPLEMENTED"
ANSWER_S: Final = 20.0
"""How long a case waits for an answer that it expects."""


class Broken(AssertionError):
    """The shim does not hold what the case is about; the text says what came instead."""


class Skipped(Exception):
    """The case cannot be tried on this target; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`code` is the gRPC name, OK, or NO ANSWER if the time was up."""

    code: str
    message: str = ""
    response: Any = None

    def __str__(self) -> str:
        return f"{self.code} ({self.message})" if self.message else self.code


async def ask(call: Awaitable[Any], within_s: float = ANSWER_S) -> Answer:
    """Wait for a call's answer. Errors of the connection are answers too."""
    try:
        async with asyncio.timeout(within_s):
            return Answer(OK, response=await call)
    except TimeoutError:
        return Answer(NO_ANSWER, f"within {within_s:g} s")
    except ttrpc.StatusError as error:
        return Answer(error.code.name, error.message)


def require(answer: Answer, *codes: str, what: str, names: tuple[str, ...] = ()) -> Answer:
    """Raises Broken unless the answer has one of the codes and its message holds all of `names`."""
    if answer.code not in codes:
        raise Broken(f"{what}: expected {' or '.join(codes)}, got {answer}")
    missing = [name for name in names if name not in answer.message]
    if missing:
        raise Broken(f"{what}: {answer.code} does not name {', '.join(missing)}: {answer.message!r}")
    return answer


def hold(truth: object, what: str) -> None:
    """Raises Broken unless it is so."""
    if not truth:
        raise Broken(what)
