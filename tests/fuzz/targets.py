"""What an input does, and what must hold whatever it does.

An input is a small program: each step is an opcode and a few bytes. Steps send frames (also cut, nested, garbled), answer
calls, read inboxes, give up, drain. Limits are so small that every one of them is met. After each step the oracles look
at everything that was written and kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

from google.protobuf.wrappers_pb2 import BytesValue

from ttrpc import (
    Code,
    ConnectionClosed,
    Method,
    ProtocolViolation,
    Shape,
    StatusError,
    client_calls,
    frames,
    inbox,
    server_calls,
)
from ttrpc.frames import DATA, HEADER_BYTES, NO_DATA, OVERSIZED, REMOTE_CLOSED, REQUEST, RESPONSE, encode
from ttrpc.inbox import InboxLimits
from ttrpc.method import Route, Routes
from ttrpc.wire.ttrpc_pb2 import Request, Response, Status

MESSAGE_MAX: Final = 64
CUT: Final = 200
BUFFER: Final = 40
CALLS_MAX: Final = 3
LIMITS: Final = InboxLimits(messages_max=2, bytes_max=30)
STEP_BYTES_MAX: Final = 600
IDS: Final = (0, 1, 3, 5, 7, 9, 11, 13, 15, 2, 4, 0xFFFFFFFF, 0x7FFFFFFF, 17, 19, 21)
KINDS: Final = (REQUEST, REQUEST, REQUEST, DATA, DATA, DATA, RESPONSE, 0, 4, 255)
SERVICE: Final = "s"

METHODS: Final = {shape: Method(SERVICE, shape.name[0], shape, BytesValue, BytesValue) for shape in Shape}

REAL: Final = SimpleNamespace(
    frames=frames, inbox=inbox, server_calls=server_calls, client_calls=client_calls
)
"""The modules under test; `planted` puts broken ones in their place."""


class Broken(AssertionError):
    """A rule does not hold."""


def must(condition: object, rule: str) -> None:
    if not condition:
        raise Broken(rule)


class Steps:
    """The bytes of an input, as a program."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def __iter__(self) -> Iterator[int]:
        while self._place < len(self._data):
            yield self.byte()

    def byte(self) -> int:
        if self._place >= len(self._data):
            return 0
        self._place += 1
        return self._data[self._place - 1]

    def take(self, count: int) -> bytes:
        data = self._data[self._place : self._place + count]
        self._place += count
        return data

    def pick(self, choices: Any) -> Any:
        return choices[self.byte() % len(choices)]


def body(steps: Steps, kind: int) -> bytes:
    """The data of a frame: something sensible for its kind, something garbled, or a length at a bound."""
    how = steps.byte() % 8
    if how == 0:
        return steps.take(steps.byte() % 24)
    if how == 1:
        return bytes(steps.pick((0, 1, MESSAGE_MAX - 1, MESSAGE_MAX, MESSAGE_MAX + 1, CUT, CUT + 1)))
    if kind == REQUEST:
        return request_body(steps)
    if kind == RESPONSE:
        return response_body(steps)
    return BytesValue(value=steps.take(steps.byte() % 20)).SerializeToString()


def request_body(steps: Steps) -> bytes:
    payload = steps.pick((b"", b"\x0a\x01v", b"\xff"))
    return Request(
        service=steps.pick((SERVICE, SERVICE, SERVICE, "x")),
        method=steps.pick(("U", "S", "C", "B", "X")),
        payload=payload,
        timeout_nano=steps.pick((0, 0, 0, 5_000_000_000, -1)),
        metadata=steps.pick(((), ({"key": "K", "value": "v"},))),
    ).SerializeToString()


def response_body(steps: Steps) -> bytes:
    status = steps.pick((None, None, Status(code=0), Status(code=5, message="no"), Status(code=-1)))
    return Response(status=status, payload=steps.pick((b"", b"\x0a\x01v", b"\xff"))).SerializeToString()


