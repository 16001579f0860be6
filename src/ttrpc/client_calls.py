"""One connection as a client sees it: calls out, frames in. Pure: no sockets, no clock.

`open_call` gives a call its id and its Request in one step, so that ids go out in order; the frames to write collect in
`out`. `receive` takes frames and answers the calls that changed; what has happened stands in the call: `outcome`, and for
streams the `inbox`.

Rules that Go's servers force on us:
* A Data frame goes out only on a call that was opened as client-streaming. Go's server dies of Data on a unary call.
* The end of sending is a frame of its own, REMOTE_CLOSED|NO_DATA. Go's server refuses it on a last message.
* A message above the limit is refused here, before it has an id: on the wire it would cost the call or the connection.
* Frames for calls that have ended, for ids that were never ours, and of kinds that do not exist yet, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from ttrpc.codes import Code
from ttrpc.envelope import encode_request, request_suffix
from ttrpc.errors import ConnectionClosed, StatusError
from ttrpc.frames import (
    DATA,
    END_OF_STREAM,
    MESSAGE_BYTES_MAX,
    NO_DATA,
    OVERSIZED,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    STREAM_ID_MAX,
    Bytes,
    Frame,
    pack_header,
)
from ttrpc.inbox import Inbox, InboxLimits
from ttrpc.method import Method, Shape
from ttrpc.status import decode_error, oversized
from ttrpc.wire.ttrpc_pb2 import Response

_REQUEST_FLAGS: Final = {
    Shape.UNARY: 0,
    Shape.SERVER_STREAM: REMOTE_CLOSED,
    Shape.CLIENT_STREAM: REMOTE_OPEN,
    Shape.BIDI: REMOTE_OPEN,
}


class ClientCall:
    """One call. It is open until it has an `outcome`."""

    __slots__ = ("done", "error", "handle", "inbox", "payload", "received", "sending", "shape", "stream_id")

    def __init__(self, stream_id: int, shape: Shape, inbox: Inbox | None) -> None:
        self.stream_id = stream_id
        self.shape = shape
        self.inbox = inbox
        """What a server-streaming call has received and nobody has taken."""
        self.sending = shape is Shape.CLIENT_STREAM or shape is Shape.BIDI
        """Data frames of ours may follow."""
        self.received = False
        """At least one message has come."""
        self.done = False
        self.error: StatusError | None = None
        """Why the call failed, once `done`."""
        self.payload: Bytes = b""
        """The response of a call that has one, once `done` without an error."""
        self.handle: Any = None
        """The shell's own."""


