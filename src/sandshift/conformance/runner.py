"""Runs cases one after another, on shims that each finds as the first did."""

from __future__ import annotations

import asyncio
import fnmatch
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import ttrpc
from sandshift.conformance import CASES
from sandshift.conformance.answers import Broken, Skipped
from sandshift.conformance.cases import Case
from sandshift.conformance.scene import Scene
from sandshift.conformance.target import Target

CASE_S: Final = 120.0
PASSED: Final = "passed"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"


@dataclass(frozen=True, slots=True)
class Verdict:
    case: Case
    outcome: str
    reason: str = ""
    took_s: float = 0.0

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.outcome:7} {self.case.name} [{self.case.line}]{reason}"


@dataclass
class Result:
    verdicts: list[Verdict] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        return sum(verdict.outcome == outcome for verdict in self.verdicts)

    def names(self, outcome: str) -> list[str]:
        return [verdict.case.name for verdict in self.verdicts if verdict.outcome == outcome]

    def document(self) -> dict[str, object]:
        """For a machine: the figures, and each case with what became of it."""
        cases = [
            {
                "case": verdict.case.name,
                "contract": verdict.case.line,
                "revision": verdict.case.revision,
                "outcome": verdict.outcome,
                "reason": verdict.reason,
                "took_s": round(verdict.took_s, 3),
            }
            for verdict in self.verdicts
        ]
        figures = {outcome: self.count(outcome) for outcome in (PASSED, FAILED, SKIPPED)}
        return {**figures, "cases": cases}

    def __str__(self) -> str:
        return f"{self.count(PASSED)} passed, {self.count(FAILED)} failed, {self.count(SKIPPED)} skipped"


def select(pattern: str = "") -> list[Case]:
    """Cases whose name holds the pattern, or matches it as a glob; those that move the sandbox come last."""
    wanted = [
        case for case in CASES.values() if pattern in case.name or fnmatch.fnmatchcase(case.name, pattern)
    ]
    return sorted(wanted, key=lambda case: case.moves)


class Suite:
    """Runs on one target. Between two cases the shims are wound back by calls, or replaced."""

    def __init__(self, target: Target, *, case_s: float = CASE_S) -> None:
        self._target = target
        self._case_s = case_s
        self._clean = True

    async def run(self, cases: Iterable[Case], told: Callable[[Verdict], None] = lambda _: None) -> Result:
        result = Result()
        for case in cases:
            verdict = await self.try_case(case)
            result.verdicts.append(verdict)
            told(verdict)
        return result

    def distrust(self) -> None:
        """Take fresh shims for the next case, whatever became of the last."""
        self._clean = False

    async def try_case(self, case: Case) -> Verdict:
        began_s = time.monotonic()
        try:
            if not self._clean:
                self._clean = await self._target.reset()
            if not self._clean:
                raise Skipped(
                    "the shims are not as they were, and there is no way to get fresh ones (--reset)"
                )
            outcome, reason = await self._work(case)
        except Skipped as why:
            outcome, reason = SKIPPED, str(why)
        return Verdict(case, outcome, reason, time.monotonic() - began_s)

    async def _work(self, case: Case) -> tuple[str, str]:
        try:
            scene = await Scene.open(self._target)
        except (OSError, TimeoutError, ttrpc.StatusError) as error:
            self._clean = False
            return FAILED, f"the shims cannot be reached: {error}"
        outcome, reason = PASSED, ""
        try:
            async with asyncio.timeout(self._case_s):
                await case.work(scene)
        except Skipped as why:
            outcome, reason = SKIPPED, str(why)
        except Broken as broken:
            outcome, reason = FAILED, str(broken)
        except TimeoutError:
            outcome, reason = FAILED, f"not over within {self._case_s:g} s"
        except ttrpc.StatusError as error:
            outcome, reason = FAILED, f"a call outside the contract's reach failed: {error}"
        finally:
            self._clean = await scene.close(within_s=self._case_s)
        if outcome == PASSED and not self._clean and not case.moves:
            return FAILED, "afterwards the shims could not be wound back by Finalize and Cleanup"
        return outcome, reason
