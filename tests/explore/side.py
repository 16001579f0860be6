"""One shim as the search sees it, and all that one event can make of it.

A `Local` is what a shim is between two events: the party in memory, the record on disk, the VM as it really is. It is
kept canonical (numbers of questions, texts and the peer's last statement are of no consequence), so that histories
that differ in nothing that matters are one.

`Shim.outcomes` carries the protocol's steps out as a shell does, and branches wherever something can go wrong: a crash
before any step and after the last one, a refused start, a VM that dies while it is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from sandshift.session import right_destination, right_source
from sandshift.session.right import (
    CallMade,
    Channel,
    ChannelLost,
    ChannelUp,
    DestroyVm,
    FrameRead,
    KeepLastStatement,
    MemoryComplete,
    Party,
    Record,
    Reply,
    Restarted,
    RightEvent,
    SendFrame,
    StartRefused,
    StartSucceeded,
    StartVcpus,
    Step,
    StopTransfer,
    Transfer,
    VmDied,
    WriteRecord,
    handle,
    restored_party,
)
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Side, State

CURRENT = 1
"""Canonical number of the question that the source's pending STOP waits on."""
STALE = 9
"""Canonical number of any other question of the source's."""
MOVES = {
    (cell, after)
    for moves in (right_source.MOVES, right_destination.MOVES)
    for cell, afters in moves.items()
    for after in afters
} | {(Cell.READY, Cell.STARTING), (Cell.RETURNING, Cell.STARTING)}
"""The moves of section 2; HELD and STARTING may share one fsync."""
DESTROYS_IN = {Side.SOURCE: Cell.GONE, Side.DESTINATION: Cell.REFUSED}
STARTS_IN = {
    Side.SOURCE: (Cell.OPEN, Cell.KEPT),
    Side.DESTINATION: (Cell.STARTING, Cell.RUNNING),
}


class Vm:
    """A VM process as it really is. Plain numbers: they are hashed millions of times."""

    STOPPED = 0
    RUNNING = 1
    GONE = 2
    PAUSED = 3
    """The guest ran, and its VM has paused by itself since (an I/O error, say)."""


class Flow:
    """The memory's way, as it really is."""

    ON = 0
    """Under way; the guest runs on the source."""
    SWITCHING = 1
    """Everything is at the destination; the source's VM is stopped and does not know it yet."""
    DONE = 2
    """The source's VM knows it and cannot resume by itself any more."""
    RESUMED = 3
    """Everything was at the destination, the source's VM did not learn it and went on by itself (or died)."""
    BROKEN = 4
    """It failed half-way; the guest runs on the source (if its VM lives)."""


class Local(NamedTuple):
    party: Party
    disk: Record
    vm: int
    kept: bool
    """The host has a copy of the last statement."""


class Op(NamedTuple):
    """Something that the world outside this shim is touched by, in order of happening."""

    kind: str
    """send, run, destroy, wrote, cut, violation."""
    what: object = None


class Cost(NamedTuple):
    crashes: int = 0
    deaths: int = 0
    refusals: int = 0

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def within(self, other: Cost) -> bool:
        return all(a <= b for a, b in zip(self, other, strict=True))


CRASH, DEATH, REFUSAL = Cost(1, 0, 0), Cost(0, 1, 0), Cost(0, 0, 1)


class Outcome(NamedTuple):
    """One thing that can come of one event."""

    local: Local
    flow: int
    ops: tuple[Op, ...]
    cost: Cost
    notes: tuple[str, ...]
    """What happened beyond the event itself, for a story."""
    reply: Reply | None
    forgets: bool
    """Questions of this shim's that are on their way are not its current one any more."""


