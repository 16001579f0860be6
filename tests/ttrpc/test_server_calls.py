"""ttrpc.server_calls: what every frame may do to a call, without a socket."""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import Code, InboxLimits, Method, Shape, StatusError
from ttrpc.frames import (
    DATA,
    END_OF_STREAM,
    NO_DATA,
    OVERSIZED,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    STREAM_ID_MAX,
    FrameReader,
)
from ttrpc.method import Route, Routes
from ttrpc.server_calls import Event, ServerCalls
from ttrpc.wire.ttrpc_pb2 import Request, Response

NAMES = {Shape.UNARY: "U", Shape.SERVER_STREAM: "S", Shape.CLIENT_STREAM: "C", Shape.BIDI: "B"}


def server(**options: object) -> ServerCalls:
    routes = Routes()
    for shape, name in NAMES.items():
        routes.add(Route(Method("s", name, shape, BytesValue, BytesValue), print))
    return ServerCalls(routes, **options)  # type: ignore[arg-type]


def request(name: str, value: bytes | None = b"v", **fields: object) -> bytes:
    payload = b"" if value is None else BytesValue(value=value).SerializeToString()
    return Request(**{"service": "s", "method": name, "payload": payload, **fields}).SerializeToString()  # type: ignore[arg-type]


def written(calls: ServerCalls) -> list[tuple[int, int, int, bytes]]:
    frames = FrameReader().feed(b"".join(calls.out))
    calls.out.clear()
    return [(stream, kind, flags, bytes(data)) for stream, kind, flags, data in frames]


def answers(calls: ServerCalls) -> list[tuple[int, Code, str]]:
    """Error responses, and nothing else."""
    errors = []
    for stream, kind, flags, data in written(calls):
        assert (kind, flags) == (RESPONSE, 0)
        status = Response.FromString(data).status
        errors.append((stream, Code.of(status.code), status.message))
    return errors


def test_a_unary_call_is_started_with_its_message_and_answered_once() -> None:
    calls = server()
    ((event, call),) = calls.receive([(1, REQUEST, 0, request("U"))])
    assert (event, call.request, call.timeout_s) == (Event.STARTED, BytesValue(value=b"v"), None)
    call.respond(b"payload")
    call.respond(b"again")
    call.fail(StatusError(Code.ABORTED))
    assert written(calls) == [(1, RESPONSE, 0, Response(payload=b"payload").SerializeToString())]
    assert calls.open == {}


def test_an_empty_response_is_a_frame_without_bytes() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, 0, request("U", None))])
    call.respond(b"")
    assert written(calls) == [(1, RESPONSE, 0, b"")]


def test_a_stream_ends_with_remote_closed_and_no_data_and_not_with_a_response() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_CLOSED, request("S"))])
    call.send(b"one")
    call.send(b"")
    call.finish()
    call.finish()
    call.send(b"late")
    assert written(calls) == [(1, DATA, 0, b"one"), (1, DATA, 0, b""), (1, DATA, END_OF_STREAM, b"")]


@pytest.mark.parametrize(
    "last", [[(1, DATA, 0, b"z"), (1, DATA, END_OF_STREAM, b"")], [(1, DATA, REMOTE_CLOSED, b"z")]]
)
def test_a_client_may_end_with_a_frame_of_its_own_or_with_its_last_message(
    last: list[tuple[int, int, int, bytes]],
) -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_OPEN, request("C", None))])
    assert call.inbox is not None
    calls.receive([(1, DATA, 0, b"a"), (1, DATA, 0, b""), *last])
    assert (list(call.inbox.messages), call.inbox.ended) == ([b"a", b"", b"z"], True)


def test_remote_closed_without_no_data_is_an_empty_last_message() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_OPEN, request("C", None))])
    calls.receive([(1, DATA, REMOTE_CLOSED, b"")])
    assert call.inbox is not None
    assert (list(call.inbox.messages), call.inbox.ended) == ([b""], True)


def test_a_payload_in_the_request_of_a_client_stream_is_its_first_message() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_OPEN | NO_DATA, request("B"))])
    assert call.inbox is not None
    assert (list(call.inbox.messages), call.inbox.ended) == (
        [BytesValue(value=b"v").SerializeToString()],
        False,
    )


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (0, "StreamID must be odd for client initiated streams"),
        (8, "StreamID must be odd for client initiated streams"),
        (5, "StreamID cannot be re-used and must increment"),
        (3, "StreamID cannot be re-used and must increment"),
    ],
)
def test_ids_are_odd_and_grow_and_the_offender_is_told(stream: int, message: str) -> None:
    calls = server()
    calls.receive([(5, REQUEST, 0, request("U"))])
    assert calls.receive([(stream, REQUEST, 0, request("U"))]) == []
    assert answers(calls) == [(stream, Code.INVALID_ARGUMENT, message)]
    assert list(calls.open) == [5]