class ClientCalls:
    """The calls of one connection."""

    def __init__(
        self,
        *,
        inbox_limits: InboxLimits | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        self._inbox_limits = inbox_limits or InboxLimits()
        self.message_bytes_max = message_bytes_max
        self.out: list[bytes] = []
        """What is to be written, in order; the shell empties it."""
        self.open: dict[int, ClientCall] = {}
        self.next_stream_id = 1
        self.closed: ConnectionClosed | None = None
        self.overfull: set[ClientCall] = set()
        """Calls whose inbox is above its limits: the shell stops reading, and calls `give_up` when patience ends."""

    def open_call(
        self,
        method: Method[Any, Any],
        payload: bytes,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | Sequence[str]] | None = None,
    ) -> ClientCall:
        """Open a call; a client-streaming one has no payload yet.

        Raises:
            ConnectionClosed: the connection has ended, or has used up its stream ids: make another.
            StatusError: RESOURCE_EXHAUSTED, the request is above the limit. No id was used.
        """
        if self.closed is not None:
            raise ConnectionClosed(self.closed.message)
        stream_id = self.next_stream_id
        if stream_id > STREAM_ID_MAX:
            raise ConnectionClosed("the connection has used up its stream ids: connect again")
        suffix = b"" if timeout_s is None and not metadata else request_suffix(timeout_s, metadata)
        data = encode_request(method.prefix, payload, suffix)
        length = len(data)
        if length > self.message_bytes_max:
            raise oversized(length, self.message_bytes_max)
        shape = method.shape
        inbox = Inbox(self._inbox_limits) if shape.server_streams else None
        call = ClientCall(stream_id, shape, inbox)
        self.next_stream_id = stream_id + 2
        self.open[stream_id] = call
        self.out.append(pack_header(length, stream_id, REQUEST, _REQUEST_FLAGS[shape]))
        self.out.append(data)
        return call

    def send(self, call: ClientCall, message: bytes) -> None:
        """One more message of a client-streaming call. Ignored when the call has ended.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, the message is above the limit; FAILED_PRECONDITION, this call sends
                nothing (more). Nothing was sent.
        """
        if call.done:
            return
        if not call.sending:
            raise StatusError(Code.FAILED_PRECONDITION, "sending on this call has ended")
        length = len(message)
        if length > self.message_bytes_max:
            raise oversized(length, self.message_bytes_max)
        self.out.append(pack_header(length, call.stream_id, DATA, 0))
        self.out.append(message)

    def end_sending(self, call: ClientCall) -> None:
        """Say that nothing more comes. Calling it again, or after the call's end, does nothing."""
        if call.sending and not call.done:
            self.out.append(pack_header(0, call.stream_id, DATA, END_OF_STREAM))
        call.sending = False

    def forget(self, call: ClientCall, error: StatusError) -> None:
        """End a call on our side: cancelled, too late, not read. ttrpc has no frame to tell the server."""
        if not call.done:
            self._end(call, error)
            if call.inbox is not None:
                call.inbox.clear()

    def give_up(self, call: ClientCall) -> None:
        """Patience with the reader of this stream has ended."""
        self.forget(call, StatusError(Code.RESOURCE_EXHAUSTED, "the stream was not read: its buffer is full"))

    def receive(self, frames: list[Frame]) -> list[ClientCall]:
        """Take frames as they came; the calls that changed, in order, one possibly more than once."""
        changed: list[ClientCall] = []
        open_calls = self.open
        for stream_id, kind, flags, data in frames:
            call = open_calls.get(stream_id)
            if call is None:
                continue
            if kind == RESPONSE:
                self._response(call, data)
            elif kind == DATA:
                self._data(call, flags, data)
            elif kind == RESPONSE | OVERSIZED or kind == DATA | OVERSIZED:
                self._end(call, oversized(int.from_bytes(data), self.message_bytes_max))
            else:
                continue
            # A burst on one stream is one change: it is read as a whole.
            if not changed or changed[-1] is not call:
                changed.append(call)
        return changed

    def _response(self, call: ClientCall, data: Bytes) -> None:
        try:
            response = Response.FromString(data)  # type: ignore[arg-type]  # takes any buffer
        except DecodeError as error:
            self._end(call, StatusError(Code.INTERNAL, f"the response cannot be read: {error}"))
            return
        if response.HasField("status") and response.status.code:
            self._end(call, decode_error(response.status))
            return
        payload = response.payload
        if call.inbox is None:
            call.payload = payload
        elif payload or not call.received:
            # A server that has this method as unary: its one response is the stream's one message.
            call.inbox.put(payload)
        self._end(call, None)

    def _data(self, call: ClientCall, flags: int, data: Bytes) -> None:
        inbox = call.inbox
        if inbox is None:
            self._end(call, StatusError(Code.INTERNAL, "the server streams where one response was expected"))
            return
        if data or not flags & NO_DATA:
            call.received = True
            if inbox.put(data):
                self.overfull.add(call)
        if flags & REMOTE_CLOSED:
            self._end(call, None)

    def _end(self, call: ClientCall, error: StatusError | None) -> None:
        call.done = True
        call.error = error
        self.open.pop(call.stream_id, None)
        self.overfull.discard(call)
        if call.inbox is not None:
            call.inbox.ended = True

    def relieve(self, call: ClientCall) -> None:
        """After taking from an inbox that was overfull: reading may go on once `overfull` is empty."""
        if call.inbox is None or not call.inbox.overfull:
            self.overfull.discard(call)

    def close(self, reason: ConnectionClosed) -> list[ClientCall]:
        """The connection has ended: every open call ends with it. Those calls."""
        if self.closed is None:
            self.closed = reason
        calls = list(self.open.values())
        for call in calls:
            self._end(call, ConnectionClosed(self.closed.message))
        return calls
