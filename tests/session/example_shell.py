"""A shell in sixty lines: two shims, their journals, VMs and channel, all in memory and synchronous.

It carries steps out as session/right.py tells a shell to, and is the example to write a real one by.
"""

from __future__ import annotations

from collections import deque

from sandshift.session import right
from sandshift.session.right import (
    DestroyVm,
    KeepLastStatement,
    Reply,
    SendFrame,
    StartVcpus,
    StopTransfer,
    WriteRecord,
)
from sandshift.session.statement import FrameReader, Seal, frame
from sandshift.session.states import Call, Side, State


class Shim:
    def __init__(self, side: Side, seal: Seal) -> None:
        self.side, self.seal, self.reader = side, seal, FrameReader()
        self.peer: Shim | None = None
        self.vm, self.starts = (
            ("running" if side is Side.SOURCE else "stopped"),
            deque(),
        )  # outcomes of starts to come
        self.party = right.new_party(side, seal.session_id, State.TRANSFERRING)
        self.journal = [self.party.record]
        self.replies: list[Reply] = []
        self.kept: list[bytes] = []
        self.done: list[str] = []
        self.feed(right.ChannelUp())

    def feed(self, event: right.RightEvent) -> None:
        """One event, all its steps in order; then what has come of them."""
        if self.vm == "dead" and self.party.vm_alive and not isinstance(event, right.VmDied):
            self.feed(right.VmDied())
        self.party, steps = right.handle(self.party, event)
        after: list[right.RightEvent] = []
        for step in steps:
            self.done.append(type(step).__name__)
            match step:
                case WriteRecord():
                    self.journal.append(step.record)
                case SendFrame():
                    if self.peer is None:
                        after.append(right.ChannelLost())
                    else:
                        self.peer.unread += frame(self.seal.sign(step.statement))
                case StartVcpus():
                    after.append(self._start())
                case StopTransfer():
                    pass
                case DestroyVm():
                    self.vm = "dead"
                case KeepLastStatement():
                    self.kept.append(self.seal.sign(step.statement))
                case Reply():
                    self.replies.append(step)
        for outcome in after:
            self.feed(outcome)

    unread = b""

    def _start(self) -> right.RightEvent:
        outcome = self.starts.popleft() if self.starts else right.StartSucceeded()
        self.vm = {right.StartSucceeded: "running", right.VmDied: "dead"}.get(type(outcome), self.vm)
        return outcome

    def read(self) -> bool:
        data, self.unread = self.unread, b""
        for one in self.reader.feed(data):
            self.feed(right.FrameRead(self.seal.open_frame(one, side=self.side.peer)))
        return bool(data)

    @property
    def receipt(self) -> bytes:
        return self.seal.sign(right.current_statement(self.party))

    def call(self, call: Call, receipt: bytes | None = None) -> Reply:
        """Waits as long as anything is to be read, then no longer."""
        opened = None if receipt is None else self.seal.open_receipt(receipt, side=self.side.peer)
        self.replies.clear()
        self.feed(right.CallMade(call, opened))
        settle(self)
        if not self.replies:
            self.feed(right.AskTimedOut())
        return self.replies[-1]

    def crash(self) -> None:
        """A new process on the same journal; the channel is cut."""
        cut(self)
        self.party = right.restored_party(self.journal[-1])
        completed = right.Transfer.COMPLETED if self.journal[-1].complete else right.Transfer.GOING_ON
        self.feed(right.Restarted(self.vm != "dead", self.vm == "running", completed))


def settle(shim: Shim) -> None:
    while shim.read() or (shim.peer is not None and shim.peer.read()):
        pass


def cut(shim: Shim) -> None:
    for one in (shim, shim.peer):
        if one is not None:
            one.peer, one.unread = None, b""
            one.feed(right.ChannelLost())


def pair(*, complete: bool = True) -> tuple[Shim, Shim]:
    """Source and destination at the end of the transfer (or in its middle)."""
    seal = Seal("s-1", b"k" * 32)
    source, destination = Shim(Side.SOURCE, seal), Shim(Side.DESTINATION, seal)
    source.peer, destination.peer = destination, source
    if complete:
        source.vm = "stopped"
        destination.feed(right.MemoryComplete())
        source.feed(right.MemoryComplete(b"offsets"))
        settle(source)
    return source, destination
