"""Whole conversations, both ways, cut anywhere: what comes out does not depend on the pieces that came in."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import Method, Shape, StatusError
from ttrpc.client_calls import ClientCalls
from ttrpc.frames import (
    DATA,
    END_OF_STREAM,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    FrameReader,
    encode,
)
from ttrpc.method import Route, Routes
from ttrpc.server_calls import Event, ServerCall, ServerCalls
from ttrpc.wire.ttrpc_pb2 import Request, Response, Status

METHODS = {shape: Method("s", shape.name, shape, BytesValue, BytesValue) for shape in Shape}
CUTS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
LIMIT = 60
HELLO = BytesValue(value=b"hello").SerializeToString()


def request(shape: Shape, payload: bytes = HELLO) -> bytes:
    return Request(service="s", method=shape.name, payload=payload).SerializeToString()


ASKED = b"".join(
    (
        encode(1, REQUEST, 0, request(Shape.UNARY)),
        encode(3, REQUEST, REMOTE_CLOSED, request(Shape.SERVER_STREAM)),
        encode(5, REQUEST, REMOTE_OPEN, request(Shape.CLIENT_STREAM, b"")),
        encode(7, REQUEST, REMOTE_OPEN, request(Shape.BIDI, b"")),
        encode(5, DATA, 0, HELLO),
        encode(7, DATA, 0, b""),
        encode(9, REQUEST, 0, bytes(LIMIT + 1)),
        encode(7, 77, 0, b"unknown"),
        encode(5, DATA, END_OF_STREAM, b""),
        encode(4, REQUEST, 0, b"even"),
        encode(7, DATA, REMOTE_CLOSED, HELLO),
        encode(7, DATA, 0, b"late"),
        encode(11, REQUEST, 0, request(Shape.UNARY, b"\xff")),
        encode(99, DATA, 0, b"never opened"),
    )
)
ANSWERED = b"".join(
    (
        encode(1, RESPONSE, 0, Response(payload=HELLO).SerializeToString()),
        encode(3, DATA, 0, HELLO),
        encode(3, DATA, 0, b""),
        encode(2, DATA, 0, b"strange"),
        encode(7, DATA, 0, HELLO),
        encode(3, DATA, END_OF_STREAM, b""),
        encode(5, RESPONSE, 0, bytes(LIMIT + 1)),
        encode(1, RESPONSE, 0, b"again"),
        encode(7, RESPONSE, 0, Response(status=Status(code=10, message="no")).SerializeToString()),
    )
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    out = []
    turn = 0
    while data:
        out.append(data[: cuts[turn % len(cuts)]])
        data = data[len(out[-1]) :]
        turn += 1
    return out


def served(parts: list[bytes]) -> bytes:
    """What a server writes that answers each call as soon as it has all of it."""
    routes = Routes()
    for method in METHODS.values():
        routes.add(Route(method, print))
    calls, reader = ServerCalls(routes, message_bytes_max=LIMIT), FrameReader(LIMIT)
    for part in parts:
        for frame in reader.feed(part):
            for event, call in calls.receive([frame]):
                if event is not Event.ENDED:
                    answer(call)
    return b"".join(calls.out)


def answer(call: ServerCall) -> None:
    if call.inbox is None:
        messages = [HELLO]
    elif call.inbox.ended:
        messages = [bytes(call.inbox.take()) for _ in range(len(call.inbox.messages))]
    else:
        return
    if not call.route.method.shape.server_streams:
        call.respond(messages[-1])
        return
    for message in messages:
        call.send(message)
    call.finish()


def heard(parts: list[bytes]) -> list[tuple[bool, str, bytes, list[bytes]]]:
    """What a client with one call of each shape makes of it."""
    calls, reader = ClientCalls(message_bytes_max=LIMIT), FrameReader(LIMIT)
    mine = [calls.open_call(METHODS[shape], b"") for shape in Shape]
    for part in parts:
        calls.receive(reader.feed(part))

    def error(raised: StatusError | None) -> str:
        return "" if raised is None else str(raised)

    return [
        (
            call.done,
            error(call.error),
            bytes(call.payload),
            [bytes(message) for message in call.inbox.messages] if call.inbox else [],
        )
        for call in mine
    ]


WHOLE_SERVED = served([ASKED])
WHOLE_HEARD = heard([ANSWERED])


@given(CUTS)
def test_a_server_answers_the_same(cuts: list[int]) -> None:
    assert served(pieces(ASKED, cuts)) == WHOLE_SERVED


@given(CUTS)
def test_a_client_hears_the_same(cuts: list[int]) -> None:
    assert heard(pieces(ANSWERED, cuts)) == WHOLE_HEARD


def test_byte_by_byte_is_no_different() -> None:
    assert served(pieces(ASKED, [1])) == WHOLE_SERVED
    assert heard(pieces(ANSWERED, [1])) == WHOLE_HEARD


def test_the_conversations_are_what_they_are_meant_to_be() -> None:
    kinds = [(stream, kind) for stream, kind, _, _ in FrameReader().feed(WHOLE_SERVED)]
    assert kinds == [
        (1, RESPONSE),
        (3, DATA),
        (3, DATA),
        (9, RESPONSE),
        (5, RESPONSE),
        (4, RESPONSE),
        (7, DATA),
        (7, DATA),
        (7, DATA),
        (11, RESPONSE),
        (99, RESPONSE),
    ]
    assert [(done, error.partition(":")[0]) for done, error, _, _ in WHOLE_HEARD] == [
        (True, ""),
        (True, ""),
        (True, "RESOURCE_EXHAUSTED"),
        (True, "ABORTED"),
    ]