class Wire:
    """Frames on their way in: cut at will, and read twice in two ways that must agree."""

    def __init__(self, modules: SimpleNamespace) -> None:
        self.reader = modules.frames.FrameReader(MESSAGE_MAX, CUT, BUFFER)
        self._waiting = bytearray()
        self._sent: list[tuple[int, int, int, bytes]] = []
        self.dead = False

    def put(self, stream_id: int, kind: int, flags: int, data: bytes) -> None:
        self._waiting += encode(stream_id, kind, flags, data)
        if len(data) > MESSAGE_MAX:
            kind, data = kind | OVERSIZED, len(data).to_bytes(4)
        self._sent.append((stream_id, kind, flags, data))

    def deliver(self, count: int, *, by_space: bool) -> list[Any]:
        """Let the reader have so many bytes; the frames that it makes of them."""
        data = bytes(self._waiting[:count])
        del self._waiting[:count]
        got: list[Any] = []
        while data and not self.dead:
            piece = data
            try:
                if by_space:
                    space = self.reader.space()
                    must(len(space) > 0, "there is always space for more")
                    piece = data[: len(space)]
                    space[: len(piece)] = piece
                    got += self.reader.filled(len(piece))
                else:
                    got += self.reader.feed(data)
            except ProtocolViolation:
                self.dead = True
                must(
                    any(int.from_bytes(f[3]) > CUT for f in self._sent if f[1] & OVERSIZED),
                    "only above the bound is cut",
                )
            data = data[len(piece) :]
            must(
                len(self.reader._buffer) <= max(BUFFER, HEADER_BYTES + MESSAGE_MAX),
                "the reader's memory is bounded",
            )
        for frame in got:
            expected = self._sent.pop(0)
            must(tuple(frame) == expected, f"the frame that was sent came: {expected}, not {frame}")
        must(self.dead or self._waiting or not self._sent, "every frame whose bytes have come has come")
        return got


def serve(data: bytes, modules: SimpleNamespace = REAL) -> None:
    """Frames into a server's core, and answers out of it."""
    Server(modules).run(Steps(data))


class Server:
    def __init__(self, modules: SimpleNamespace) -> None:
        routes = Routes()
        for method in METHODS.values():
            routes.add(Route(method, print))
        self.wire = Wire(modules)
        self.event = modules.server_calls.Event
        self.calls = modules.server_calls.ServerCalls(
            routes, calls_max=CALLS_MAX, inbox_limits=LIMITS, message_bytes_max=MESSAGE_MAX
        )
        self.known: list[Any] = []
        self.highest = 0
        self.ended: set[int] = set()

    def run(self, steps: Steps) -> None:
        for opcode in steps:
            self.step(opcode % 16, steps)
            if self.wire.dead:
                return
        for call in list(self.calls.open.values()):
            call.fail(StatusError(Code.ABORTED, "the end"))
        self.look_at_output(set())
        must(not self.calls.open, "every call can be ended")
        must(not self.calls.overfull, "no call that has ended is waited for")

    def step(self, opcode: int, steps: Steps) -> None:
        if opcode < 7:
            kind = steps.pick(KINDS)
            self.wire.put(steps.pick(IDS), kind, steps.byte() & 7, body(steps, kind))
            if opcode == 0:
                return
            self.receive(
                self.wire.deliver(STEP_BYTES_MAX if opcode < 5 else steps.byte(), by_space=opcode % 2 == 0)
            )
            return
        if opcode == 15:
            self.calls.draining = steps.byte() % 4 == 0
            return
        if not self.known:
            return
        self.answer(opcode, steps.pick(self.known), steps)

    def receive(self, frames: list[Any]) -> None:
        for frame in frames:
            silent = self.must_be_silent(frame)
            before = set(self.calls.open)
            events = self.calls.receive([frame])
            for event, call in events:
                if event is self.event.STARTED:
                    must(call.open and frame[0] & 1 and frame[0] > self.highest, "ids are odd and grow")
                    must(
                        call.inbox is not None or call.request is not None,
                        "a call has a request or a stream of them",
                    )
                    must(
                        call.timeout_s is None or call.timeout_s > 0, "calls that are too late are not begun"
                    )
                    must(call.metadata.get("K", "v") == "v", "metadata is read")
                    self.known.append(call)
            if frame[1] & 0xFF == REQUEST and frame[0] & 1:
                self.highest = max(self.highest, frame[0])
            must(not (silent and self.calls.out), f"nothing is answered to {frame}")
            self.look_at_output({frame[0]})
            must(len(self.calls.open) <= CALLS_MAX, "open calls are bounded")
            must(before - set(self.calls.open) <= {frame[0]}, "a frame ends no call but its own")
            self.look_at_inboxes()

    def must_be_silent(self, frame: Any) -> bool:
        """Data for streams that have ended or take none, and kinds that are not a client's."""
        stream, kind = frame[0], frame[1]
        if kind & 0xFF not in (REQUEST, DATA):
            return True
        if kind & 0xFF == REQUEST or not stream & 1 or stream > self.calls.last_stream_id:
            return False
        call = self.calls.open.get(stream)
        return call is None or call.inbox is None

    def answer(self, opcode: int, call: Any, steps: Steps) -> None:
        payload = bytes(steps.pick((0, 1, 20, MESSAGE_MAX - 2, MESSAGE_MAX, MESSAGE_MAX + 1)))
        was_open = call.open
        streams = call.route.method.shape.server_streams
        if opcode in (7, 8) and not streams:
            call.respond(payload)
            must(not call.open, "a call ends by its response, also by one above the limit")
        elif opcode in (7, 8, 9) and streams:
            try:
                call.send(payload)
                must(len(payload) <= MESSAGE_MAX or not was_open, "a message above the limit is refused")
            except StatusError as error:
                must(
                    error.code is Code.RESOURCE_EXHAUSTED and len(payload) > MESSAGE_MAX, "only for its size"
                )
            must(call.open is was_open, "sending ends nothing")
        elif opcode == 10 and streams:
            call.finish()
        elif opcode == 11:
            call.fail(StatusError(steps.pick((1, 5, 42, -1)), steps.pick(("", "x" * 5, "\ud800", "y" * 400))))
            must(not call.open, "an error ends a call")
        elif opcode == 12 and call in self.calls.overfull:
            self.calls.give_up(call)
            must(not call.open and call not in self.calls.overfull, "a call that was given up is gone")
        elif opcode in (13, 14) and call.inbox is not None and call.inbox.messages:
            was_overfull = call.inbox.overfull
            call.inbox.take()
            if was_overfull or opcode == 14:
                self.calls.relieve(call)
        self.look_at_output({call.stream_id} if was_open else set())
        self.look_at_inboxes()

    def look_at_output(self, allowed: set[int]) -> None:
        """What was written is frames that every client understands, of the calls that may speak."""
        data = b"".join(self.calls.out)
        self.calls.out.clear()
        for stream, kind, flags, written in frames.FrameReader().feed(data):
            must(kind in (RESPONSE, DATA), "a server sends responses and data")
            must(stream in allowed or not allowed, "only the call in question speaks")
            if kind == RESPONSE:
                must(flags == 0, "responses have no flags")
                response = Response.FromString(bytes(written))
                must(not (response.HasField("status") and response.payload), "an error has no payload")
            else:
                must(flags in (0, REMOTE_CLOSED | NO_DATA), "data is open, or closes without a message")
                must(stream not in self.ended, "after its end a stream is silent")
                if flags:
                    self.ended.add(stream)
                    must(not written, "the end is a frame of its own")

    def look_at_inboxes(self) -> None:
        look_at_inboxes(self.calls)


