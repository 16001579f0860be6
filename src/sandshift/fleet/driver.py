"""Driving one migration: makes the calls that the saga names, on both shims at once, and tells the saga what came.

Talks to the shims over their sockets only. The work belongs to the shims: a driver that dies leaves a session that
another one finishes or undoes (`fleet/resume.py`).

The blackout contains what happens between the destination's word that it has everything and the answer of its RESUME.
So both connections are open by then, the reader that gets the word asks the saga at once, and nothing is awaited in
between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Final, TypeVar

from sandshift.errors import Defect, SandshiftError, Unavailable
from sandshift.fleet import saga as steps
from sandshift.fleet.calls import Calls
from sandshift.fleet.recover import recover
from sandshift.fleet.request import Migration
from sandshift.fleet.result import CallRecord, MigrationResult, Story, Update, blackout_parts, update_of
from sandshift.fleet.saga import Mode, Outcome, Saga, Step
from sandshift.session.states import Side

LAST_WORDS_S: Final = 1.0
"""How long the readers of notifications may go on reading after the last call."""

T = TypeVar("T")


def ignore(_update: Update) -> None:
    """For those who want no progress."""


async def migrate(
    migration: Migration, *, on_update: Callable[[Update], None] = ignore, done: tuple[Step, ...] = ()
) -> MigrationResult:
    """Move a sandbox. Answers how that went; a migration that failed is a result too, with its reason.

    Cancelling the task that waits here turns the migration back if that is still possible and answers its result
    then: an interrupt never leaves the guest between two hosts. What it can no longer turn back it finishes.

    Args:
        migration: what and where.
        on_update: called with every notification of both sides, on the event loop; must not block.
        done: what a former coordinator of this session has achieved.

    Raises:
        Rejected: both hosts are the same place. NotFound, Unavailable: the source's shim is not there.
    """
    migration.check()
    run = _Run(migration, on_update, done)
    try:
        await run.open()
        await run.drive()
        return await uninterrupted(run.finish())
    finally:
        await run.close()


async def uninterrupted(work: Coroutine[object, object, T]) -> T:
    """Do `work` to its end, however often the task that waits is cancelled."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            if waiting := asyncio.current_task():
                waiting.uncancel()
        except Exception:  # noqa: BLE001, S112 - raised by result() below
            continue
    return task.result()


