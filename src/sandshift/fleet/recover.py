"""Finishing or undoing a session from what both sides say: drives `session/recovery.py` over the two shims.

Two of these at once do no harm: each call is safe whoever makes it, the loser's are refused or answered the same, and
the next look shows what the winner has done.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from sandshift.errors import NotFound, SandshiftError, TimedOut, Unavailable
from sandshift.fleet import saga as steps
from sandshift.fleet.calls import Calls
from sandshift.fleet.request import Migration
from sandshift.fleet.result import CallRecord
from sandshift.fleet.saga import Call as SagaCall
from sandshift.fleet.saga import Outcome, Step
from sandshift.fleet.views import SILENT, SideView, Views, as_recovery_view, side_view
from sandshift.session import recovery
from sandshift.session.recovery import Ending, Invoke, Look, Pause, Result, Verdict
from sandshift.session.statement import Cell
from sandshift.session.states import Call, Side

PAUSE_S: Final = 1.0
"""How long a side may take to notice what it has not noticed yet."""
_CALLS: Final = {
    Call.RESUME: SagaCall.RESUME,
    Call.STOP: SagaCall.STOP,
    Call.CANCEL: SagaCall.CANCEL,
    Call.CLEANUP: SagaCall.CLEANUP,
}
_OUTCOMES: Final = {
    Ending.FORWARD: Outcome.MOVED,
    Ending.BACK: Outcome.UNDONE,
    Ending.OPERATOR: Outcome.UNDECIDED,
    Ending.CRASHED: Outcome.CRASHED,
    Ending.UNFINISHED: Outcome.UNDECIDED,
}


@dataclass(slots=True)
class Recovered:
    """What came of a recovery."""

    outcome: Outcome
    why: str = ""
    """Where a person must decide: what about, and what the choices are. Or how the guest was lost."""
    calls: list[CallRecord] = field(default_factory=list)
    """Began and took: milliseconds, of the monotonic clock."""
    warnings: tuple[str, ...] = ()


async def recover(migration: Migration, calls: Calls) -> Recovered:
    """Bring the session to its end, forward or back. Never raises for a side that is gone.

    Args:
        migration: the session, and both hosts.
        calls: connections to the shims; those that died are started again.
    """
    return await _Recovery(migration, calls).run()


class _Recovery:
    def __init__(self, migration: Migration, calls: Calls) -> None:
        self._migration = migration
        self._calls = calls
        self._records: list[CallRecord] = []
        self._problems: list[str] = []

    async def run(self) -> Recovered:
        verdict = await self._follow(recovery.recover())
        outcome, why = _OUTCOMES[verdict.ending], verdict.why
        warnings: list[str] = []
        if outcome is Outcome.UNDECIDED:
            outcome, warnings = await self._certain_all_the_same(verdict)
            why = why if outcome is Outcome.UNDECIDED else ""
        elif outcome is Outcome.CRASHED:
            await self._bury()
        else:
            outcome, why = await self._whether_it_runs(outcome)
        await self._close_what_is_empty(outcome)
        return Recovered(outcome, why, self._records, tuple(warnings))

    async def _follow(self, procedure: recovery.Procedure) -> Verdict:
        """Carry out the procedure's orders until it has its verdict."""
        answer: recovery.Answer = None
        try:
            while True:
                match procedure.send(answer):
                    case Look(side):
                        answer = as_recovery_view(side, await self._look())
                    case Invoke(side, call, receipt):
                        step = Step(side, _CALLS[call])
                        answer = await self._invoke(step, receipt if isinstance(receipt, bytes) else b"")
                    case Pause():
                        await asyncio.sleep(PAUSE_S)
                        answer = None
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict

    async def _look(self) -> Views:
        source, destination = await asyncio.gather(
            *(look(self._migration, self._calls, side) for side in Side)
        )
        return Views(source, destination)

    async def _invoke(self, step: Step, receipt: bytes = b"") -> Result:
        began_s = time.monotonic()
        error = await self._error_of(step, receipt)
        message = error.message if error else ""
        took_ms = (time.monotonic() - began_s) * 1e3
        self._records.append(CallRecord(step.side, step.call.value, began_s * 1e3, took_ms, message))
        if error is None:
            return Result.OK
        self._problems.append(f"{step}: {message}")
        return Result.UNANSWERED if isinstance(error, Unavailable | TimedOut | NotFound) else Result.REFUSED

    async def _error_of(self, step: Step, receipt: bytes) -> SandshiftError | None:
        try:
            await self._calls.make(step, receipt=receipt)
        except SandshiftError as error:
            return error
        except (OSError, TimeoutError) as error:
            return Unavailable(f"no answer: {error}")
        return None

    async def _certain_all_the_same(self, verdict: Verdict) -> tuple[Outcome, list[str]]:
        """A side that does not answer leaves the session open, but not always the question who runs the guest.

        The side that runs it is cleaned up, so that the sandbox can be used: its last statement outlives that.
        """
        views = await self._look()
        runner = views.runner
        if runner is None or verdict.ending is Ending.OPERATOR:
            return Outcome.UNDECIDED, self._problems[-2:]
        if views.of(runner).active:
            await self._invoke(Step(runner, SagaCall.CLEANUP))
        left = runner.peer
        warning = (
            f"{self._migration.where(left)}, {views.of(left).words}: it still has to be cleaned up; repeat with --session"
            f" {self._migration.session_id} once it answers"
        )
        return Outcome.MOVED if runner is Side.DESTINATION else Outcome.UNDONE, [warning]

    async def _whether_it_runs(self, outcome: Outcome) -> tuple[Outcome, str]:
        """The session has ended; but the guest, where it was left, may have ended too."""
        side = Side.DESTINATION if outcome is Outcome.MOVED else Side.SOURCE
        views = await self._look()
        if not views.of(side).ended_here or views.of(side.peer).vm_alive:
            return outcome, ""
        return Outcome.CRASHED, (
            f"the session has ended with the guest on the {side.word}, and its VM there has ended too: it crashed, or was "
            "stopped since"
        )

    async def _bury(self) -> None:
        """The guest is gone where it had the right to run: end what the other side still holds, then the session.

        Source: right-to-run.md section 9, "crash of the guest": Cleanup.
        """
        views = await self._look()
        died_on = Side.DESTINATION if views.destination.cell is Cell.RUNNING else Side.SOURCE
        other = died_on.peer
        if views.of(other).active:
            call = SagaCall.CANCEL if views.of(other).cell is Cell.LOST else SagaCall.STOP
            await self._invoke(Step(other, call), views.of(died_on).receipt)
        for side in (other, died_on):
            if views.of(side).active:
                await self._invoke(Step(side, SagaCall.CLEANUP))
        close = steps.SOURCE_CLOSE if other is Side.SOURCE else steps.DESTINATION_CLOSE
        await self._error_of(close, b"")

    async def _close_what_is_empty(self, outcome: Outcome) -> None:
        """End the shim of the side that has no guest any more. One that turns out to have something stays."""
        if outcome is Outcome.MOVED and self._migration.close_source:
            await self._error_of(steps.SOURCE_CLOSE, b"")
        elif outcome is Outcome.UNDONE:
            await self._error_of(steps.DESTINATION_CLOSE, b"")


async def look(migration: Migration, calls: Calls, side: Side) -> SideView:
    """What a side says now. A shim that died is started again first: it finds its session on disk."""
    try:
        try:
            status = await calls.shim(side).status(migration.session_id)
        except Unavailable:
            await calls.revive(side)
            status = await calls.shim(side).status(migration.session_id)
    except (SandshiftError, OSError):
        return SILENT
    return side_view(status, migration.session_id, side)
