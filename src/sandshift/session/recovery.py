"""The good orchestrator: from whatever two shims of a session say, to one running guest. Pure.

`recover()` is a generator: it yields orders (`Look`, `Invoke`, `Pause`) and is sent their answers (`View | None`,
`Result`, None); it returns a `Verdict`. Whoever drives it may be new and know only the session id and both hosts. The
fleet drives it over the network, the explorer (tests/explore) from every state that it can reach.

Rule for every orchestrator: **destination RESUME first, source STOP after it has succeeded**; going back: source
RESUME first, destination STOP after it has succeeded. The other orders are safe too, but in between one VM is all
there is. right-to-run.md, section 8; differing from it in one point: nothing whose memory is complete is cancelled on
the way back, since RESUME and STOP do all that is needed, and a cancelled destination is discarded before the source
is known to run.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from sandshift.session.statement import Cell
from sandshift.session.states import BEFORE_COMPLETION, Action, Call, Side, State

ROUNDS_MAX: Final = 3

_STARTED: Final = frozenset((Cell.HELD, Cell.STARTING, Cell.RUNNING))


@dataclass(frozen=True, slots=True)
class View:
    """What one side says now, or what its host has kept of it."""

    cell: Cell
    state: State
    receipt: object
    """The signed statement (bytes), passed on unread."""
    vm_alive: bool = True
    action: Action | None = None
    """What the side was finalized with."""


class Result(enum.Enum):
    """How a call ended, as far as a procedure cares."""

    OK = "ok"
    REFUSED = "refused"
    """FAILED_PRECONDITION or INTERNAL: repeating it alone changes nothing."""
    UNANSWERED = "unanswered"
    """UNAVAILABLE, or nobody there: it may be repeated."""


@dataclass(frozen=True, slots=True)
class Look:
    """Read the side's status; its host's kept statement if the shim is no more. Answer: View, None if neither."""

    side: Side


@dataclass(frozen=True, slots=True)
class Invoke:
    """RESUME, STOP, CANCEL or CLEANUP. Answer: Result."""

    side: Side
    call: Call
    receipt: object | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Give both sides a second to notice what they have not noticed yet. Answer: None."""


class Ending(enum.Enum):
    FORWARD = "the guest runs on the destination"
    BACK = "the guest runs on the source"
    OPERATOR = "an operator has to decide"
    CRASHED = "the guest's VM died where it had the right to run"
    UNFINISHED = "not finished: run it again"


@dataclass(frozen=True, slots=True)
class Verdict:
    ending: Ending
    why: str = ""
    force: Side | None = None
    """OPERATOR: the side on which RESUME can be forced, once `why` has been dealt with."""


Order = Look | Invoke | Pause
Answer = View | Result | None
Procedure = Generator[Order, Answer, Verdict]
_Part = Generator[Order, Answer, bool]
_Way = Generator[Order, Answer, Ending | None]


def recover() -> Procedure:
    """Finish or undo a migration. Calls nothing that could harm a session that somebody else is finishing too."""
    for _ in range(ROUNDS_MAX):
        yield from _cancel_what_is_under_way()
        source, destination = yield from _look_at_both()
        way = _forward if goes_forward(source, destination) else _back
        ending = yield from way(source, destination)
        if ending is not None:
            return Verdict(ending)
        yield Pause()
    return diagnose(*(yield from _look_at_both()))


def goes_forward(source: View | None, destination: View | None) -> bool:
    """Whether the destination has, or is the only one that can still get, the right to run."""
    if destination is None:
        return False
    if destination.cell in _STARTED:
        return True
    if source is None:
        return False
    if source.cell is Cell.GONE:
        return destination.cell in (Cell.NONE, Cell.READY, Cell.RETURNING)
    return source.cell is Cell.RELEASED and destination.cell is Cell.READY


def diagnose(source: View | None, destination: View | None) -> Verdict:
    """Why recovery could not finish by itself. right-to-run.md, section 9."""
    if (
        source is not None
        and source.cell is Cell.GONE
        and destination is not None
        and not destination.vm_alive
    ):
        return Verdict(
            Ending.CRASHED, "the destination's VM died when the source had given its own up for good"
        )
    if destination is not None and destination.cell is Cell.LOST:
        return Verdict(
            Ending.OPERATOR,
            "the destination's VM died while the guest was being started there, and nobody can know whether it ran: "
            "force RESUME on the source (some milliseconds of the guest may repeat), or accept the loss",
            Side.SOURCE,
        )
    if destination is not None and destination.cell is Cell.RUNNING and not destination.vm_alive:
        return Verdict(Ending.CRASHED, "the destination's VM died after the guest had started there")
    if source is not None and source.cell is Cell.KEPT and not source.vm_alive:
        return _source_died(destination)
    if source is not None and source.cell is Cell.RELEASED and destination is None:
        return Verdict(
            Ending.OPERATOR,
            "the source has released the right to run and the destination's host does not answer: "
            "prove that host off, then force RESUME on the source",
            Side.SOURCE,
        )
    if source is None and destination is not None and destination.cell in (Cell.READY, Cell.RETURNING):
        return Verdict(
            Ending.OPERATOR,
            "the source's host does not answer and may run the guest: "
            "prove that host off, then force RESUME on the destination",
            Side.DESTINATION,
        )
    return Verdict(
        Ending.UNFINISHED, f"{_shown(Side.SOURCE, source)}, {_shown(Side.DESTINATION, destination)}"
    )


