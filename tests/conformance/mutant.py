"""What a mutant is, the list of those that are not of the table, and how one is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sandshift.conformance import CASES
from sandshift.conformance.runner import FAILED, Suite
from sandshift.conformance.target import Target

CASE_S = 6.0
Patch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`patch` makes the fault while it is entered; one of `cases` must fail then."""

    name: str
    about: str
    patch: Patch
    cases: tuple[str, ...]
    case_s: float = CASE_S
    """Longer than its cases take without the fault, so that none is caught for being slow."""


MUTANTS: list[Mutant] = []


def wrong(about: str, name: str, *cases: str, case_s: float = CASE_S) -> Callable[[Patch], Patch]:
    """Register a mutant."""

    def register(patch: Patch) -> Patch:
        MUTANTS.append(Mutant(name, about, patch, cases, case_s))
        return patch

    return register


def instead(owner: Any, name: str, stand_in: Any) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(owner, name, stand_in)


async def nothing(*_what: Any, **_named: Any) -> None:
    return


async def caught_by(mutant: Mutant, target: Target) -> str:
    """The name of the case that noticed; empty if the mutant survives."""
    suite = Suite(target, case_s=mutant.case_s)
    suite.distrust()
    for name in mutant.cases:
        with mutant.patch():
            verdict = await suite.try_case(CASES[name])
        suite.distrust()
        if verdict.outcome == FAILED:
            return name
    return ""