@dataclass(frozen=True)
class Faults:
    """What may go wrong while one event is handled, and what the protocol is (mutants replace `handle`)."""

    allowed: Cost
    handle: Callable[[Party, RightEvent], tuple[Party, tuple[Step, ...]]] = handle
    channel_survives_crash: bool = False
    """A new process may also find the channel where its VM process kept it."""
    refusals_are_proven: bool = True
    """A shell reports a refused start only if the VM says that the guest has not run since it was loaded."""
    check_cells: bool = True
    """Also demand that the record on disk allows a start or a destruction, whether it does harm this time or not."""


_TRANSFER = {
    (Side.SOURCE, Flow.ON): Transfer.GOING_ON,
    (Side.SOURCE, Flow.SWITCHING): Transfer.GOING_ON,
    (Side.SOURCE, Flow.DONE): Transfer.COMPLETED,
    (Side.SOURCE, Flow.RESUMED): Transfer.FAILED,
    (Side.SOURCE, Flow.BROKEN): Transfer.FAILED,
    (Side.DESTINATION, Flow.ON): Transfer.GOING_ON,
    (Side.DESTINATION, Flow.SWITCHING): Transfer.COMPLETED,
    (Side.DESTINATION, Flow.DONE): Transfer.COMPLETED,
    (Side.DESTINATION, Flow.RESUMED): Transfer.COMPLETED,
    (Side.DESTINATION, Flow.BROKEN): Transfer.FAILED,
}


def first_local(side: Side) -> Local:
    """In the middle of the transfer, the channel with the VMs."""
    cell = Cell.OPEN if side is Side.SOURCE else Cell.NONE
    record = Record(side, "s", cell, State.TRANSFERRING)
    party = replace(restored_party(record, next_ask=CURRENT + 1), channel=Channel.UP)
    return Local(party, record, Vm.RUNNING if side is Side.SOURCE else Vm.STOPPED, kept=False)


class _Run:
    """One branch of carrying steps out."""

    def __init__(self, local: Local, flow: int) -> None:
        self.party, self.disk, self.vm, self.kept = local
        self.flow = flow
        self.ops: list[Op] = []
        self.cost = Cost()
        self.notes: list[str] = []
        self.reply: Reply | None = None

    def fork(self) -> _Run:
        other = _Run(Local(self.party, self.disk, self.vm, self.kept), self.flow)
        other.ops, other.notes = list(self.ops), list(self.notes)
        other.cost, other.reply = self.cost, self.reply
        return other


