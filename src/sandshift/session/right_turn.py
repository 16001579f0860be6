"""One turn of one side: an event goes in, and the party and its steps are built up from it.

What source and destination do alike is here: writing, sending, asking, starting, replying. Steps come out in the
order in which they were called for, and that is the order in which the shell carries them out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sandshift.errors import SandshiftError
from sandshift.session import right_words
from sandshift.session.right_licence import grant
from sandshift.session.right_model import (
    Channel,
    DestroyVm,
    KeepLastStatement,
    Party,
    Pending,
    Refusal,
    Reply,
    SendFrame,
    StartVcpus,
    Step,
    StopTransfer,
    WriteRecord,
    current_statement,
)
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Event, Side, State, advance


class Turn:
    """Mutable while one event is handled, and never outside."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.steps: list[Step] = []
        self.owes = 0
        """Number of the peer's question that this turn handles: the next frame answers it."""

    # What is so ------------------------------------------------------------------------------------------------

    @property
    def cell(self) -> Cell:
        return self.party.record.cell

    @property
    def state(self) -> State:
        return self.party.record.state

    def pending(self, *calls: Call) -> bool:
        """Whether one of `calls` is being served."""
        return self.party.pending is not None and self.party.pending.call in calls

    @property
    def may_send(self) -> bool:
        """Nobody but shims reads and writes on the channel any more (right-to-run.md, section 4)."""
        if self.party.side is Side.SOURCE:
            return self.party.channel is not Channel.DOWN and self.party.record.complete
        return self.party.channel is Channel.HEARD

    # Writing ---------------------------------------------------------------------------------------------------

    def write(self, **changes: Any) -> None:
        """A durable record. Two with nothing sent or done between them are one (rule 1)."""
        record = replace(self.party.record, **changes)
        if record == self.party.record:
            return
        self.party = replace(self.party, record=record)
        if self.steps and isinstance(self.steps[-1], WriteRecord):
            self.steps.pop()
        self.steps.append(WriteRecord(record))

    def move(self, event: Event, **changes: Any) -> None:
        """A durable move of the session state, with what else changes."""
        self.write(state=advance(self.state, event), **changes)

    # Talking ---------------------------------------------------------------------------------------------------

    def send(self, ask: Ask = Ask.NOTHING, number: int = 0) -> int:
        """The own cell, as a frame, if anything may be sent. Returns the number of the question in it, else 0."""
        if not self.may_send:
            return 0
        if ask is not Ask.NOTHING and not number:
            number = self.party.next_ask
            self.party = replace(self.party, next_ask=number + 1)
        said = current_statement(self.party)
        self.steps.append(
            SendFrame(replace(said, ask=ask, ask_number=number, answers=self.owes)),
        )
        self.owes = 0
        return number

    def answer(self, statement: Statement) -> None:
        """Any question not served by a rule is answered with the own cell."""
        if statement.ask is not Ask.NOTHING:
            self.send()

    def ask(self, ask: Ask) -> None:
        """Ask the peer, and let the pending call wait for what comes; without a channel it fails at once."""
        pending = self._served()
        if self.party.channel is Channel.DOWN:
            self.fail(right_words.no_answer(self.party, pending.call))
            return
        number = self.send(ask)
        self.party = replace(self.party, pending=replace(pending, ask=ask, ask_number=number))

    def repeat(self, otherwise: Ask = Ask.NOTHING) -> None:
        """Say the own cell again: with the question that the pending call waits on, else with `otherwise`."""
        pending = self.party.pending
        if pending is None or pending.ask is Ask.NOTHING:
            self.send(otherwise)
        elif pending.ask_number:
            self.send(pending.ask, pending.ask_number)
        else:
            self.ask(pending.ask)

    # Serving a call --------------------------------------------------------------------------------------------

    def serve(self, call: Call) -> None:
        self.party = replace(self.party, pending=Pending(call))

    def start(self) -> None:
        """Start the virtual CPUs under the record just written; the outcome is the next event."""
        pending = self._served()
        self.steps.append(StartVcpus(grant(self.party.record)))
        self.party = replace(self.party, pending=Pending(pending.call, starting=True, owes=self.owes))
        self.owes = 0

    def succeed(self) -> None:
        self._reply(None)

    def fail(self, refusal: Refusal) -> None:
        self._reply(refusal)

    def fail_with(self, error: SandshiftError) -> None:
        self._reply(Refusal(type(error), error.message))

    def cannot(self, why: str, remedy: str = "") -> None:
        """FAILED_PRECONDITION for the call that is being served."""
        self.fail(right_words.cannot(self.party, self._served().call, why, remedy))

    def finish(self) -> None:
        """What was asked is done: Finalized, or ended if it was a Cleanup."""
        if self._served().call is Call.CLEANUP:
            self.end_session()
        else:
            self.move(Event.FINALIZED)
            self.succeed()

    def end_session(self) -> None:
        """The last statement is kept before the session is no more."""
        self.steps.append(KeepLastStatement(current_statement(self.party)))
        self.move(Event.CLEANED)
        self.succeed()
        self.party = replace(self.party, channel=Channel.DOWN)

    def _reply(self, refusal: Refusal | None) -> None:
        self.steps.append(Reply(self._served().call, refusal))
        self.party = replace(self.party, pending=None)

    def _served(self) -> Pending:
        if self.party.pending is None:
            raise AssertionError("no call is being served")
        return self.party.pending

    # Acting ----------------------------------------------------------------------------------------------------

    def stop_transfer(self) -> None:
        if not any(isinstance(step, StopTransfer) for step in self.steps):
            self.steps.append(StopTransfer())

    def destroy(self) -> None:
        self.steps.append(DestroyVm())
        self.party = replace(self.party, vm_alive=False)

    def cancel_transfer(self, cell: Cell) -> None:
        """Before completion: the cell is final on disk before anything is stopped."""
        if self.state is not State.CANCELLING:
            self.move(Event.CANCEL_CALLED, cell=cell)
        self.stop_transfer()
        self.move(Event.CANCEL_DONE, cancelled=True)
