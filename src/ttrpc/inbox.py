"""Messages that have come in on one stream and that nobody has taken yet. Pure.

ttrpc has no flow control: frames of all calls share one connection, so a reader that stops taking has three ends to
choose from: its messages pile up, everything behind them waits, or its stream dies. `InboxLimits` is the policy, one for
both ends: an inbox that grows above its limits stops the reading of the connection for at most `patience_s`; if it has
not been read down to half by then, its stream fails with RESOURCE_EXHAUSTED and everybody else goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ttrpc.frames import Bytes


@dataclass(frozen=True, slots=True)
class InboxLimits:
    """How much of a stream is kept for a reader that does not take it, and what happens above that."""

    messages_max: int = 16384
    bytes_max: int = 4 << 20
    patience_s: float | None = 0.25
    """How long the other calls of the connection may be held up. 0: not at all. None: for as long as it takes, which is
    right for a connection that carries one stream."""


class Inbox:
    """A bounded queue of encoded messages with an end. `put` after the end is the caller's mistake."""

    __slots__ = ("_bytes_max", "_messages_max", "ended", "messages", "overfull", "size_bytes")

    def __init__(self, limits: InboxLimits) -> None:
        self._messages_max = limits.messages_max
        self._bytes_max = limits.bytes_max
        self.messages: deque[Bytes] = deque()
        self.size_bytes = 0
        self.ended = False
        """The sender has said that nothing more comes."""
        self.overfull = False
        """Above the limits, and not yet back to half of them."""

    def put(self, message: Bytes) -> bool:
        """Add a message; whether the inbox is overfull now."""
        self.messages.append(message)
        self.size_bytes += len(message)
        if self.size_bytes > self._bytes_max or len(self.messages) > self._messages_max:
            self.overfull = True
        return self.overfull

    def take(self) -> Bytes:
        """The oldest message.

        Raises:
            IndexError: there is none.
        """
        message = self.messages.popleft()
        self.size_bytes -= len(message)
        if (
            self.overfull
            and self.size_bytes * 2 <= self._bytes_max
            and len(self.messages) * 2 <= self._messages_max
        ):
            self.overfull = False
        return message

    def clear(self) -> None:
        """Forget everything: nobody will read it."""
        self.messages.clear()
        self.size_bytes = 0
        self.overfull = False
