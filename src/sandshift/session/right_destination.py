"""The destination's rules. The tables are those of right-to-run.md, sections 5 and 6; what is not in one is not done.

NONE -> READY | REFUSED       READY -> HELD | REFUSED       HELD -> STARTING | RETURNING | REFUSED (VM dead)
STARTING -> RUNNING | HELD (start refused, provably never ran) | LOST
RETURNING -> REFUSED | HELD (the source is GONE)
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
        Cell.NONE: frozenset((Cell.READY, Cell.REFUSED)),
        Cell.READY: frozenset((Cell.HELD, Cell.REFUSED)),
        Cell.HELD: frozenset((Cell.STARTING, Cell.RETURNING, Cell.REFUSED)),
        Cell.STARTING: frozenset((Cell.RUNNING, Cell.HELD, Cell.LOST)),
        Cell.RUNNING: frozenset(),
        Cell.RETURNING: frozenset((Cell.REFUSED, Cell.HELD)),
        Cell.REFUSED: frozenset(),
        Cell.LOST: frozenset(),
    }
)

LOOKED_AT: Final[frozenset[tuple[Call, Cell, Cell]]] = frozenset(
    {
        (Call.RESUME, Cell.READY, Cell.RELEASED),
        (Call.RESUME, Cell.READY, Cell.GONE),
        (Call.RESUME, Cell.READY, Cell.KEPT),
        (Call.RESUME, Cell.RETURNING, Cell.GONE),
        (Call.RESUME, Cell.RETURNING, Cell.KEPT),
        (Call.STOP, Cell.HELD, Cell.RELEASED),
        (Call.STOP, Cell.RETURNING, Cell.GONE),
        (Call.STOP, Cell.RETURNING, Cell.KEPT),
    }
)
"""(call, own cell, cell in the receipt): any other receipt is ignored. STOP in READY refuses, whatever it carries."""

GOING_BACK: Final = (Call.STOP, Call.CLEANUP)


# Seeing a statement of the source (section 5) -----------------------------------------------------------------------


def see(turn: Turn, statement: Statement) -> None:
    rule = SEES.get((turn.cell, statement.cell))
    if rule is None:
        turn.answer(statement)
    else:
        rule(turn, statement)


def _ask_for_it_if_wanted(turn: Turn, statement: Statement) -> None:
    if turn.pending(Call.RESUME):
        turn.repeat()
    else:
        turn.answer(statement)


def _take(turn: Turn, statement: Statement) -> None:
    if statement.ask is Ask.GIVE:
        turn.write(cell=Cell.REFUSED)
        turn.send()
        _go_on(turn)
    else:
        _hold(turn, statement)


def _hold(turn: Turn, statement: Statement) -> None:
    turn.write(cell=Cell.HELD, peer_handover=statement.handover or turn.party.record.peer_handover)
    if turn.pending(Call.RESUME):
        _start(turn)
    else:
        turn.send()


def _refuse_what_the_source_keeps(turn: Turn, statement: Statement) -> None:
    turn.write(cell=Cell.REFUSED)
    turn.answer(statement)
    _go_on(turn)


def _return_if_asked(turn: Turn, statement: Statement) -> None:
    wanted_back = statement.ask is Ask.GIVE or turn.pending(*GOING_BACK) or turn.state is State.CANCELLED
    if not wanted_back:
        turn.answer(statement)
        return
    turn.write(cell=Cell.RETURNING)
    if turn.party.pending is not None:
        _go_on(turn)
    else:
        turn.send()


def _the_source_is_gone(turn: Turn, statement: Statement) -> None:
    if turn.pending(*GOING_BACK):
        turn.cannot(MEANS[Cell.GONE], "finalize this side with RESUME")
    else:
        turn.answer(statement)


def _say_again(turn: Turn, statement: Statement) -> None:
    del statement
    turn.repeat()


def _hold_again(turn: Turn, statement: Statement) -> None:
    if turn.pending(*GOING_BACK):
        turn.write(cell=Cell.HELD)
        turn.cannot(MEANS[Cell.GONE], "finalize this side with RESUME")
    else:
        _hold(turn, statement)


SEES: Final[Mapping[tuple[Cell, Cell], Callable[[Turn, Statement], None]]] = MappingProxyType(
    {
        # Rows: own cell, source's cell. Not in the table: questions are answered, no more.
        (Cell.READY, Cell.OPEN): _ask_for_it_if_wanted,
        (Cell.READY, Cell.RELEASED): _take,
        (Cell.READY, Cell.GONE): _hold,
        (Cell.READY, Cell.KEPT): _refuse_what_the_source_keeps,
        (Cell.HELD, Cell.RELEASED): _return_if_asked,
        (Cell.HELD, Cell.GONE): _the_source_is_gone,
        (Cell.RETURNING, Cell.RELEASED): _say_again,
        (Cell.RETURNING, Cell.GONE): _hold_again,
        (Cell.RETURNING, Cell.KEPT): _refuse_what_the_source_keeps,
        (Cell.REFUSED, Cell.RELEASED): _say_again,
        (Cell.LOST, Cell.RELEASED): _say_again,
    }
)


# Calls (section 6) --------------------------------------------------------------------------------------------------


def call(turn: Turn, which: Call) -> None:
    """Serve the pending call by the cell; again when a statement or a death has moved the cell."""
    CALLS[which, turn.cell](turn)


def before_completion(turn: Turn, which: Call) -> None:
    """A call to go back first does what Cancel does."""
    if which is Call.STOP and (turn.party.record.before_completion or turn.state is State.CANCELLING):
        turn.cancel_transfer(Cell.REFUSED)


def _go_on(turn: Turn) -> None:
    """The cell has moved: what was waiting is served by the new one."""
    if turn.party.pending is not None:
        call(turn, turn.party.pending.call)


def _start(turn: Turn) -> None:
    """Only ever in a RESUME call. HELD and STARTING share one fsync: nothing is done or said between them."""
    turn.write(cell=Cell.STARTING)
    turn.start()


def _done_if_it_runs(turn: Turn) -> None:
    if turn.party.vm_alive or turn.pending(Call.CLEANUP):
        turn.finish()
    else:
        turn.cannot("the guest ran here, and its VM has died since", "cancel, then clean up")


def _ask_for_it(turn: Turn) -> None:
    turn.ask(Ask.GIVE)


def _ask_what_it_is(turn: Turn) -> None:
    turn.ask(Ask.TELL)


def _refuse_and_finish(turn: Turn) -> None:
    turn.write(cell=Cell.REFUSED)
    turn.send()
    _destroy_and_finish(turn)


def _destroy_and_finish(turn: Turn) -> None:
    turn.destroy()
    turn.finish()


def _cannot(turn: Turn) -> None:
    remedy = {
        Cell.STARTING: "repeat RESUME",
        Cell.RUNNING: "finalize this side with RESUME",
        Cell.LOST: "an operator decides: force-resume on the source, or accept the loss; then cancel and clean up",
    }.get(turn.cell, "resume the source" if turn.cell is Cell.REFUSED else "")
    turn.cannot(MEANS[turn.cell], remedy)


def _close_what_is_lost(turn: Turn) -> None:
    """There is no VM, and nothing to decide here. The last statement, which outlives this, goes on saying LOST."""
    turn.finish()


def _cancel(turn: Turn) -> None:
    if turn.state is State.TRANSFER_COMPLETED:
        turn.move(Event.CANCEL_CALLED, cell=Cell.REFUSED, cancelled=True)
        turn.send()
    else:
        turn.cancel_transfer(Cell.REFUSED)
    turn.succeed()


def _cancel_and_ask(turn: Turn) -> None:
    turn.move(Event.CANCEL_CALLED, cancelled=True)
    turn.send(Ask.TELL)
    turn.succeed()


def _cancel_without_effect(turn: Turn) -> None:
    if turn.state is State.TRANSFER_COMPLETED:
        turn.move(Event.CANCEL_CALLED, cancelled=True)
    else:
        turn.cancel_transfer(turn.cell)
    turn.succeed()


CALLS: Final[Mapping[tuple[Call, Cell], Callable[[Turn], None]]] = MappingProxyType(
    {
        (Call.RESUME, Cell.NONE): _cannot,
        (Call.RESUME, Cell.READY): _ask_for_it,
        (Call.RESUME, Cell.HELD): _start,
        (Call.RESUME, Cell.STARTING): _start,
        (Call.RESUME, Cell.RUNNING): _done_if_it_runs,
        (Call.RESUME, Cell.RETURNING): _ask_what_it_is,
        (Call.RESUME, Cell.REFUSED): _cannot,
        (Call.RESUME, Cell.LOST): _cannot,
        (Call.CANCEL, Cell.NONE): _cancel,
        (Call.CANCEL, Cell.READY): _cancel,
        (Call.CANCEL, Cell.HELD): _cancel_and_ask,
        (Call.CANCEL, Cell.STARTING): _cancel_without_effect,
        (Call.CANCEL, Cell.RUNNING): _cancel_without_effect,
        (Call.CANCEL, Cell.RETURNING): _cancel_and_ask,
        (Call.CANCEL, Cell.REFUSED): _cancel_without_effect,
        (Call.CANCEL, Cell.LOST): _cancel_without_effect,
    }
    | {
        (back, cell): rule
        for back in GOING_BACK
        for cell, rule in {
            Cell.NONE: _refuse_and_finish,
            Cell.READY: _refuse_and_finish,
            Cell.HELD: _ask_what_it_is,
            Cell.STARTING: _cannot,
            Cell.RUNNING: _cannot,
            Cell.RETURNING: _ask_what_it_is,
            Cell.REFUSED: _destroy_and_finish,
            Cell.LOST: _cannot,
        }.items()
    }
    | {(Call.CLEANUP, Cell.RUNNING): _done_if_it_runs, (Call.CLEANUP, Cell.LOST): _close_what_is_lost}
)


# What happens to the own VM ------------------------------------------------------------------------------------------


def memory_complete(turn: Turn, handover: bytes) -> None:
    """The destination keeps silent until the source has spoken. It makes no handover record."""
    del handover
    if turn.cell is Cell.NONE:
        turn.move(Event.MEMORY_COMPLETE, cell=Cell.READY, complete=True)


def transfer_failed(turn: Turn, reason: str) -> None:
    """Also a memory that is complete and whose digest is not the source's."""
    if turn.cell in (Cell.NONE, Cell.READY):
        turn.move(Event.BROKEN, cell=Cell.REFUSED, reason=reason)
        turn.send()
        _go_on(turn)