class _Run:
    """The loop around the saga. Every exception of its tasks becomes a failed step: none is lost."""

    def __init__(
        self, migration: Migration, on_update: Callable[[Update], None], done: tuple[Step, ...]
    ) -> None:
        kept = () if migration.close_source else (steps.SOURCE_CLOSE,)
        self._migration = migration
        self._on_update = on_update
        self._joined = bool(done)
        self._saga = Saga(done=(*done, *kept))
        self._calls = Calls(migration)
        self._story = Story()
        self._tasks: set[asyncio.Task[None]] = set()
        self._readers: dict[Side, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._born_s = time.monotonic()
        self._transfer_began_s: float | None = None
        self._guest_runs_s: float | None = None

    async def open(self) -> None:
        """Connect to the shims that must be there before the first call."""
        await self._calls.connect(Side.SOURCE)
        if self._joined:
            await self._calls.revive(Side.DESTINATION)
            for side, step in ((Side.SOURCE, steps.EXPORT), (Side.DESTINATION, steps.IMPORT)):
                if self._saga.has_done(step):
                    self._listen(side)

    async def drive(self) -> None:
        """Until the saga has ended or must be recovered."""
        self._advance()
        while self._saga.mode in (Mode.FORWARD, Mode.UNWIND):
            try:
                await self._changed.wait()
            except asyncio.CancelledError:
                self._turn_back()
            self._changed.clear()

    def _turn_back(self) -> None:
        if task := asyncio.current_task():
            task.uncancel()
        if self._saga.cancel("it was interrupted"):
            self._calls.turn_back()
        self._advance()

    def _advance(self) -> None:
        """Start every call that is due. Synchronous: what is due now is under way before anybody waits again."""
        for step in self._saga.take_due():
            task = asyncio.create_task(self._do(step), name=str(step))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._changed.set()

    async def _do(self, step: Step) -> None:
        began_s = time.monotonic()
        if step in steps.TRANSFERS and self._transfer_began_s is None:
            self._transfer_began_s = began_s
        error = await self._outcome_of(step)
        self._record(step, began_s, error)
        if error is None:
            self._saga.answered(step)
        else:
            self._saga.failed(step, error)
        self._advance()
        if error is None:
            self._after(step)

    async def _outcome_of(self, step: Step) -> SandshiftError | None:
        """Make the call. What is not foreseen counts as a failure too, so that the migration is wound back."""
        try:
            await self._calls.make(step)
        except SandshiftError as error:
            return error
        except (OSError, TimeoutError) as error:
            return Unavailable(f"{step} got no answer: {error}")
        except Exception as error:  # noqa: BLE001 - told as the reason
            return Defect(f"{step} met what nobody foresaw: {type(error).__name__}: {error}")
        return None

    def _record(self, step: Step, began_s: float, error: SandshiftError | None) -> None:
        now_s = time.monotonic()
        if step == steps.DESTINATION_RESUME and error is None:
            self._guest_runs_s = now_s
        message = error.message if error else ""
        record = CallRecord(step.side, step.call.value, began_s * 1e3, (now_s - began_s) * 1e3, message)
        self._story.calls.append(record)

    def _after(self, step: Step) -> None:
        if step in (steps.EXPORT, steps.IMPORT):
            self._listen(step.side)
        elif step == steps.SOURCE_SOCKET:
            self._calls.let_go_of_channel()

    # Notifications

    def _listen(self, side: Side) -> None:
        if side not in self._readers:
            self._readers[side] = asyncio.create_task(self._read(side), name=f"notifications, {side.word}")

    async def _read(self, side: Side) -> None:
        """Read one side's notifications to their end. A stream that breaks is no failure: the calls will tell."""
        try:
            async for response in self._calls.shim(side).notifications(self._migration.session_id):
                update = update_of(response, side, at_ms=time.monotonic() * 1e3)
                if side is Side.DESTINATION and (update.phase, update.state) == ("DONE", "SUCCESS"):
                    self._saga.memory_complete()
                    self._advance()
                    await asyncio.sleep(0)  # RESUME goes out before anybody draws anything
                self._story.note(update)
                self._on_update(replace(update, at_ms=self._relative_ms(update.at_ms)))
        except SandshiftError:
            return

    def _relative_ms(self, at_ms: float) -> float:
        zero_s = self._born_s if self._transfer_began_s is None else self._transfer_began_s
        return at_ms - zero_s * 1e3

    # The end

    async def finish(self) -> MigrationResult:
        """The result; first the recovery, if nobody knows who holds the right to run."""
        if self._saga.mode is Mode.RECOVER:
            recovered = await recover(self._migration, self._calls)
            self._story.calls.extend(recovered.calls)
            outcome, warnings = recovered.outcome, recovered.warnings
            if recovered.why:
                warnings = (recovered.why, *warnings)
        else:
            outcome, warnings = self._saga.outcome or Outcome.UNDECIDED, ()
        if self._readers:
            await asyncio.wait(self._readers.values(), timeout=LAST_WORDS_S)
        return self._result(outcome, (*self._saga.warnings, *warnings))

    def _result(self, outcome: Outcome, warnings: tuple[str, ...]) -> MigrationResult:
        migration, story, saga = self._migration, self._story, self._saga
        reports = self._calls.reports
        for report in reports.values():
            story.read(report)
        total_ms = None
        if self._guest_runs_s is not None and self._transfer_began_s is not None:
            total_ms = round((self._guest_runs_s - self._transfer_began_s) * 1e3, 3)
        return MigrationResult(
            sandbox_id=migration.sandbox_id,
            session_id=migration.session_id,
            source=migration.source.name,
            destination=migration.destination.name,
            outcome=outcome,
            total_ms=total_ms,
            blackout_ms=story.blackout_ms,
            blackout_parts_ms=blackout_parts(reports.values()),
            stopped_at_us=story.stopped_at_us,
            resumed_at_us=story.resumed_at_us,
            passes=story.passes,
            bytes_transferred=story.bytes_transferred,
            phases=tuple(replace(update, at_ms=self._relative_ms(update.at_ms)) for update in story.phases),
            calls=tuple(replace(call, began_ms=self._relative_ms(call.began_ms)) for call in story.calls),
            failed_call=str(saga.failed_step) if saga.failed_step else "",
            reason=saga.reason,
            warnings=warnings,
        )

    async def close(self) -> None:
        left = [*self._tasks, *self._readers.values()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._calls.close()