def _source_died(destination: View | None) -> Verdict:
    if destination is not None and destination.cell is Cell.READY and destination.vm_alive:
        return Verdict(
            Ending.OPERATOR,
            "the source's VM died where it had the right to run, and the destination has a complete copy, "
            "possibly an older one: force RESUME on the destination (the guest may go back in time), or clean up",
            Side.DESTINATION,
        )
    return Verdict(Ending.CRASHED, "the source's VM died where it had the right to run")


def _cancel_what_is_under_way() -> Generator[Order, Answer, None]:
    """Sides whose memory is not complete are cancelled, the source first; a destination without a source never is."""
    source = yield from _look(Side.SOURCE)
    if source is not None and source.state in BEFORE_COMPLETION:
        yield from _invoke(Side.SOURCE, Call.CANCEL)
        source = yield from _look(Side.SOURCE)
    destination = yield from _look(Side.DESTINATION)
    stays = source is not None and source.cell in (Cell.OPEN, Cell.KEPT) and source.vm_alive
    if destination is not None and destination.state in BEFORE_COMPLETION and stays:
        yield from _invoke(Side.DESTINATION, Call.CANCEL)


def _forward(source: View | None, destination: View | None) -> _Way:
    if not (yield from _finalize(Side.DESTINATION, Call.RESUME, destination, source)):
        if destination is not None and destination.cell is Cell.HELD:
            # Its VM does not start: give the right back, if the source still has its image.
            yield from _invoke(Side.DESTINATION, Call.STOP, source)
            return (yield from _back(*(yield from _look_at_both())))
        return None
    destination = yield from _look(Side.DESTINATION)
    if not _crashed_where_it_was_kept(source) and not (
        yield from _finalize(Side.SOURCE, Call.STOP, source, destination)
    ):
        return None
    return Ending.FORWARD if (yield from _clean_both()) else None


def _back(source: View | None, destination: View | None) -> _Way:
    if not (yield from _finalize(Side.SOURCE, Call.RESUME, source, destination)):
        return None
    source = yield from _look(Side.SOURCE)
    if destination is not None and destination.cell is Cell.LOST:
        # The source was forced: what is left of the destination only has to be closed.
        if destination.state is State.TRANSFER_COMPLETED:
            yield from _invoke(Side.DESTINATION, Call.CANCEL)
    elif not (yield from _finalize(Side.DESTINATION, Call.STOP, destination, source)):
        return None
    return Ending.BACK if (yield from _clean_both()) else None


def _crashed_where_it_was_kept(source: View | None) -> bool:
    """The source's VM died in KEPT. Where the destination runs all the same it was forced, and nothing is to be stopped."""
    return source is not None and source.cell is Cell.KEPT and not source.vm_alive


def _clean_both() -> _Part:
    for side in Side:
        if not (yield from _clean(side)):
            return False
    return True


def _clean(side: Side) -> _Part:
    view = yield from _look(side)
    if view is None:
        return False
    if view.state is State.IDLE:
        return True
    return (yield from _invoke(side, Call.CLEANUP))


def _finalize(side: Side, call: Call, own: View | None, peer: View | None) -> _Part:
    """Not asked of a side that has ended the session this way: its shim may be no more."""
    if own is not None and own.state is State.IDLE:
        return own.action is call.action
    return (yield from _invoke(side, call, peer))


def _invoke(side: Side, call: Call, peer: View | None = None) -> _Part:
    result = yield Invoke(side, call, None if peer is None else peer.receipt)
    return result is Result.OK


def _look(side: Side) -> Generator[Order, Answer, View | None]:
    view = yield Look(side)
    assert view is None or isinstance(view, View)
    return view


def _look_at_both() -> Generator[Order, Answer, tuple[View | None, View | None]]:
    source = yield from _look(Side.SOURCE)
    destination = yield from _look(Side.DESTINATION)
    return source, destination


def _shown(side: Side, view: View | None) -> str:
    if view is None:
        return f"{side.word} does not answer"
    alive = "" if view.vm_alive else ", its VM dead"
    return f"{side.word} {view.cell.name} ({view.state.value}{alive})"