def vm_died(turn: Turn, reason: str) -> None:
    """Rule 9: a side whose own VM is dead never claims the right. Rule 7: it has nothing to protect."""
    if turn.cell is Cell.NONE:
        turn.move(Event.BROKEN, cell=Cell.REFUSED, reason=reason)
    elif turn.cell in (Cell.READY, Cell.HELD, Cell.RETURNING):
        turn.write(cell=Cell.REFUSED, reason=reason)
        turn.send()
    elif turn.cell is Cell.STARTING:
        turn.write(cell=Cell.LOST, reason=reason)
        turn.send()
    _go_on(turn)


def started(turn: Turn) -> None:
    """RUNNING is the one record that follows its act."""
    turn.move(Event.FINALIZED, cell=Cell.RUNNING)
    turn.send()
    turn.succeed()


def start_refused(turn: Turn) -> None:
    turn.write(cell=Cell.HELD)
    if turn.owes:
        turn.send()


def restarted(turn: Turn, event: Restarted) -> None:
    """Section 7. No virtual CPU is started."""
    if turn.cell is Cell.NONE:
        if event.transfer is Transfer.COMPLETED:
            memory_complete(turn, b"")
        elif event.transfer is Transfer.FAILED:
            transfer_failed(turn, "the transfer failed while no shim was there")
    elif turn.cell is Cell.STARTING and event.vm_running:
        turn.write(cell=Cell.RUNNING)
    elif turn.state is State.CANCELLING:
        turn.cancel_transfer(turn.cell)