def look_at_inboxes(calls: Any) -> None:
    for call in calls.open.values():
        if call.inbox is not None:
            size = sum(map(len, call.inbox.messages))
            must(call.inbox.size_bytes == size, "an inbox knows its size")
            above = size > LIMITS.bytes_max or len(call.inbox.messages) > LIMITS.messages_max
            must(
                not above or (call.inbox.overfull and call in calls.overfull),
                "an inbox above its limits stops the reading",
            )
    must(calls.overfull <= set(calls.open.values()), "only open calls stop the reading")


def ask(data: bytes, modules: SimpleNamespace = REAL) -> None:
    """Calls out of a client's core, and frames into it."""
    Client(modules).run(Steps(data))


class Client:
    def __init__(self, modules: SimpleNamespace) -> None:
        self.wire = Wire(modules)
        self.calls = modules.client_calls.ClientCalls(inbox_limits=LIMITS, message_bytes_max=MESSAGE_MAX)
        self.known: list[Any] = []
        self.sent_end: set[int] = set()

    def run(self, steps: Steps) -> None:
        for opcode in steps:
            self.step(opcode % 16, steps)
            if self.wire.dead:
                break
        open_calls = set(self.calls.open.values())
        must(set(self.calls.close(ConnectionClosed("gone"))) == open_calls, "the end ends every open call")
        must(all(call.done for call in self.known), "every call has an outcome in the end")
        must(not self.calls.overfull, "no call that has ended is waited for")

    def step(self, opcode: int, steps: Steps) -> None:
        if opcode < 4:
            self.open(steps)
        elif opcode < 10:
            kind = steps.pick(KINDS)
            self.wire.put(steps.pick(IDS), kind, steps.byte() & 7, body(steps, kind))
            if opcode > 4:
                count = STEP_BYTES_MAX if opcode < 8 else steps.byte()
                self.receive(self.wire.deliver(count, by_space=opcode % 2 == 0))
        elif opcode == 15 and steps.byte() % 8 == 0:
            self.calls.next_stream_id = max(self.calls.next_stream_id, frames.STREAM_ID_MAX)
        elif opcode == 14 and steps.byte() % 4 == 0:
            self.calls.close(ConnectionClosed("gone"))
            must(not self.calls.open, "the end ends every open call")
        elif self.known:
            self.act(opcode, steps.pick(self.known), steps)

    def open(self, steps: Steps) -> None:
        shape = steps.pick(tuple(Shape))
        payload = bytes(steps.pick((0, 3, 20, MESSAGE_MAX, 300)))
        timeout_s, metadata = steps.pick(((None, None), (1.5, None), (None, {"a": "b"})))
        before = self.calls.next_stream_id
        try:
            call = self.calls.open_call(METHODS[shape], payload, timeout_s, metadata)
        except StatusError as error:
            must(
                self.calls.next_stream_id == before and not self.calls.out,
                "a call that is refused uses no id",
            )
            closed = self.calls.closed is not None or before > frames.STREAM_ID_MAX
            must(closed is isinstance(error, ConnectionClosed), "it is refused for its reason")
            return
        self.known.append(call)
        must(call.stream_id & 1 and call.stream_id == before, "ids are odd and grow")
        self.look_at_output(call)

    def receive(self, received: list[Any]) -> None:
        for frame in received:
            before = set(self.calls.open)
            changed = self.calls.receive([frame])
            must({call.stream_id for call in changed} <= {frame[0]}, "a frame changes no call but its own")
            must(before - set(self.calls.open) <= {frame[0]}, "a frame ends no call but its own")
            for call in changed:
                must(call.done or call.inbox is not None, "only streams go on after a frame")
                if call.done and call.error is None and call.inbox is None:
                    must(frame[1] == RESPONSE, "one response ends well by a Response")
            must(not self.calls.out, "a client answers to no frame")
            look_at_inboxes(self.calls)

    def act(self, opcode: int, call: Any, steps: Steps) -> None:
        if opcode == 10:
            payload = bytes(steps.pick((0, 1, MESSAGE_MAX, MESSAGE_MAX + 1)))
            try:
                self.calls.send(call, payload)
            except StatusError as error:
                fits = len(payload) <= MESSAGE_MAX
                must(
                    error.code is (Code.FAILED_PRECONDITION if not call.sending else Code.RESOURCE_EXHAUSTED),
                    "why",
                )
                must(not (call.sending and fits), "what fits is sent")
        elif opcode == 11:
            self.calls.end_sending(call)
        elif opcode == 12:
            if steps.byte() % 2 and call in self.calls.overfull:
                self.calls.give_up(call)
            else:
                self.calls.forget(call, StatusError(Code.CANCELLED))
            must(call.done and call.stream_id not in self.calls.open, "a call that was forgotten is gone")
        elif call.inbox is not None and call.inbox.messages:
            call.inbox.take()
            self.calls.relieve(call)
        self.look_at_output(call)
        look_at_inboxes(self.calls)

    def look_at_output(self, call: Any) -> None:
        """What was written is what Go's server survives."""
        data = b"".join(self.calls.out)
        self.calls.out.clear()
        for stream, kind, flags, written in frames.FrameReader().feed(data):
            must(stream == call.stream_id, "only the call in question speaks")
            if kind == REQUEST:
                must(
                    Request.FromString(bytes(written)).method == call.shape.name[0], "the Request can be read"
                )
                continue
            must(kind == DATA and call.shape.client_streams, "data goes out on client-streaming calls only")
            must(stream not in self.sent_end, "after the end of sending nothing is sent")
            must(
                flags in (0, REMOTE_CLOSED | NO_DATA) and not (flags and written),
                "the end is a frame of its own",
            )
            if flags:
                self.sent_end.add(stream)


