"""The right to run: which of the two shims of a session may run the guest. docs/explanation/right-to-run.md.

`handle(party, event) -> (party, steps)` is the whole protocol. It decides and does nothing; a shell carries the steps
out and feeds what comes of them. The rules are tables in right_source.py and right_destination.py; `./run explore`
searches this very function.

The shell's part
----------------
One event at a time: take one, `handle` it, carry out **all** its steps **in order**, then take the next. Keep the
party that `handle` returned. A call that is being served (`party.pending`) does not hold up the other events; other
calls wait until it has been replied to (a repeat of the same call may join it). `handle` raises AssertionError if a
second call is fed.

Before every `handle`, look whether the VM process lives; if it does not and `party.vm_alive`, feed `VmDied` first.

======================  ==============================================================================================
step                    what to do with it
======================  ==============================================================================================
WriteRecord             append it to the journal and fsync; only then go on
SendFrame               `Seal.sign`, `statement.frame`, write to the channel. If that fails: go on with the next step,
                        and feed `ChannelLost` when this event is done
StopTransfer            if the VM process has a transfer going on: cancel it and wait until it says so; close the
                        channel then, and feed `ChannelLost`. If it turns out to have completed: leave the channel
                        and feed `MemoryComplete`. If there is none, nothing
StartVcpus              `machine.run_vcpus(step.licence)`, then feed, before any other event: `StartSucceeded`; or
                        `StartRefused` if the VM lives, refused, and says that it has not run since it was loaded;
                        or `VmDied` if it is dead. If none of the three is certain, the step has failed
DestroyVm               `machine.destroy()`. It must be gone before the next step
KeepLastStatement       `Seal.sign`, write to the host's directory of last statements (session id, key id), fsync
Reply                   answer the call: `refusal` None is success, else raise `refusal.error()`
======================  ==============================================================================================

**A step that fails** (disk full, VM that does not answer) ends the turn: carry out none of the rest, answer the call
that is being served with the error, throw the party away, and go on as after a restart: `restored_party` of the last
record that reached the disk, `Restarted`, then `ChannelUp` if the channel still stands. The same after a crash; a
record whose fsync was not confirmed is read from disk, never assumed.

**Feeding.** `ChannelUp` once this process has its copy of the socket; `heard` if an earlier process of this side has
noted that it had read a frame of the peer in this session: a destination that was killed after that need not hear
another before it writes. Read the channel only after the own VM process
reported *completed* (before, the bytes are its own); `Seal.open_frame` each frame, and on an error close the channel and
feed `ChannelLost`. While `party.pending` asks something (`ask` is not NOTHING) run a timer of `handover_frame_s`, started
anew when `ask_number` changes; when it passes, feed `AskTimedOut`. `MemoryComplete` on the source carries the
serialized HandoverRecord, which must be complete by then. If checksum verification is on, the destination's shell
compares the digest in the first handover record that it sees (frame or receipt) with its own memory **before** it
feeds that statement, and feeds `TransferFailed` first if they differ.

Close the channel when `party.channel` has become DOWN: Cleanup does that; until then it stays open, also after Cancel.

**Calls.** Feed `CallMade` for RESUME, STOP, CANCEL and CLEANUP when no other is pending; `handle` refuses by the table
in states.py. For every other call the shell asks `states.check(call, party.record.standing, ...)` itself, and reports
the moves before completion with `Moved`. A receipt is opened by `Seal.open_receipt` first. After `Cleanup` the party
is Idle; keep it, it remembers what may be repeated. A status call looks at the VM like every handler, then gives
`Seal.sign(current_statement(party))`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol, assert_never

from sandshift.errors import SandshiftError
from sandshift.session import right_destination, right_source, right_words
from sandshift.session.right_licence import Licence, licence_of
from sandshift.session.right_model import (
    AskTimedOut,
    CallMade,
    Channel,
    ChannelLost,
    ChannelUp,
    DestroyVm,
    ForceResume,
    FrameRead,
    KeepLastStatement,
    MemoryComplete,
    Moved,
    Party,
    Pending,
    Record,
    Refusal,
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
    TransferFailed,
    VmDied,
    WriteRecord,
    current_statement,
    new_party,
    restored_party,
)
from sandshift.session.right_turn import Turn
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Event, Outcome, Side, State, check

__all__ = [
    "AskTimedOut",
    "CallMade",
    "Channel",
    "ChannelLost",
    "ChannelUp",
    "DestroyVm",
    "ForceResume",
    "FrameRead",
    "KeepLastStatement",
    "Licence",
    "MemoryComplete",
    "Moved",
    "Party",
    "Pending",
    "Record",
    "Refusal",
    "Reply",
    "Restarted",
    "RightEvent",
    "SendFrame",
    "StartRefused",
    "StartSucceeded",
    "StartVcpus",
    "Step",
    "StopTransfer",
    "Transfer",
    "TransferFailed",
    "VmDied",
    "WriteRecord",
    "current_statement",
    "handle",
    "licence_of",
    "new_party",
    "restored_party",
]

FORCEABLE: Final = frozenset((Cell.RELEASED, Cell.READY, Cell.RETURNING))
"""Cells in which the protocol may have to wait for ever, and an operator may not."""


def handle(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """What `event` makes of `party`, and what is to be done, in this order."""
    turn = Turn(party)
    match event:
        case CallMade():
            _call(turn, event)
        case FrameRead():
            _frame(turn, event.statement)
        case ChannelUp():
            turn.party = replace(turn.party, channel=Channel.HEARD if event.heard else Channel.UP)
            if turn.party.side is Side.SOURCE and turn.state is not State.IDLE:
                turn.send()
        case ChannelLost():
            turn.party = replace(turn.party, channel=Channel.DOWN)
            _no_answer(turn)
        case AskTimedOut():
            _no_answer(turn)
        case Moved():
            turn.move(event.event)
        case MemoryComplete():
            _rules(turn).memory_complete(turn, event.handover)
        case TransferFailed():
            _rules(turn).transfer_failed(turn, event.reason)
        case VmDied():
            _vm_died(turn, event.reason)
        case StartSucceeded() | StartRefused():
            _start_over(turn, event)
        case Restarted():
            _restarted(turn, event)
        case ForceResume():
            _force(turn, event.expected)
        case _:
            assert_never(event)
    return turn.party, tuple(turn.steps)


class _Rules(Protocol):
    """What right_source and right_destination have in common."""

    @property
    def LOOKED_AT(self) -> frozenset[tuple[Call, Cell, Cell]]: ...  # noqa: N802 - a constant of the modules
    def see(self, turn: Turn, statement: Statement) -> None: ...
    def call(self, turn: Turn, which: Call) -> None: ...
    def before_completion(self, turn: Turn, which: Call) -> None: ...
    def memory_complete(self, turn: Turn, handover: bytes) -> None: ...
    def transfer_failed(self, turn: Turn, reason: str) -> None: ...
    def vm_died(self, turn: Turn, reason: str) -> None: ...
    def started(self, turn: Turn) -> None: ...
    def start_refused(self, turn: Turn) -> None: ...
    def restarted(self, turn: Turn, event: Restarted) -> None: ...


def _rules(turn: Turn) -> _Rules:
    return right_source if turn.party.side is Side.SOURCE else right_destination


def _call(turn: Turn, made: CallMade) -> None:
    if turn.party.pending is not None:
        raise AssertionError(f"{made.call.value} while {turn.party.pending.call.value} is being served")
    rules = _rules(turn)
    standing = turn.party.record.standing
    turn.serve(made.call)
    try:
        outcome = check(made.call, standing, standing.session_id)
    except SandshiftError as refused:
        turn.fail_with(refused)
        return
    if outcome is Outcome.NO_EFFECT:
        turn.succeed()
        return
    if standing.state is State.FINALIZED:
        turn.finish()
        return
    rules.before_completion(turn, made.call)
    if made.receipt is not None:
        turn.party = replace(turn.party, peer=made.receipt)
        if (made.call, turn.cell, made.receipt.cell) in rules.LOOKED_AT:
            rules.see(turn, made.receipt)
    if turn.party.pending == Pending(made.call):
        rules.call(turn, made.call)


def _frame(turn: Turn, statement: Statement) -> None:
    if turn.state is State.IDLE:
        return
    turn.party = replace(turn.party, peer=statement, channel=Channel.HEARD)
    if statement.ask is not Ask.NOTHING:
        turn.owes = statement.ask_number
    _rules(turn).see(turn, statement)


def _no_answer(turn: Turn) -> None:
    """Rule 8: it ends the waiting call and changes no cell."""
    pending = turn.party.pending
    if pending is not None and not pending.starting:
        turn.fail(right_words.no_answer(turn.party, pending.call))


def _vm_died(turn: Turn, reason: str) -> None:
    turn.party = replace(turn.party, vm_alive=False)
    pending = turn.party.pending
    if pending is not None and pending.starting:
        turn.owes = pending.owes
        turn.serve(pending.call)
    if turn.state is not State.IDLE:
        _rules(turn).vm_died(turn, reason)


def _start_over(turn: Turn, event: StartSucceeded | StartRefused) -> None:
    pending = turn.party.pending
    if pending is None or not pending.starting:
        raise AssertionError("the virtual CPUs were not being started")
    turn.owes = pending.owes
    turn.serve(pending.call)
    if isinstance(event, StartSucceeded):
        _rules(turn).started(turn)
    else:
        _rules(turn).start_refused(turn)
        turn.fail(right_words.start_refused(turn.party, pending.call, event.reason))


def _restarted(turn: Turn, event: Restarted) -> None:
    if turn.state is State.TRANSFERRING and event.transfer is Transfer.NONE:
        # Killed between the record and the act: it was never begun.
        event = replace(event, transfer=Transfer.FAILED)
    if turn.state is State.SOCKET_READY and event.transfer is Transfer.COMPLETED:
        # Killed between the socket and the first byte, which a destination awaits from then on: all came meanwhile.
        turn.move(Event.TRANSFER_STARTED)
    if turn.state is not State.IDLE:
        _rules(turn).restarted(turn, event)
    if not event.vm_alive:
        _vm_died(turn, "found dead after a restart of the shim")


def _force(turn: Turn, expected: Cell) -> None:
    """Section 9. Written down as FORCED before anything is done."""
    if turn.party.pending is not None:
        raise AssertionError(f"ForceResume while {turn.party.pending.call.value} is being served")
    turn.serve(Call.RESUME)
    party = turn.party
    if party.cell is not expected:
        turn.cannot(f"the operator decided on {expected.name}", "look again")
    elif party.cell not in FORCEABLE or turn.state not in _DECIDABLE:
        turn.cannot(f"{right_words.MEANS[party.cell]}: nothing is to be forced")
    elif not party.vm_alive:
        turn.cannot(f"the {party.side.word}'s VM is dead: there is nothing to run")
    else:
        cell = Cell.KEPT if party.side is Side.SOURCE else Cell.STARTING
        peer_handover = party.record.peer_handover or (party.peer.handover if party.peer else b"")
        turn.write(cell=cell, forced=True, peer_handover=peer_handover)
        turn.start()


_DECIDABLE: Final = (State.TRANSFER_COMPLETED, State.CANCELLED, State.FAILED)
