"""What a handler knows about its call beside the messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from google.protobuf.message import Message

from ttrpc.aio.connection import Connection
from ttrpc.aio.peers import Peer
from ttrpc.aio.waiter import Waiter
from ttrpc.metadata import Metadata
from ttrpc.method import Method
from ttrpc.server_calls import ServerCall, decode_payload

MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class CallContext:
    """One call, for its handler."""

    __slots__ = ("_call", "_metadata", "peer")

    def __init__(self, call: ServerCall, peer: Peer | None) -> None:
        self._call = call
        self._metadata: Metadata | None = None
        self.peer = peer
        """Who calls, where the kernel knows it."""

    @property
    def method(self) -> Method[Message, Message]:
        return self._call.route.method

    @property
    def metadata(self) -> Metadata:
        """What the client sent beside the request. Go's clients send none with streams."""
        if self._metadata is None:
            self._metadata = self._call.metadata
        return self._metadata

    @property
    def timeout_s(self) -> float | None:
        """How long the client waits, counted from the arrival of the call; None is for ever. When it has passed the
        handler is cancelled."""
        return self._call.timeout_s

    @property
    def ended(self) -> bool:
        """The call has been answered, or nobody waits for an answer any more."""
        return not self._call.open


class RequestStream(AsyncIterator[MessageT_co], Generic[MessageT_co]):
    """The messages that a client streams, for its handler. Ends when the client has said that nothing more comes."""

    __slots__ = ("_call", "_connection", "waiter")

    def __init__(self, call: ServerCall, connection: Connection) -> None:
        self._call = call
        self._connection = connection
        self.waiter: Waiter | None = None

    async def __anext__(self) -> MessageT_co:
        inbox = self._call.inbox
        assert inbox is not None
        while not inbox.messages:
            if inbox.ended:
                raise StopAsyncIteration
            if self.waiter is not None:
                raise RuntimeError("the requests of a call can be read by one task at a time only")
            self.waiter = self._connection.new_waiter()
            try:
                await self.waiter
            finally:
                self.waiter = None
        was_overfull = inbox.overfull
        message = decode_payload(self._call.route.method.decode_request, inbox.take())
        if was_overfull and not inbox.overfull:
            self._connection.relieve(self._call)
        return message  # type: ignore[return-value]  # decoded by the method's own type
