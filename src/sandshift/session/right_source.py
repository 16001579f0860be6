"""The source's rules. The tables are those of right-to-run.md, sections 5 and 6; what is not in one is not done.

OPEN -> RELEASED | KEPT | GONE      RELEASED -> KEPT | GONE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from sandshift.session.right_model import Restarted, Transfer
from sandshift.session.right_turn import Turn
from sandshift.session.right_words import MEANS
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Event, State

MOVES: Final[Mapping[Cell, frozenset[Cell]]] = MappingProxyType(
    {
        Cell.OPEN: frozenset((Cell.RELEASED, Cell.KEPT, Cell.GONE)),
        Cell.RELEASED: frozenset((Cell.KEPT, Cell.GONE)),
        Cell.KEPT: frozenset(),
        Cell.GONE: frozenset(),
    }
)

LOOKED_AT: Final[frozenset[tuple[Call, Cell, Cell]]] = frozenset(
    {
        (Call.RESUME, Cell.RELEASED, Cell.REFUSED),
        (Call.RESUME, Cell.RELEASED, Cell.RETURNING),
        (Call.RESUME, Cell.RELEASED, Cell.RUNNING),
        (Call.STOP, Cell.OPEN, Cell.READY),
        (Call.STOP, Cell.RELEASED, Cell.RUNNING),
        (Call.STOP, Cell.RELEASED, Cell.REFUSED),
        (Call.STOP, Cell.RELEASED, Cell.RETURNING),
    }
)
"""(call, own cell, cell in the receipt): any other receipt is ignored. HELD and STARTING are never enough: the
destination's VM may have died since, and the right may be on its way back."""


# Seeing a statement of the destination (section 5) ------------------------------------------------------------------


def see(turn: Turn, statement: Statement) -> None:
    rule = SEES.get((turn.cell, statement.cell))
    if rule is None or (turn.cell is Cell.OPEN and not turn.party.complete):
        turn.answer(statement)
    else:
        rule(turn, statement)


def _release_if_asked(turn: Turn, statement: Statement) -> None:
    if turn.pending(Call.STOP):
        turn.write(cell=Cell.RELEASED)
        turn.ask(Ask.TELL)
    elif statement.ask is Ask.GIVE:
        turn.write(cell=Cell.RELEASED)
        turn.send(Ask.TELL)
    else:
        turn.answer(statement)


def _say_again_if_asked(turn: Turn, statement: Statement) -> None:
    if statement.ask is Ask.GIVE:
        turn.repeat(otherwise=Ask.TELL)
    else:
        turn.answer(statement)


def _give_up_if_it_answers_the_stop(turn: Turn, statement: Statement) -> None:
    pending = turn.party.pending
    if turn.pending(Call.STOP) and pending and 0 != pending.ask_number == statement.answers:
        turn.write(cell=Cell.GONE)
        _destroy_and_finish(turn)
    else:
        turn.answer(statement)


def _it_runs_there(turn: Turn, statement: Statement) -> None:
    if turn.pending(Call.STOP):
        turn.write(cell=Cell.GONE)
        _destroy_and_finish(turn)
    elif turn.pending(Call.RESUME):
        turn.cannot(MEANS[Cell.RUNNING], "finalize this side with STOP")
    else:
        turn.answer(statement)


def _take_back(turn: Turn, statement: Statement) -> None:
    turn.write(cell=Cell.KEPT)
    if statement.cell is Cell.RETURNING:
        turn.send()
    else:
        turn.answer(statement)
    _go_on(turn)


def _tell(turn: Turn, statement: Statement) -> None:
    del statement
    turn.send()


SEES: Final[Mapping[tuple[Cell, Cell], Callable[[Turn, Statement], None]]] = MappingProxyType(
    {
        # Rows: own cell (OPEN: complete), destination's cell. Not in the table: questions are answered, no more.
        (Cell.OPEN, Cell.READY): _release_if_asked,
        (Cell.OPEN, Cell.REFUSED): _take_back,
        (Cell.RELEASED, Cell.READY): _say_again_if_asked,
        (Cell.RELEASED, Cell.HELD): _give_up_if_it_answers_the_stop,
        (Cell.RELEASED, Cell.STARTING): _give_up_if_it_answers_the_stop,
        (Cell.RELEASED, Cell.RUNNING): _it_runs_there,
        (Cell.RELEASED, Cell.RETURNING): _take_back,
        (Cell.RELEASED, Cell.REFUSED): _take_back,
        (Cell.KEPT, Cell.RETURNING): _tell,
        (Cell.GONE, Cell.RETURNING): _tell,
    }
)


# Calls (section 6) --------------------------------------------------------------------------------------------------


def call(turn: Turn, which: Call) -> None:
    """Serve the pending call by the cell; again when a statement or a death has moved the cell."""
    CALLS[which, turn.cell](turn)


def before_completion(turn: Turn, which: Call) -> None:
    """A call to go back first does what Cancel does."""
    if which is Call.RESUME and (turn.party.record.before_completion or turn.state is State.CANCELLING):
        turn.cancel_transfer(Cell.KEPT)


def _go_on(turn: Turn) -> None:
    """The cell has moved: what was waiting is served by the new one."""
    if turn.party.pending is not None:
        call(turn, turn.party.pending.call)


