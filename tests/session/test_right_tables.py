"""Sections 5 and 6 of right-to-run.md, cell by cell: what a side does on each statement, each call, each receipt."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from sandshift.errors import IllegalMove, Unavailable, VmRefused
from sandshift.session import right, right_destination, right_source
from sandshift.session.right import (
    CallMade,
    Channel,
    DestroyVm,
    FrameRead,
    KeepLastStatement,
    Party,
    Pending,
    Record,
    Reply,
    SendFrame,
    StartVcpus,
    Step,
    StopTransfer,
    WriteRecord,
)
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Side, State

C, S = Cell, State
SOURCE_CELLS = [cell for cell in Cell if cell.side is Side.SOURCE]
DESTINATION_CELLS = [cell for cell in Cell if cell.side is Side.DESTINATION]
THEIR_QUESTION = 77
OUR_QUESTION = 5


def party(cell: Cell, state: State = S.TRANSFER_COMPLETED, call: Call | None = None, **more: object) -> Party:
    """A side in `cell`, the channel up, `call` waiting for the peer."""
    complete = cell is not Cell.NONE and state in (S.TRANSFER_COMPLETED, S.CANCELLED, S.FAILED, S.FINALIZED)
    record = Record(cell.side, "s-1", cell, state, complete=complete)
    pending = None if call is None else Pending(call, Ask.TELL, OUR_QUESTION)
    made = Party(record, channel=Channel.HEARD, pending=pending, next_ask=OUR_QUESTION + 1)
    return replace(made, **more)  # type: ignore[arg-type]


def told(steps: tuple[Step, ...]) -> str:
    """Steps as words: "write KEPT, send KEPT, start, OK"."""
    words = []
    for step in steps:
        match step:
            case WriteRecord():
                state = "" if step.record.state is S.TRANSFER_COMPLETED else f"+{step.record.state.value}"
                words.append(f"write {step.record.cell.name}{state}")
            case SendFrame():
                ask = {Ask.NOTHING: "", Ask.TELL: "?", Ask.GIVE: "!"}[step.statement.ask]
                answer = "=" if step.statement.answers == THEIR_QUESTION else ""
                words.append(f"{answer}send {step.statement.cell.name}{ask}")
            case StartVcpus():
                words.append("start")
            case StopTransfer():
                words.append("stop transfer")
            case DestroyVm():
                words.append("destroy")
            case KeepLastStatement():
                words.append("keep")
            case Reply():
                codes = {IllegalMove: "FP", Unavailable: "UNAVAILABLE", VmRefused: "INTERNAL"}
                words.append("OK" if step.refusal is None else codes[step.refusal.kind])
    return ", ".join(words)


def sees(own: Party, cell: Cell, ask: Ask = Ask.NOTHING, answers: int = 0) -> str:
    number = 0 if ask is Ask.NOTHING else THEIR_QUESTION
    return told(right.handle(own, FrameRead(Statement(cell, ask, number, answers)))[1])


# Section 5, source --------------------------------------------------------------------------------------------------

PLAIN, TELL, GIVE = Ask.NOTHING, Ask.TELL, Ask.GIVE
DONE = "write GONE, destroy, write GONE+Finalized, OK"
SOURCE_SEES = {
    # (cell, destination's cell, its ask, own pending call): what is done
    (C.OPEN, C.READY, PLAIN, None): "",
    (C.OPEN, C.READY, TELL, None): "=send OPEN",
    (C.OPEN, C.READY, GIVE, None): "write RELEASED, =send RELEASED?",
    (C.OPEN, C.READY, PLAIN, Call.STOP): "write RELEASED, send RELEASED?",
    (C.OPEN, C.READY, GIVE, Call.STOP): "write RELEASED, =send RELEASED?",
    (C.OPEN, C.REFUSED, PLAIN, None): "write KEPT",
    (C.OPEN, C.REFUSED, PLAIN, Call.STOP): "write KEPT, FP",
    (C.RELEASED, C.READY, PLAIN, None): "",
    (C.RELEASED, C.READY, GIVE, None): "=send RELEASED?",
    (C.RELEASED, C.READY, GIVE, Call.STOP): "=send RELEASED?",
    (C.RELEASED, C.HELD, PLAIN, None): "",
    (C.RELEASED, C.HELD, TELL, None): "=send RELEASED",
    (C.RELEASED, C.HELD, PLAIN, Call.STOP): "",
    (C.RELEASED, C.STARTING, PLAIN, Call.STOP): "",
    (C.RELEASED, C.STARTING, PLAIN, Call.RESUME): "",
    (C.RELEASED, C.RUNNING, PLAIN, None): "",
    (C.RELEASED, C.RUNNING, PLAIN, Call.STOP): DONE,
    (C.RELEASED, C.RUNNING, PLAIN, Call.RESUME): "FP",
    (C.RELEASED, C.RETURNING, PLAIN, None): "write KEPT, send KEPT",
    (C.RELEASED, C.RETURNING, TELL, None): "write KEPT, =send KEPT",
    (C.RELEASED, C.RETURNING, PLAIN, Call.RESUME): "write KEPT, send KEPT, start",
    (C.RELEASED, C.RETURNING, PLAIN, Call.CLEANUP): "write KEPT, send KEPT, start",
    (C.RELEASED, C.RETURNING, PLAIN, Call.STOP): "write KEPT, send KEPT, FP",
    (C.RELEASED, C.REFUSED, PLAIN, None): "write KEPT",
    (C.RELEASED, C.REFUSED, PLAIN, Call.RESUME): "write KEPT, start",
    (C.RELEASED, C.REFUSED, PLAIN, Call.CLEANUP): "write KEPT, start",
    (C.RELEASED, C.REFUSED, PLAIN, Call.STOP): "write KEPT, FP",
    (C.KEPT, C.READY, GIVE, None): "=send KEPT",
    (C.KEPT, C.HELD, TELL, None): "=send KEPT",
    (C.KEPT, C.RETURNING, PLAIN, None): "send KEPT",
    (C.GONE, C.READY, GIVE, None): "=send GONE",
    (C.GONE, C.STARTING, TELL, None): "=send GONE",
    (C.GONE, C.RETURNING, PLAIN, None): "send GONE",
    (C.GONE, C.RETURNING, TELL, None): "=send GONE",
}


@pytest.mark.parametrize("case", SOURCE_SEES, ids=str)
def test_the_source_sees(case: tuple[Cell, Cell, Ask, Call | None]) -> None:
    cell, peer, ask, call = case
    assert sees(party(cell, call=call), peer, ask) == SOURCE_SEES[case]


@pytest.mark.parametrize("cell", [C.HELD, C.STARTING])
def test_the_answer_to_this_very_stop_lets_the_source_go(cell: Cell) -> None:
    waiting = party(C.RELEASED, call=Call.STOP)
    assert sees(waiting, cell, answers=OUR_QUESTION) == DONE
    assert sees(waiting, cell, answers=OUR_QUESTION - 1) == "", "an answer to an earlier question"
    assert sees(party(C.RELEASED, call=Call.RESUME), cell, answers=OUR_QUESTION) == "", "not a STOP"
    unsent = replace(waiting, pending=Pending(Call.STOP, Ask.TELL, 0))
    assert sees(unsent, cell, answers=0) == "", "nothing was asked yet"


@pytest.mark.parametrize("peer", DESTINATION_CELLS)
@pytest.mark.parametrize("ask", Ask)
def test_a_source_that_is_not_complete_neither_moves_nor_speaks(peer: Cell, ask: Ask) -> None:
    assert sees(party(C.OPEN, S.TRANSFERRING), peer, ask) == ""


# Section 5, destination ---------------------------------------------------------------------------------------------

DESTINATION_SEES = {
    (C.READY, C.OPEN, PLAIN, None): "",
    (C.READY, C.OPEN, TELL, None): "=send READY",
    (C.READY, C.RELEASED, PLAIN, None): "write HELD, send HELD",
    (C.READY, C.RELEASED, TELL, None): "write HELD, =send HELD",
    (C.READY, C.RELEASED, GIVE, None): "write REFUSED, =send REFUSED",
    (C.READY, C.RELEASED, TELL, Call.RESUME): "write STARTING, start",
    (C.READY, C.RELEASED, GIVE, Call.RESUME): "write REFUSED, =send REFUSED, FP",
    (C.READY, C.GONE, PLAIN, None): "write HELD, send HELD",
    (C.READY, C.GONE, PLAIN, Call.RESUME): "write STARTING, start",
    (C.READY, C.KEPT, PLAIN, None): "write REFUSED",
    (C.READY, C.KEPT, PLAIN, Call.RESUME): "write REFUSED, FP",
    (C.HELD, C.OPEN, TELL, None): "=send HELD",
    (C.HELD, C.RELEASED, PLAIN, None): "",
    (C.HELD, C.RELEASED, TELL, None): "=send HELD",
    (C.HELD, C.RELEASED, GIVE, None): "write RETURNING, =send RETURNING",
    (C.HELD, C.RELEASED, PLAIN, Call.STOP): "write RETURNING, send RETURNING?",
    (C.HELD, C.RELEASED, TELL, Call.STOP): "write RETURNING, =send RETURNING?",
    (C.HELD, C.RELEASED, PLAIN, Call.CLEANUP): "write RETURNING, send RETURNING?",
    (C.HELD, C.GONE, PLAIN, None): "",
    (C.HELD, C.GONE, PLAIN, Call.STOP): "FP",
    (C.HELD, C.GONE, PLAIN, Call.CLEANUP): "FP",
    (C.STARTING, C.RELEASED, TELL, None): "=send STARTING",
    (C.STARTING, C.RELEASED, GIVE, None): "=send STARTING",
    (C.RUNNING, C.RELEASED, TELL, None): "=send RUNNING",
    (C.RUNNING, C.RELEASED, GIVE, None): "=send RUNNING",
    (C.RUNNING, C.GONE, PLAIN, None): "",
    (C.RETURNING, C.OPEN, PLAIN, None): "",
    (C.RETURNING, C.RELEASED, PLAIN, None): "send RETURNING",
    (C.RETURNING, C.RELEASED, GIVE, None): "=send RETURNING",
    (C.RETURNING, C.GONE, PLAIN, None): "write HELD, send HELD",
    (C.RETURNING, C.GONE, PLAIN, Call.RESUME): "write STARTING, start",
    (C.RETURNING, C.GONE, PLAIN, Call.STOP): "write HELD, FP",
    (C.RETURNING, C.GONE, PLAIN, Call.CLEANUP): "write HELD, FP",
    (C.RETURNING, C.KEPT, PLAIN, None): "write REFUSED",
    (C.RETURNING, C.KEPT, PLAIN, Call.STOP): "write REFUSED, destroy, write REFUSED+Finalized, OK",
    (C.RETURNING, C.KEPT, PLAIN, Call.RESUME): "write REFUSED, FP",
    (C.REFUSED, C.OPEN, TELL, None): "=send REFUSED",
    (C.REFUSED, C.OPEN, PLAIN, None): "",
    (C.REFUSED, C.RELEASED, PLAIN, None): "send REFUSED",
    (C.REFUSED, C.RELEASED, GIVE, None): "=send REFUSED",
    (C.REFUSED, C.KEPT, PLAIN, None): "",
    (C.LOST, C.RELEASED, PLAIN, None): "send LOST",
    (C.LOST, C.GONE, PLAIN, None): "",
}


@pytest.mark.parametrize("case", DESTINATION_SEES, ids=str)
def test_the_destination_sees(case: tuple[Cell, Cell, Ask, Call | None]) -> None:
    cell, peer, ask, call = case
    assert sees(party(cell, call=call), peer, ask) == DESTINATION_SEES[case]


def test_a_resume_that_waits_asks_for_the_right_once_the_source_has_spoken() -> None:
    silent, steps = right.handle(replace(party(C.READY), channel=Channel.UP), CallMade(Call.RESUME))
    assert told(steps) == "", "the source's VM might still be reading"
    asked, steps = right.handle(silent, FrameRead(Statement(C.OPEN)))
    assert told(steps) == "send READY!"
    again, steps = right.handle(asked, FrameRead(Statement(C.OPEN, TELL, THEIR_QUESTION)))
    assert told(steps) == "=send READY!"
    assert again.pending == asked.pending, "the same question again"


def test_after_a_cancel_in_held_the_next_released_brings_the_right_back() -> None:
    assert sees(party(C.HELD, S.CANCELLED), C.RELEASED) == "write RETURNING+Cancelled, send RETURNING"


@pytest.mark.parametrize(
    ("cell", "peer"),
    [(C.HELD, C.KEPT), (C.STARTING, C.KEPT), (C.RUNNING, C.KEPT), (C.OPEN, C.HELD), (C.GONE, C.REFUSED)],
)
def test_what_cannot_be_changes_nothing(cell: Cell, peer: Cell) -> None:
    after, steps = right.handle(party(cell), FrameRead(Statement(peer)))
    assert after.record == party(cell).record
    assert steps == ()


def test_every_cell_of_both_tables_moves_only_as_section_2_allows() -> None:
    for own, peers in ((SOURCE_CELLS, DESTINATION_CELLS), (DESTINATION_CELLS, SOURCE_CELLS)):
        moves = (right_source if own is SOURCE_CELLS else right_destination).MOVES
        calls = [None, Call.RESUME, Call.STOP, Call.CLEANUP]
        for cell, peer, ask, call, state in itertools.product(
            own, peers, Ask, calls, (S.TRANSFER_COMPLETED, S.CANCELLED)
        ):
            if call is Call.CLEANUP and state is S.TRANSFER_COMPLETED:
                continue  # refused there: it never waits
            after, _ = right.handle(
                party(cell, state, call), FrameRead(Statement(peer, ask, 1, OUR_QUESTION))
            )
            held = after.cell is C.STARTING and C.HELD in moves[cell]
            assert after.cell is cell or after.cell in moves[cell] or held, (cell, peer, ask, call)


# Section 6 ----------------------------------------------------------------------------------------------------------

BACK_S, BACK_D = "write KEPT+Cancelled, ", "write REFUSED+Cancelled, "
CALLS = {
    # TransferCompleted
    (Call.RESUME, C.OPEN, S.TRANSFER_COMPLETED): "write KEPT, send KEPT, start",
    (Call.RESUME, C.RELEASED, S.TRANSFER_COMPLETED): "send RELEASED!",
    (Call.RESUME, C.KEPT, S.TRANSFER_COMPLETED): "start",
    (Call.RESUME, C.GONE, S.TRANSFER_COMPLETED): "FP",
    (Call.STOP, C.OPEN, S.TRANSFER_COMPLETED): "send OPEN?",
    (Call.STOP, C.RELEASED, S.TRANSFER_COMPLETED): "send RELEASED?",
    (Call.STOP, C.KEPT, S.TRANSFER_COMPLETED): "FP",
    (Call.STOP, C.GONE, S.TRANSFER_COMPLETED): "destroy, write GONE+Finalized, OK",
    (Call.CANCEL, C.OPEN, S.TRANSFER_COMPLETED): "write KEPT+Cancelled, send KEPT, OK",
    (Call.CANCEL, C.RELEASED, S.TRANSFER_COMPLETED): "write RELEASED+Cancelled, send RELEASED!, OK",
    (Call.CANCEL, C.KEPT, S.TRANSFER_COMPLETED): "write KEPT+Cancelled, OK",
    (Call.CANCEL, C.GONE, S.TRANSFER_COMPLETED): "write GONE+Cancelled, OK",
    (Call.RESUME, C.READY, S.TRANSFER_COMPLETED): "send READY!",
    (Call.RESUME, C.HELD, S.TRANSFER_COMPLETED): "write STARTING, start",
    (Call.RESUME, C.STARTING, S.TRANSFER_COMPLETED): "start",
    (Call.RESUME, C.RUNNING, S.TRANSFER_COMPLETED): "write RUNNING+Finalized, OK",
    (Call.RESUME, C.RETURNING, S.TRANSFER_COMPLETED): "send RETURNING?",
    (Call.RESUME, C.REFUSED, S.TRANSFER_COMPLETED): "FP",
    (Call.RESUME, C.LOST, S.TRANSFER_COMPLETED): "FP",
    (Call.STOP, C.READY, S.TRANSFER_COMPLETED): "write REFUSED, send REFUSED, destroy, write REFUSED+Finalized, OK",
    (Call.STOP, C.HELD, S.TRANSFER_COMPLETED): "send HELD?",
    (Call.STOP, C.STARTING, S.TRANSFER_COMPLETED): "FP",
    (Call.STOP, C.RUNNING, S.TRANSFER_COMPLETED): "FP",
    (Call.STOP, C.RETURNING, S.TRANSFER_COMPLETED): "send RETURNING?",
    (Call.STOP, C.REFUSED, S.TRANSFER_COMPLETED): "destroy, write REFUSED+Finalized, OK",
    (Call.STOP, C.LOST, S.TRANSFER_COMPLETED): "FP",
    (Call.CANCEL, C.READY, S.TRANSFER_COMPLETED): "write REFUSED+Cancelled, send REFUSED, OK",
    (Call.CANCEL, C.HELD, S.TRANSFER_COMPLETED): "write HELD+Cancelled, send HELD?, OK",
    (Call.CANCEL, C.STARTING, S.TRANSFER_COMPLETED): "write STARTING+Cancelled, OK",
    (Call.CANCEL, C.RUNNING, S.TRANSFER_COMPLETED): "write RUNNING+Cancelled, OK",
    (Call.CANCEL, C.RETURNING, S.TRANSFER_COMPLETED): "write RETURNING+Cancelled, send RETURNING?, OK",
    (Call.CANCEL, C.REFUSED, S.TRANSFER_COMPLETED): "write REFUSED+Cancelled, OK",
    (Call.CANCEL, C.LOST, S.TRANSFER_COMPLETED): "write LOST+Cancelled, OK",
    # Before completion: going back cancels first; the cell is final before anything is stopped.
    (Call.RESUME, C.OPEN, S.TRANSFERRING): "write KEPT+Cancelling, stop transfer, write KEPT+Cancelled, start",
    (Call.STOP, C.OPEN, S.TRANSFERRING): "FP",
    (Call.CANCEL, C.OPEN, S.TRANSFERRING): "write KEPT+Cancelling, stop transfer, write KEPT+Cancelled, OK",
    (Call.CANCEL, C.OPEN, S.SOURCE_EXPORTED): "write KEPT+Cancelling, stop transfer, write KEPT+Cancelled, OK",
    (Call.RESUME, C.NONE, S.TRANSFERRING): "FP",
    (Call.STOP, C.NONE, S.TRANSFERRING): "write REFUSED+Cancelling, stop transfer, write REFUSED+Cancelled, destroy, "
    "write REFUSED+Finalized, OK",
    (Call.CANCEL, C.NONE, S.SOCKET_READY): "write REFUSED+Cancelling, stop transfer, write REFUSED+Cancelled, OK",
    (Call.CLEANUP, C.OPEN, S.TRANSFERRING): "FP",
    (Call.CANCEL, C.KEPT, S.CANCELLING): "stop transfer, write KEPT+Cancelled, OK",
    (Call.RESUME, C.KEPT, S.CANCELLING): "stop transfer, write KEPT+Cancelled, start",
    (Call.STOP, C.REFUSED, S.CANCELLING): "stop transfer, write REFUSED+Cancelled, destroy, write REFUSED+Finalized, OK",
    # Cancelled and Failed: every Finalize may be asked for, the cell decides; Cleanup does what going back would have.
    (Call.RESUME, C.KEPT, S.CANCELLED): "start",
    (Call.RESUME, C.HELD, S.CANCELLED): "write STARTING+Cancelled, start",
    (Call.STOP, C.RELEASED, S.CANCELLED): "send RELEASED?",
    (Call.STOP, C.REFUSED, S.FAILED): "destroy, write REFUSED+Finalized, OK",
    (Call.CANCEL, C.KEPT, S.CANCELLED): "OK",
    (Call.CLEANUP, C.RELEASED, S.CANCELLED): "send RELEASED!",
    (Call.CLEANUP, C.KEPT, S.CANCELLED): "start",
    (Call.CLEANUP, C.GONE, S.CANCELLED): "destroy, keep, write GONE+Idle, OK",
    (Call.CLEANUP, C.HELD, S.CANCELLED): "send HELD?",
    (Call.CLEANUP, C.STARTING, S.CANCELLED): "FP",
    (Call.CLEANUP, C.RUNNING, S.CANCELLED): "keep, write RUNNING+Idle, OK",
    (Call.CLEANUP, C.RETURNING, S.CANCELLED): "send RETURNING?",
    (Call.CLEANUP, C.REFUSED, S.FAILED): "destroy, keep, write REFUSED+Idle, OK",
    (Call.CLEANUP, C.LOST, S.CANCELLED): "keep, write LOST+Idle, OK",
    # Finalized: the same again, or Cleanup.
    (Call.RESUME, C.KEPT, S.FINALIZED): "OK",
    (Call.STOP, C.KEPT, S.FINALIZED): "FP",
    (Call.CANCEL, C.KEPT, S.FINALIZED): "FP",
    (Call.CLEANUP, C.KEPT, S.FINALIZED): "keep, write KEPT+Idle, OK",
    (Call.STOP, C.GONE, S.FINALIZED): "OK",
    (Call.RESUME, C.RUNNING, S.FINALIZED): "OK",
    (Call.STOP, C.RUNNING, S.FINALIZED): "FP",
    (Call.STOP, C.REFUSED, S.FINALIZED): "OK",
    (Call.CLEANUP, C.RUNNING, S.FINALIZED): "keep, write RUNNING+Idle, OK",
    # After Cleanup.
    (Call.STOP, C.GONE, S.IDLE): "OK",
    (Call.RESUME, C.GONE, S.IDLE): "FP",
    (Call.CLEANUP, C.GONE, S.IDLE): "OK",
    (Call.CANCEL, C.GONE, S.IDLE): "FP",
    (Call.RESUME, C.RUNNING, S.IDLE): "OK",
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS, ids=lambda case: f"{case[0].value}-{case[1].name}-{case[2].value}")
def test_a_call(case: tuple[Call, Cell, State]) -> None:
    call, cell, state = case
    assert told(right.handle(party(cell, state), CallMade(call))[1]) == CALLS[case]


def test_every_cell_of_section_6_is_tested_in_transfer_completed() -> None:
    expected = {
        (call, cell)
        for call in (Call.RESUME, Call.STOP, Call.CANCEL)
        for cell in Cell
        if cell is not C.NONE  # only before completion
    }
    assert {(call, cell) for call, cell, state in CALLS if state is S.TRANSFER_COMPLETED} == expected


@pytest.mark.parametrize(
    ("call", "cell", "receipt", "done"),
    [
        (Call.RESUME, C.RELEASED, C.REFUSED, "write KEPT, start"),
        (Call.RESUME, C.RELEASED, C.RETURNING, "write KEPT, send KEPT, start"),
        (Call.RESUME, C.RELEASED, C.RUNNING, "FP"),
        (Call.STOP, C.OPEN, C.READY, "write RELEASED, send RELEASED?"),
        (Call.STOP, C.RELEASED, C.RUNNING, DONE),
        (Call.STOP, C.RELEASED, C.REFUSED, "write KEPT, FP"),
        (Call.STOP, C.RELEASED, C.RETURNING, "write KEPT, send KEPT, FP"),
        (Call.RESUME, C.READY, C.RELEASED, "write STARTING, start"),
        (Call.RESUME, C.READY, C.GONE, "write STARTING, start"),
        (Call.RESUME, C.READY, C.KEPT, "write REFUSED, FP"),
        (Call.RESUME, C.RETURNING, C.GONE, "write STARTING, start"),
        (Call.RESUME, C.RETURNING, C.KEPT, "write REFUSED, FP"),
        (Call.STOP, C.HELD, C.RELEASED, "write RETURNING, send RETURNING?"),
        (Call.STOP, C.RETURNING, C.GONE, "write HELD, FP"),
        (Call.STOP, C.RETURNING, C.KEPT, "write REFUSED, destroy, write REFUSED+Finalized, OK"),
    ],
)
def test_a_receipt_that_is_looked_at(call: Call, cell: Cell, receipt: Cell, done: str) -> None:
    assert told(right.handle(party(cell), CallMade(call, Statement(receipt)))[1]) == done
    assert (call, cell, receipt) in right_source.LOOKED_AT | right_destination.LOOKED_AT


def test_no_more_receipts_are_looked_at_than_section_6_names() -> None:
    assert len(right_source.LOOKED_AT) == 7
    assert len(right_destination.LOOKED_AT) == 8


@pytest.mark.parametrize("call", [Call.RESUME, Call.STOP, Call.CANCEL, Call.CLEANUP])
def test_any_other_receipt_is_ignored(call: Call) -> None:
    looked_at = right_source.LOOKED_AT | right_destination.LOOKED_AT
    for cell, receipt, state in itertools.product(Cell, Cell, (S.TRANSFER_COMPLETED, S.CANCELLED, S.FAILED)):
        if receipt.side is cell.side or cell is C.NONE or (call, cell, receipt) in looked_at:
            continue
        with_it, steps = right.handle(party(cell, state), CallMade(call, Statement(receipt)))
        without, plain = right.handle(party(cell, state), CallMade(call))
        assert (replace(with_it, peer=None), told(steps)) == (without, told(plain)), (cell, receipt, state)


def test_the_last_statement_of_the_peer_decides_nothing() -> None:
    calls = [None, Call.RESUME, Call.STOP, Call.CLEANUP]
    events = [
        right.AskTimedOut(),
        right.ChannelLost(),
        right.VmDied(),
        right.MemoryComplete(),
    ]
    events += [CallMade(call) for call in calls if call]
    for cell, call, event, state in itertools.product(
        set(Cell) - {C.NONE}, calls, events, (S.TRANSFER_COMPLETED, S.CANCELLED)
    ):
        if isinstance(event, CallMade) and call is not None:
            continue
        if call is Call.CLEANUP and state is S.TRANSFER_COMPLETED:
            continue  # refused there: it never waits
        own = party(cell, state, call)
        plain, steps = right.handle(own, event)
        for peer in Cell:
            if peer.side is not cell.side:
                other, again = right.handle(replace(own, peer=Statement(peer)), event)
                assert told(again) == told(steps)
                assert replace(other, peer=None) == plain