def test_gaps_are_fine_and_after_the_last_id_nothing_more_is() -> None:
    calls = server()
    assert len(calls.receive([(7, REQUEST, 0, request("U")), (STREAM_ID_MAX, REQUEST, 0, request("U"))])) == 2
    assert calls.receive([(1, REQUEST, 0, request("U"))]) == []


def test_data_for_a_finished_stream_is_dropped_without_a_word() -> None:
    calls = server()
    ((_, call),) = calls.receive([(5, REQUEST, REMOTE_OPEN, request("C", None))])
    call.fail(StatusError(Code.ABORTED, "enough"))
    assert answers(calls) == [(5, Code.ABORTED, "enough")]
    late = [
        (5, DATA, 0, b"x"),
        (5, DATA, END_OF_STREAM, b""),
        (3, DATA, 0, b"x"),
        (5, DATA | OVERSIZED, 0, bytes(4)),
    ]
    assert calls.receive(late) == []
    assert calls.out == []


def test_data_for_a_stream_that_was_never_opened_is_answered() -> None:
    calls = server()
    calls.receive([(7, DATA, 0, b"x"), (2, DATA, 0, b"x"), (9, DATA | OVERSIZED, 0, bytes(4))])
    assert answers(calls) == [
        (7, Code.INVALID_ARGUMENT, "StreamID is no longer active"),
        (2, Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams"),
        (9, Code.INVALID_ARGUMENT, "StreamID is no longer active"),
    ]


@pytest.mark.parametrize("name", ["U", "S"])
@pytest.mark.parametrize(
    "frame", [(1, DATA, 0, b"x"), (1, DATA, END_OF_STREAM, b""), (1, DATA | OVERSIZED, 0, bytes(4))]
)
def test_data_on_a_call_that_has_said_everything_harms_nothing(
    name: str, frame: tuple[int, int, int, bytes]
) -> None:
    calls = server()
    calls.receive([(1, REQUEST, 0, request(name))])
    assert calls.receive([frame]) == []
    assert (calls.out, list(calls.open)) == ([], [1])


def test_data_after_the_end_of_a_stream_ends_the_call() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_OPEN, request("C", None))])
    events = calls.receive([(1, DATA, END_OF_STREAM, b""), (1, DATA, 0, b"x")])
    assert events == [(Event.READABLE, call), (Event.ENDED, call)]
    assert answers(calls) == [(1, Code.INVALID_ARGUMENT, "data after the end of the stream")]


@pytest.mark.parametrize("kind", [0, RESPONSE, 4, 255, RESPONSE | OVERSIZED, 4 | OVERSIZED])
def test_kinds_that_are_not_a_clients_are_ignored(kind: int) -> None:
    calls = server()
    calls.receive([(1, REQUEST, REMOTE_OPEN, request("C", None))])
    assert calls.receive([(1, kind, 0, bytes(4)), (3, kind, 0, bytes(4))]) == []
    assert (calls.out, list(calls.open), calls.last_stream_id) == ([], [1], 1)


def test_an_oversized_request_costs_its_call_and_its_id() -> None:
    calls = server()
    calls.receive([(1, REQUEST | OVERSIZED, 0, (4194305).to_bytes(4)), (1, REQUEST, 0, request("U"))])
    assert answers(calls) == [
        (1, Code.RESOURCE_EXHAUSTED, "message length 4194305 exceed maximum message size of 4194304"),
        (1, Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment"),
    ]
    calls.receive([(2, REQUEST | OVERSIZED, 0, (4194305).to_bytes(4))])
    assert answers(calls)[0][1] is Code.INVALID_ARGUMENT


def test_an_oversized_message_ends_its_stream() -> None:
    calls = server()
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_OPEN, request("B", None))])
    assert calls.receive([(1, DATA | OVERSIZED, 0, (4194305).to_bytes(4))]) == [(Event.ENDED, call)]
    assert answers(calls)[0][1] is Code.RESOURCE_EXHAUSTED


def test_a_response_above_the_limit_fails_its_own_call() -> None:
    calls = server()
    (_, exact), (_, over) = calls.receive([(1, REQUEST, 0, request("U")), (3, REQUEST, 0, request("U"))])
    over.respond(bytes(4194304 - 4))
    assert answers(calls) == [
        (3, Code.RESOURCE_EXHAUSTED, "message length 4194305 exceed maximum message size of 4194304")
    ]
    exact.respond(bytes(4194304 - 5))
    assert len(written(calls)[0][3]) == 4194304