def _keep_and_start(turn: Turn) -> None:
    turn.write(cell=Cell.KEPT)
    turn.send()
    _start(turn)


def _start(turn: Turn) -> None:
    if not turn.party.vm_alive:
        if turn.pending(Call.CLEANUP):
            turn.finish()
        else:
            turn.cannot("the source's VM is dead", "clean up, and start the sandbox anew")
        return
    if not turn.party.complete:
        turn.stop_transfer()
    turn.start()


def _ask_for_it(turn: Turn) -> None:
    turn.ask(Ask.GIVE)


def _ask_what_it_is(turn: Turn) -> None:
    turn.ask(Ask.TELL)


def _stop_while_open(turn: Turn) -> None:
    if turn.party.complete:
        turn.ask(Ask.TELL)
    else:
        turn.cannot("the source's VM has not handed the guest over", "finalize this side with RESUME")


def _destroy_and_finish(turn: Turn) -> None:
    turn.destroy()
    turn.finish()


def _no_way_back(turn: Turn) -> None:
    turn.cannot(MEANS[Cell.GONE], "finalize the destination with RESUME")


def _nobody_else_has_it(turn: Turn) -> None:
    turn.cannot(MEANS[Cell.KEPT], "finalize this side with RESUME")


def _cancel(turn: Turn) -> None:
    if turn.state is State.TRANSFER_COMPLETED:
        turn.move(Event.CANCEL_CALLED, cell=Cell.KEPT, cancelled=True)
        turn.send()
    else:
        turn.cancel_transfer(Cell.KEPT)
    turn.succeed()


def _cancel_and_ask_for_it(turn: Turn) -> None:
    turn.move(Event.CANCEL_CALLED, cancelled=True)
    turn.send(Ask.GIVE)
    turn.succeed()


def _cancel_without_effect(turn: Turn) -> None:
    if turn.state is State.TRANSFER_COMPLETED:
        turn.move(Event.CANCEL_CALLED, cancelled=True)
    else:
        turn.cancel_transfer(turn.cell)
    turn.succeed()


CALLS: Final[Mapping[tuple[Call, Cell], Callable[[Turn], None]]] = MappingProxyType(
    {
        (Call.RESUME, Cell.OPEN): _keep_and_start,
        (Call.RESUME, Cell.RELEASED): _ask_for_it,
        (Call.RESUME, Cell.KEPT): _start,
        (Call.RESUME, Cell.GONE): _no_way_back,
        (Call.STOP, Cell.OPEN): _stop_while_open,
        (Call.STOP, Cell.RELEASED): _ask_what_it_is,
        (Call.STOP, Cell.KEPT): _nobody_else_has_it,
        (Call.STOP, Cell.GONE): _destroy_and_finish,
        (Call.CANCEL, Cell.OPEN): _cancel,
        (Call.CANCEL, Cell.RELEASED): _cancel_and_ask_for_it,
        (Call.CANCEL, Cell.KEPT): _cancel_without_effect,
        (Call.CANCEL, Cell.GONE): _cancel_without_effect,
        (Call.CLEANUP, Cell.OPEN): _keep_and_start,
        (Call.CLEANUP, Cell.RELEASED): _ask_for_it,
        (Call.CLEANUP, Cell.KEPT): _start,
        (Call.CLEANUP, Cell.GONE): _destroy_and_finish,
    }
)


# What happens to the own VM ------------------------------------------------------------------------------------------


def memory_complete(turn: Turn, handover: bytes) -> None:
    """The source speaks first. After a Cancel that came too late for its VM the guest still stays here."""
    if turn.party.complete or turn.cell not in (Cell.OPEN, Cell.KEPT):
        return
    if turn.cell is Cell.OPEN:
        turn.move(Event.MEMORY_COMPLETE, complete=True, handover=handover)
    else:
        turn.write(complete=True, handover=handover)
    turn.send()


def transfer_failed(turn: Turn, reason: str) -> None:
    if turn.cell is Cell.OPEN and not turn.party.complete:
        turn.move(Event.BROKEN, cell=Cell.KEPT, reason=reason)


def vm_died(turn: Turn, reason: str) -> None:
    """Rule 9: a side whose own VM is dead never claims the right."""
    if turn.cell is Cell.OPEN and not turn.party.complete:
        turn.move(Event.BROKEN, cell=Cell.KEPT, reason=reason)
    elif turn.cell in (Cell.OPEN, Cell.RELEASED):
        turn.write(cell=Cell.GONE, reason=reason)
        turn.send()
    _go_on(turn)


def started(turn: Turn) -> None:
    turn.finish()


def start_refused(turn: Turn) -> None:
    """KEPT stays KEPT: it can be tried again."""


def restarted(turn: Turn, event: Restarted) -> None:
    """Section 7. No virtual CPU is started."""
    if turn.cell is Cell.OPEN and not turn.party.complete:
        if event.transfer is Transfer.COMPLETED:
            memory_complete(turn, event.handover)
        elif event.transfer is Transfer.FAILED:
            transfer_failed(turn, "the transfer failed while no shim was there")
    elif turn.cell is Cell.KEPT:
        if event.transfer is Transfer.GOING_ON:
            turn.stop_transfer()
        if turn.state is State.CANCELLING:
            turn.cancel_transfer(Cell.KEPT)
    elif turn.cell is Cell.GONE:
        turn.destroy()
