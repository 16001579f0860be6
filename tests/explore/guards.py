"""The protocol's guards, each of which can be dropped, to see that the search finds out.

A guard is dropped without touching the protocol: what goes into `handle` or comes out of it is changed on the way, or
the world around it (what a shell must do, what a host keeps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sandshift.session.right import (
    AskTimedOut,
    CallMade,
    ChannelLost,
    FrameRead,
    KeepLastStatement,
    Party,
    Reply,
    RightEvent,
    SendFrame,
    StartVcpus,
    Step,
    StopTransfer,
    VmDied,
    WriteRecord,
    handle,
)
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Side, State
from tests.explore.facts import Bounds
from tests.explore.side import CURRENT, Faults
from tests.explore.world import Rules

Handle = Callable[[Party, RightEvent], tuple[Party, tuple[Step, ...]]]


@dataclass(frozen=True)
class Guard:
    """One rule, and the search that must miss it."""

    name: str
    """What is done wrong without it."""
    rule: str
    """Where right-to-run.md has it."""
    bounds: Bounds
    handle: Handle = handle
    extra_receipts: frozenset[tuple[Call, Cell, Cell]] = frozenset()
    foreign_receipts: bool = False
    deaths_are_noticed: bool = True
    refusals_are_proven: bool = True
    can_be_found: bool = True
    """False: nothing depends on it as long as somebody carries receipts."""

    def rules(self) -> Rules:
        """The protocol without this guard. Only harm counts: that a cell does not allow an act is not enough."""
        return Rules(
            Faults(
                self.bounds.cost,
                self.handle,
                refusals_are_proven=self.refusals_are_proven,
                check_cells=False,
            ),
            self.extra_receipts,
            self.foreign_receipts,
            self.deaths_are_noticed,
        )


CALM, CRASH, CRASH_AND_DEATH = Bounds(0, 0, 0), Bounds(1, 0, 0), Bounds(1, 1, 0)
DEATH = Bounds(0, 1, 0)


# Tools --------------------------------------------------------------------------------------------------------------


def _written(step: Step, *cells: Cell) -> bool:
    return isinstance(step, WriteRecord) and step.record.cell in cells


def _act_first(act: type[Step], *cells: Cell) -> Handle:
    """The record of one of `cells` is made durable only after the `act` that follows it."""

    def mutant(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
        after, steps = handle(party, event)
        for position in range(len(steps) - 1):
            first, second = steps[position], steps[position + 1]
            moved = isinstance(first, WriteRecord) and first.record.cell is not party.cell
            if moved and _written(first, *cells) and isinstance(second, act):
                swapped = list(steps)
                swapped[position], swapped[position + 1] = second, first
                return after, tuple(swapped)
        return after, steps

    return mutant


def _believe(event: type[RightEvent], cell: Cell, statement: Statement, *calls: Call) -> Handle:
    """In `cell`, `event` is taken for `statement` of the peer."""

    def mutant(party: Party, happened: RightEvent) -> tuple[Party, tuple[Step, ...]]:
        waiting = party.pending is not None and (not calls or party.pending.call in calls)
        if isinstance(happened, event) and party.cell is cell and (waiting or not calls):
            return handle(party, FrameRead(statement))
        return handle(party, happened)

    return mutant


def _then(party: Party, steps: tuple[Step, ...], event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """Another event right after, if the call still waits."""
    if party.pending is None or party.pending.starting:
        return party, steps
    after, more = handle(party, event)
    return after, steps + more


def _call_believes(call: Call, cell: Cell, statement: Statement) -> Handle:
    """`call` in `cell` goes on as if the peer had said `statement` at once."""

    def mutant(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
        after, steps = handle(party, event)
        if isinstance(event, CallMade) and event.call is call and party.cell is cell:
            answers = after.pending.ask_number if after.pending else 0
            if after.pending is None and steps and isinstance(steps[-1], Reply):
                # Without a channel it has failed already: believe before.
                from sandshift.session.right import Pending  # noqa: PLC0415

                waiting = replace(party, pending=Pending(call, Ask.TELL, CURRENT))
                return handle(waiting, FrameRead(replace(statement, answers=CURRENT)))
            return _then(after, steps, FrameRead(replace(statement, answers=answers)))
        return after, steps

    return mutant


# Mutants ------------------------------------------------------------------------------------------------------------


def _stop_in_held_destroys(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    if isinstance(event, CallMade) and event.call is Call.STOP and party.cell is Cell.HELD:
        ready = replace(party, record=replace(party.record, cell=Cell.READY))
        return handle(ready, event)
    return handle(party, event)


def _stop_in_returning_destroys(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    if isinstance(event, CallMade) and event.call is Call.STOP and party.cell is Cell.RETURNING:
        return handle(replace(party, record=replace(party.record, cell=Cell.READY)), event)
    return handle(party, event)


def _refused_is_not_written(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    after, steps = handle(party, event)
    told = [step for step in steps if isinstance(step, SendFrame) and step.statement.cell is Cell.REFUSED]
    if told and party.cell is not Cell.REFUSED:
        kept = tuple(
            replace(step, record=replace(step.record, cell=party.cell))
            if _written(step, Cell.REFUSED)
            else step
            for step in steps
        )
        return after, kept
    return after, steps


def _any_answer_will_do(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    if (
        isinstance(event, FrameRead)
        and event.statement.cell in (Cell.HELD, Cell.STARTING)
        and party.pending is not None
        and party.pending.call is Call.STOP
    ):
        event = FrameRead(replace(event.statement, answers=party.pending.ask_number))
    return handle(party, event)


def _receipt_is_an_answer(cell: Cell) -> Handle:
    def mutant(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
        if (
            isinstance(event, CallMade)
            and event.call is Call.STOP
            and party.cell is Cell.RELEASED
            and event.receipt is not None
            and event.receipt.cell is cell
        ):
            return handle(party, CallMade(Call.STOP, replace(event.receipt, cell=Cell.RUNNING)))
        return handle(party, event)

    return mutant


def _releases_before_completion(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """STOP releases although the own VM process has not said *completed*."""
    if (
        isinstance(event, CallMade)
        and event.call is Call.STOP
        and party.cell is Cell.OPEN
        and not party.complete
    ):
        record = replace(party.record, cell=Cell.RELEASED, state=State.TRANSFER_COMPLETED)
        return replace(party, record=record), (WriteRecord(record), Reply(Call.STOP))
    return handle(party, event)


def _takes_back_what_may_be_on_its_way(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """READY in RELEASED is taken for a refusal: D may yet read RELEASED."""
    if isinstance(event, FrameRead) and party.cell is Cell.RELEASED and event.statement.cell is Cell.READY:
        event = FrameRead(replace(event.statement, cell=Cell.REFUSED))
    return handle(party, event)


def _keeps_after_releasing(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """Cancel in RELEASED writes KEPT, as it does in OPEN."""
    if isinstance(event, CallMade) and event.call is Call.CANCEL and party.cell is Cell.RELEASED:
        return handle(replace(party, record=replace(party.record, cell=Cell.OPEN)), event)
    return handle(party, event)


def _transfer_is_not_stopped(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    after, steps = handle(party, event)
    if party.side is Side.SOURCE:
        steps = tuple(step for step in steps if not isinstance(step, StopTransfer))
    return after, steps


def _held_is_released_again(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """RETURNING starts the guest all the same when RESUME is called."""
    if isinstance(event, CallMade) and event.call is Call.RESUME and party.cell is Cell.RETURNING:
        return handle(replace(party, record=replace(party.record, cell=Cell.HELD)), event)
    return handle(party, event)


def _lost_is_told_as_refused(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """A VM that died in STARTING is taken for one that never ran."""
    after, steps = handle(party, event)
    if party.cell is Cell.STARTING and after.cell is Cell.LOST:
        held = replace(party, record=replace(party.record, cell=Cell.HELD))
        return handle(held, event)
    return after, steps


def _started_is_given_back(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """STOP in STARTING gives the right back as it does in HELD."""
    if isinstance(event, CallMade) and event.call is Call.STOP and party.cell is Cell.STARTING:
        return handle(replace(party, record=replace(party.record, cell=Cell.HELD)), event)
    return handle(party, event)


def _dead_side_takes_it_back(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """Rule 9 dropped on the source: RELEASED with a dead VM still takes RETURNING."""
    if isinstance(event, VmDied) and party.side is Side.SOURCE and party.cell is Cell.RELEASED:
        return replace(party, vm_alive=False), ()
    return handle(party, event)


def _source_stays_open_when_dead(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """Rule 9 dropped on the source: OPEN and complete with a dead VM stays OPEN."""
    if isinstance(event, VmDied) and party.cell is Cell.OPEN and party.complete:
        return replace(party, vm_alive=False), ()
    return handle(party, event)


def _gone_does_not_answer(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    after, steps = handle(party, event)
    if party.cell is Cell.GONE:
        steps = tuple(step for step in steps if not isinstance(step, SendFrame))
    return after, steps


def _nothing_is_kept(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    after, steps = handle(party, event)
    return after, tuple(step for step in steps if not isinstance(step, KeepLastStatement))


_REFUSED, _KEPT = Statement(Cell.REFUSED), Statement(Cell.KEPT)

GUARDS: tuple[Guard, ...] = (
    Guard("HELD sent before its fsync", "3.1", CRASH, _act_first(SendFrame, Cell.HELD)),
    Guard("RELEASED sent before its fsync", "3.1", CRASH, _act_first(SendFrame, Cell.RELEASED)),
    Guard(
        "the destination starts on a time-out", "3.4, 3.8", CALM,
        _believe(AskTimedOut, Cell.READY, Statement(Cell.RELEASED), Call.RESUME),
    ),
    Guard(
        "the source resumes on a time-out", "3.3, 3.8", CALM,
        _believe(AskTimedOut, Cell.RELEASED, _REFUSED, Call.RESUME),
    ),
    Guard(
        "the source takes the end of the channel for an abort after RELEASED", "3.3, 3.8", CALM,
        _believe(ChannelLost, Cell.RELEASED, _REFUSED),
    ),
    Guard(
        "the source destroys without the destination's HELD", "3.6", CALM,
        _call_believes(Call.STOP, Cell.RELEASED, Statement(Cell.HELD)),
    ),
    Guard("STOP in HELD destroys without RETURNING", "3.7", CALM, _stop_in_held_destroys),
    Guard("STOP in RETURNING destroys without KEPT", "3.7", CRASH, _stop_in_returning_destroys),
    Guard("STARTING written after the start", "3.5", CRASH, _act_first(StartVcpus, Cell.STARTING)),
    Guard("the source starts before KEPT is written", "3.3", CRASH, _act_first(StartVcpus, Cell.KEPT)),
    Guard("REFUSED told but not written", "3.1", CRASH, _refused_is_not_written),
    Guard("receipts not bound to their session", "3.10", CALM, foreign_receipts=True),
    Guard("HELD accepted from an earlier question", "3.6", CRASH_AND_DEATH, _any_answer_will_do),
    Guard(
        "HELD accepted as a receipt", "3.6", CRASH_AND_DEATH, _receipt_is_an_answer(Cell.HELD),
        extra_receipts=frozenset({(Call.STOP, Cell.RELEASED, Cell.HELD)}),
    ),
    Guard(
        "STARTING accepted as a receipt", "3.6", Bounds(1, 1, 1), _receipt_is_an_answer(Cell.STARTING),
        extra_receipts=frozenset({(Call.STOP, Cell.RELEASED, Cell.STARTING)}),
    ),
    Guard("last statements dropped at Cleanup", "4", CRASH, _nothing_is_kept),
    Guard("a dead VM is not noticed", "3.9", DEATH, deaths_are_noticed=False),
    # Beyond the seventeen of section 11.
    Guard("RELEASED before the own VM has completed", "3.2", CALM, _releases_before_completion),
    Guard("READY taken for a refusal in RELEASED", "5", CALM, _takes_back_what_may_be_on_its_way),
    Guard("Cancel in RELEASED writes KEPT", "6", CALM, _keeps_after_releasing),
    Guard("RESUME in RETURNING starts the guest", "5, 6", CALM, _held_is_released_again),
    Guard(
        "a start that may have happened is given back", "2, 3.5", CRASH, _started_is_given_back,
        extra_receipts=frozenset({(Call.STOP, Cell.STARTING, Cell.RELEASED)}),
    ),
    Guard(
        "a refused start believed without proof that the guest has not run", "5", Bounds(1, 0, 1),
        refusals_are_proven=False,
    ),
    Guard("the source takes the right back for a dead VM", "3.9", DEATH, _dead_side_takes_it_back),
    Guard("the source with a dead VM stays OPEN", "3.9", DEATH, _source_stays_open_when_dead),
    Guard("the source starts without ending its transfer", "3.3", CALM, _transfer_is_not_stopped),
    Guard("LOST is told as REFUSED", "2, 3.9", DEATH, _lost_is_told_as_refused),
    Guard("the source in GONE does not answer", "5", CALM, _gone_does_not_answer, can_be_found=False),
)  # fmt: skip