def test_a_stream_message_above_the_limit_is_refused_and_the_stream_lives_on() -> None:
    calls = server(message_bytes_max=100)
    ((_, call),) = calls.receive([(1, REQUEST, REMOTE_CLOSED, request("S"))])
    with pytest.raises(StatusError, match="message length 101 exceed"):
        call.send(bytes(101))
    call.send(bytes(100))
    assert len(written(calls)) == 1


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"\xff", Code.INVALID_ARGUMENT, "unmarshal request error"),
        (request("U", service="x"), Code.UNIMPLEMENTED, "service x"),
        (request("X"), Code.UNIMPLEMENTED, "method X"),
        (request("U", timeout_nano=-1), Code.DEADLINE_EXCEEDED, "context deadline exceeded"),
        (
            Request(service="s", method="U", payload=b"\xff").SerializeToString(),
            Code.INTERNAL,
            "ttrpc: error unmarshalling payload",
        ),
    ],
)
def test_bad_requests_are_answered_as_go_answers_them(data: bytes, code: Code, message: str) -> None:
    calls = server()
    assert calls.receive([(1, REQUEST, 0, data)]) == []
    ((stream, got, text),) = answers(calls)
    assert (stream, got) == (1, code)
    assert text.startswith(message)


def test_above_the_limit_of_calls_the_next_is_refused_until_one_ends() -> None:
    calls = server(calls_max=2)
    (_, first), _ = calls.receive([(1, REQUEST, 0, request("U")), (3, REQUEST, 0, request("U"))])
    assert calls.receive([(5, REQUEST, 0, request("U"))]) == []
    assert answers(calls)[0][:2] == (5, Code.RESOURCE_EXHAUSTED)
    first.respond(b"")
    assert len(calls.receive([(7, REQUEST, 0, request("U"))])) == 1


def test_while_draining_new_calls_are_unavailable() -> None:
    calls = server()
    calls.draining = True
    calls.receive([(1, REQUEST, 0, request("U"))])
    assert answers(calls) == [(1, Code.UNAVAILABLE, "the server is shutting down")]


def test_metadata_and_deadline_come_with_the_call() -> None:
    calls = server()
    data = request("U", timeout_nano=1_500_000_000, metadata=[{"key": "K", "value": "v"}])
    ((_, call),) = calls.receive([(1, REQUEST, 0, data)])
    assert (call.timeout_s, call.metadata["k"]) == (1.5, "v")


def test_an_unread_inbox_is_overfull_until_it_is_read_or_given_up() -> None:
    calls = server(inbox_limits=InboxLimits(messages_max=2))
    (_, read), (_, unread) = calls.receive([(n, REQUEST, REMOTE_OPEN, request("C", None)) for n in (1, 3)])
    calls.receive([(n, DATA, 0, b"x") for n in (1, 3) for _ in range(3)])
    assert calls.overfull == {read, unread}
    assert read.inbox is not None
    read.inbox.take()
    calls.relieve(read)
    assert calls.overfull == {read, unread}
    read.inbox.take()
    calls.relieve(read)
    assert calls.overfull == {unread}
    calls.give_up(unread)
    assert calls.overfull == set()
    assert answers(calls) == [(3, Code.RESOURCE_EXHAUSTED, "the handler does not read what the client sends")]


FRAMES = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from([0, REQUEST, RESPONSE, DATA, 9, REQUEST | OVERSIZED, DATA | OVERSIZED]),
        st.integers(0, 7),
        st.sampled_from([request(name) for name in "USCBX"]) | st.binary(min_size=4, max_size=6),
    )
)


@given(FRAMES)
def test_any_frames_leave_a_server_that_can_still_be_used(frames: list[tuple[int, int, int, bytes]]) -> None:
    calls = server(calls_max=3, inbox_limits=InboxLimits(messages_max=2))
    for event, call in calls.receive(frames):
        assert event is not Event.STARTED or call.stream_id & 1
    assert len(calls.open) <= 3
    assert calls.overfull <= set(calls.open.values())
    for call in list(calls.open.values()):
        call.fail(StatusError(Code.ABORTED))
    calls.out.clear()
    ((_, last),) = calls.receive([(101, REQUEST, 0, request("U"))])
    last.respond(b"ok")
    assert written(calls) == [(101, RESPONSE, 0, Response(payload=b"ok").SerializeToString())]