class Shim:
    """All outcomes of events on one side."""

    def __init__(self, side: Side, faults: Faults) -> None:
        self.side = side
        self.faults = faults

    def outcomes(self, local: Local, event: RightEvent, flow: int) -> list[Outcome]:
        asked_before = _question(local.party)
        found: dict[Outcome, None] = {}
        for run in self._feed(_Run(local, flow), event):
            found[self._outcome(run, asked_before)] = None
        return list(found)

    def _feed(self, run: _Run, event: RightEvent) -> Iterator[_Run]:
        run.party, steps = self.faults.handle(run.party, event)
        yield from self._carry_out(run, steps)

    def _carry_out(self, run: _Run, steps: tuple[Step, ...]) -> Iterator[_Run]:
        for position, step in enumerate(steps):
            if run.cost.crashes < self.faults.allowed.crashes:
                yield from self._crash(run.fork(), f"before {_name(step)}" if position else "at once")
            if isinstance(step, StartVcpus):
                yield from self._start(run, steps[position + 1 :])
                return
            if isinstance(step, StopTransfer):
                yield from self._stop_transfer(run, steps[position + 1 :])
                return
            self._step(run, step)
        yield run

    def _step(self, run: _Run, step: Step) -> None:
        match step:
            case WriteRecord():
                before, after = run.disk.cell, step.record.cell
                if before is not after:
                    run.ops.append(Op("wrote", after))
                    if self.faults.check_cells and (before, after) not in MOVES:
                        run.ops.append(
                            Op("violation", f"{before.name} becomes {after.name}, a move that does not exist")
                        )
                run.disk = step.record
            case SendFrame():
                run.ops.append(Op("send", step.statement))
            case DestroyVm():
                self._destroy(run)
            case KeepLastStatement():
                run.kept = True
            case Reply():
                run.reply = step
            case _:
                raise AssertionError(step)

    def _destroy(self, run: _Run) -> None:
        if self.faults.check_cells and run.disk.cell is not DESTROYS_IN[self.side]:
            run.ops.append(Op("violation", f"the {self.side.word}'s VM is destroyed in {run.disk.cell.name}"))
        if run.vm == Vm.RUNNING:
            run.ops.append(Op("violation", f"the running guest on the {self.side.word} is killed"))
        if run.vm != Vm.GONE:
            run.ops.append(Op("destroy"))
        run.vm = Vm.GONE

    def _start(self, run: _Run, rest: tuple[Step, ...]) -> Iterator[_Run]:
        """The start succeeds, is refused, or the VM dies before or just after it; crashes lie between."""
        allowed = self.faults.allowed
        if run.vm == Vm.GONE:
            yield from self._after(run, rest, VmDied())
            return
        provable = run.vm == Vm.STOPPED or not self.faults.refusals_are_proven
        if run.cost.refusals < allowed.refusals and provable:
            refused = run.fork()
            refused.cost = refused.cost.plus(REFUSAL)
            refused.notes.append("its VM refuses to start")
            yield from self._after(refused, rest, StartRefused())
        if run.cost.deaths < allowed.deaths:
            dead = run.fork()
            dead.cost, dead.vm = dead.cost.plus(DEATH), Vm.GONE
            dead.notes.append("its VM dies before it starts")
            yield from self._after(dead, rest, VmDied())
        if self.faults.check_cells and run.disk.cell not in STARTS_IN[self.side]:
            run.ops.append(Op("violation", f"the {self.side.word} starts the guest in {run.disk.cell.name}"))
        run.vm = Vm.RUNNING
        run.ops.append(Op("run"))
        if run.cost.deaths < allowed.deaths:
            dead = run.fork()
            dead.cost, dead.vm = dead.cost.plus(DEATH), Vm.GONE
            dead.ops.append(Op("died"))
            dead.notes.append("its VM dies just after it started")
            yield from self._after(dead, rest, VmDied())
        yield from self._after(run, rest, StartSucceeded())

    def _after(self, run: _Run, rest: tuple[Step, ...], event: RightEvent) -> Iterator[_Run]:
        if run.cost.crashes < self.faults.allowed.crashes:
            yield from self._crash(run.fork(), "before it knows how the start went")
            if run.vm == Vm.RUNNING and self.side is Side.DESTINATION:
                paused = run.fork()
                paused.vm = Vm.PAUSED
                yield from self._crash(paused, "before it knows how the start went, and its VM pauses")
        for step in rest:
            self._step(run, step)
        yield from self._feed(run, event)

    def _stop_transfer(self, run: _Run, rest: tuple[Step, ...]) -> Iterator[_Run]:
        if self.side is Side.SOURCE and run.flow == Flow.SWITCHING:
            late = run.fork()
            late.flow = Flow.DONE
            late.notes.append("too late: its VM had handed everything over")
            for one in self._carry_out(late, rest):
                yield from self._feed(one, MemoryComplete())
            run.flow = Flow.RESUMED
            run.notes.append("its VM goes on by itself")
            if run.vm != Vm.GONE:
                run.vm = Vm.RUNNING
                run.ops.append(Op("run"))
            run.ops.append(Op("cut"))
            run.party, _ = self.faults.handle(run.party, ChannelLost())
        elif run.flow == Flow.ON:
            run.flow = Flow.BROKEN
            run.ops.append(Op("cut"))
            run.party = replace(run.party, channel=Channel.DOWN)
        yield from self._carry_out(run, rest)

    def _crash(self, run: _Run, when: str) -> Iterator[_Run]:
        run.cost = run.cost.plus(CRASH)
        run.notes.append(f"its shim crashes {when} and is started again")
        run.ops.append(Op("crash"))
        run.reply = None
        heard = run.party.channel is Channel.HEARD
        run.party = restored_party(run.disk, next_ask=CURRENT + 1)
        event = Restarted(run.vm != Vm.GONE, run.vm == Vm.RUNNING, _TRANSFER[self.side, run.flow])
        for one in self._feed(run, event):
            if self.faults.channel_survives_crash:
                again = one.fork()
                again.notes.append("the channel has survived")
                yield from self._feed(again, ChannelUp())
                if heard:
                    noted = one.fork()
                    noted.notes.append("the channel has survived, and it is noted that the peer was heard")
                    yield from self._feed(noted, ChannelUp(heard=True))
            yield one

    def crash(self, local: Local, flow: int) -> list[Outcome]:
        """Between two events."""
        asked_before = _question(local.party)
        return [
            self._outcome(run, asked_before)
            for run in self._crash(_Run(local, flow), "while nothing is going on")
        ]

    def _outcome(self, run: _Run, asked_before: int) -> Outcome:
        asked_now = _question(run.party)
        forgets = asked_now != asked_before and asked_before != 0
        ops = tuple(_canonical_op(op, self.side, asked_now) for op in run.ops)
        local = Local(canonical(run.party), canonical_record(run.disk), run.vm, run.kept)
        return Outcome(local, run.flow, ops, run.cost, tuple(run.notes), run.reply, forgets)