SEEDS: Final = (
    # A unary call and its answer; a server stream; a client stream with its end; a bidirectional one.
    bytes((1, 0, 1, 0, 2, 0, 0, 1, 0, 0, 7, 0, 1)),
    bytes((1, 0, 2, 1, 2, 0, 1, 1, 0, 0, 9, 0, 1, 10, 0, 0)),
    bytes((1, 0, 3, 2, 2, 0, 2, 0, 0, 0, 1, 3, 3, 0, 2, 3, 1, 2, 3, 1, 3, 3, 5, 1, 0)),
    bytes((1, 0, 4, 2, 2, 0, 3, 0, 0, 0, 3, 3, 4, 0, 2, 4, 9, 9, 9, 9, 13, 0, 0)),
    # Four calls at a time, of which the last is refused.
    b"".join(bytes((1, 0, number, 0, 2, 1, 0, 0, 0, 0)) for number in (1, 2, 3, 4)),
    # The client's: four calls, frames for them.
    bytes((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0)),
    bytes((0, 1, 0, 0, 5, 3, 1, 0, 2, 3, 1, 2, 3, 5, 3, 1, 5, 1, 0, 13, 0)),
    bytes((0, 0, 1, 0, 5, 6, 1, 0, 2, 3, 1)),
    b"",
)