def _question(party: Party) -> int:
    """The number that an answer must carry to count for the pending call, as the source sees it; 0: none."""
    return party.pending.ask_number if party.pending else 0


def canonical_record(record: Record) -> Record:
    return replace(record, cancelled=False, reason="", handover=b"", peer_handover=b"")


def canonical(party: Party) -> Party:
    pending = party.pending
    if pending is not None and pending.ask_number:
        pending = replace(pending, ask_number=CURRENT)
    return replace(
        party, record=canonical_record(party.record), pending=pending, next_ask=CURRENT + 1, peer=None
    )


def _canonical_op(op: Op, side: Side, asked_now: int) -> Op:
    if op.kind != "send":
        return op
    statement = op.what
    assert isinstance(statement, Statement)
    return Op("send", canonical_frame(statement, side, asked_now))


def canonical_frame(statement: Statement, side: Side, asked_now: int) -> Statement:
    """Numbers become CURRENT or STALE; answers that the source is not waiting for become none."""
    number = 0
    if statement.ask is not Ask.NOTHING:
        current = side is Side.DESTINATION or statement.ask_number == asked_now
        number = CURRENT if current else STALE
    answers = CURRENT if side is Side.DESTINATION and statement.answers == CURRENT else 0
    return Statement(statement.cell, statement.ask, number, answers)


def stale_frame(statement: Statement) -> Statement:
    """The same frame once the source asks something else."""
    number = (
        STALE if statement.side is Side.SOURCE and statement.ask is not Ask.NOTHING else statement.ask_number
    )
    return replace(statement, ask_number=number, answers=0)


def _name(step: Step) -> str:
    match step:
        case WriteRecord():
            return f"it has written {step.record.cell.name}"
        case SendFrame():
            return f"it has sent {step.statement.cell.name}"
        case StartVcpus():
            return "it starts the guest"
        case DestroyVm():
            return "it destroys its VM"
        case StopTransfer():
            return "it stops the transfer"
        case KeepLastStatement():
            return "it keeps its last statement"
        case Reply():
            return "it replies"


__all__ = [
    "CURRENT",
    "STALE",
    "CallMade",
    "ChannelUp",
    "Cost",
    "Faults",
    "Flow",
    "FrameRead",
    "Local",
    "Op",
    "Outcome",
    "Shim",
    "Vm",
    "canonical",
    "canonical_frame",
    "first_local",
    "stale_frame",
]
