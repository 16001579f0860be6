"""ttrpc.client_calls: what every frame may do to a call, without a socket."""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import Code, ConnectionClosed, InboxLimits, Method, Shape, StatusError
from ttrpc.client_calls import ClientCall, ClientCalls
from ttrpc.frames import (
    DATA,
    END_OF_STREAM,
    OVERSIZED,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    STREAM_ID_MAX,
    FrameReader,
)
from ttrpc.wire.ttrpc_pb2 import Request, Response, Status

METHODS = {shape: Method("s", "M", shape, BytesValue, BytesValue) for shape in Shape}


def written(calls: ClientCalls) -> list[tuple[int, int, int, bytes]]:
    frames = FrameReader().feed(b"".join(calls.out))
    calls.out.clear()
    return [(stream, kind, flags, bytes(data)) for stream, kind, flags, data in frames]


def opened(shape: Shape, **options: object) -> tuple[ClientCalls, ClientCall]:
    calls = ClientCalls(**options)  # type: ignore[arg-type]
    call = calls.open_call(METHODS[shape], b"")
    calls.out.clear()
    return calls, call


def failure(code: Code, message: str = "") -> bytes:
    return Response(status=Status(code=code, message=message)).SerializeToString()


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        (Shape.UNARY, 0),
        (Shape.SERVER_STREAM, REMOTE_CLOSED),
        (Shape.CLIENT_STREAM, REMOTE_OPEN),
        (Shape.BIDI, REMOTE_OPEN),
    ],
)
def test_requests_have_gos_flags_and_odd_growing_ids(shape: Shape, flags: int) -> None:
    calls = ClientCalls()
    for _ in range(3):
        calls.open_call(METHODS[shape], b"p", 1.5, {"k": "v"})
    frames = written(calls)
    assert [frame[:3] for frame in frames] == [(stream, REQUEST, flags) for stream in (1, 3, 5)]
    sent = Request.FromString(frames[0][3])
    assert (sent.service, sent.method, sent.payload, sent.timeout_nano) == ("s", "M", b"p", 1_500_000_000)


@pytest.mark.parametrize("shape", [Shape.UNARY, Shape.SERVER_STREAM])
def test_a_call_that_does_not_stream_never_sends_data_nor_a_close_because_gos_server_dies_of_it(
    shape: Shape,
) -> None:
    calls, call = opened(shape)
    with pytest.raises(StatusError, match="FAILED_PRECONDITION"):
        calls.send(call, b"x")
    calls.end_sending(call)
    assert calls.out == []


def test_the_end_of_sending_is_a_frame_of_its_own_and_is_sent_once() -> None:
    calls, call = opened(Shape.CLIENT_STREAM)
    calls.send(call, b"last")
    calls.end_sending(call)
    calls.end_sending(call)
    assert written(calls) == [(1, DATA, 0, b"last"), (1, DATA, END_OF_STREAM, b"")]
    with pytest.raises(StatusError, match="sending on this call has ended"):
        calls.send(call, b"more")


def test_nothing_is_sent_on_a_call_that_has_ended() -> None:
    calls, call = opened(Shape.BIDI)
    calls.receive([(1, RESPONSE, 0, failure(Code.ABORTED))])
    calls.send(call, b"x")
    calls.end_sending(call)
    assert calls.out == []


def test_a_message_above_the_limit_is_refused_before_it_has_an_id() -> None:
    calls = ClientCalls(message_bytes_max=20)
    with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED"):
        calls.open_call(METHODS[Shape.UNARY], bytes(20))
    call = calls.open_call(METHODS[Shape.BIDI], b"")
    assert call.stream_id == 1
    with pytest.raises(StatusError, match="message length 21 exceed maximum message size of 20"):
        calls.send(call, bytes(21))
    assert not call.done


@pytest.mark.parametrize(
    "data",
    [
        b"",
        Response(status=Status(code=0)).SerializeToString(),
        Response(status=Status(message="fine")).SerializeToString(),
    ],
)
def test_a_response_without_an_error_is_success(data: bytes) -> None:
    calls, call = opened(Shape.UNARY)
    assert calls.receive([(1, RESPONSE, 0x77, data)]) == [call]
    assert (call.done, call.error, call.payload, calls.open) == (True, None, b"", {})


def test_the_status_counts_even_beside_a_payload() -> None:
    calls, call = opened(Shape.UNARY)
    calls.receive(
        [(1, RESPONSE, 0, Response(status=Status(code=5, message="no"), payload=b"x").SerializeToString())]
    )
    assert call.error is not None
    assert (call.error.code, call.error.message) == (Code.NOT_FOUND, "no")


def test_a_response_that_cannot_be_read_ends_its_call_alone() -> None:
    calls, call = opened(Shape.UNARY)
    other = calls.open_call(METHODS[Shape.UNARY], b"")
    calls.receive([(1, RESPONSE, 0, b"\xff")])
    assert call.error is not None
    assert (call.error.code, other.done) == (Code.INTERNAL, False)


def test_what_is_not_of_an_open_call_is_ignored() -> None:
    calls, call = opened(Shape.UNARY)
    strangers = [
        (2, RESPONSE, 0, b""),
        (0, DATA, 0, b""),
        (99, DATA, 0, b""),
        (1, 9, 0, b""),
        (1, REQUEST, 0, b""),
    ]
    assert calls.receive(strangers) == []
    assert not call.done
    assert calls.receive([(1, RESPONSE, 0, b""), (1, RESPONSE, 0, failure(Code.ABORTED))]) == [call]
    assert call.error is None


def test_data_on_a_unary_call_ends_it() -> None:
    calls, call = opened(Shape.UNARY)
    calls.receive([(1, DATA, 0, b"x")])
    assert call.error is not None
    assert call.error.message == "the server streams where one response was expected"


@pytest.mark.parametrize(
    ("frames", "messages"),
    [
        ([(1, DATA, 0, b"a"), (1, DATA, END_OF_STREAM, b"")], [b"a"]),
        ([(1, DATA, 0, b""), (1, DATA, END_OF_STREAM, b"")], [b""]),
        ([(1, DATA, REMOTE_CLOSED, b"a")], [b"a"]),
        ([(1, DATA, REMOTE_CLOSED, b"")], [b""]),
        ([(1, DATA, 0, b"a"), (1, RESPONSE, 0, b"")], [b"a"]),
        ([(1, RESPONSE, 0, Response(payload=b"only").SerializeToString())], [b"only"]),
        ([(1, RESPONSE, 0, b"")], [b""]),
    ],
)
def test_the_ways_a_stream_can_end_well(
    frames: list[tuple[int, int, int, bytes]], messages: list[bytes]
) -> None:
    calls, call = opened(Shape.SERVER_STREAM)
    calls.receive(frames)
    assert call.inbox is not None
    assert (list(call.inbox.messages), call.done, call.error, call.inbox.ended) == (
        messages,
        True,
        None,
        True,
    )


def test_an_error_ends_a_stream_and_keeps_what_came_before() -> None:
    calls, call = opened(Shape.BIDI)
    calls.receive([(1, DATA, 0, b"a"), (1, RESPONSE, 0, failure(Code.ABORTED, "x")), (1, DATA, 0, b"late")])
    assert call.inbox is not None
    assert call.error is not None
    assert (list(call.inbox.messages), call.error.message) == ([b"a"], "x")


@pytest.mark.parametrize("kind", [RESPONSE | OVERSIZED, DATA | OVERSIZED])
def test_an_oversized_frame_ends_its_call_alone(kind: int) -> None:
    calls, call = opened(Shape.SERVER_STREAM)
    other = calls.open_call(METHODS[Shape.UNARY], b"")
    calls.receive([(1, kind, 0, (4194305).to_bytes(4))])
    assert call.error is not None
    assert (call.error.code, other.done) == (Code.RESOURCE_EXHAUSTED, False)


def test_a_forgotten_call_keeps_nothing_and_hears_nothing() -> None:
    calls, call = opened(Shape.SERVER_STREAM)
    calls.receive([(1, DATA, 0, b"a")])
    calls.forget(call, StatusError(Code.CANCELLED, "by me"))
    calls.forget(call, StatusError(Code.ABORTED, "again"))
    assert calls.receive([(1, DATA, 0, b"b"), (1, DATA, END_OF_STREAM, b"")]) == []
    assert call.inbox is not None
    assert call.error is not None
    assert (list(call.inbox.messages), call.error.message, calls.open) == ([], "by me", {})


def test_an_unread_stream_is_given_up_alone() -> None:
    calls, call = opened(Shape.SERVER_STREAM, inbox_limits=InboxLimits(bytes_max=4))
    other = calls.open_call(METHODS[Shape.SERVER_STREAM], b"")
    calls.receive([(1, DATA, 0, b"12345"), (3, DATA, 0, b"1234")])
    assert calls.overfull == {call}
    calls.give_up(call)
    assert call.error is not None
    assert (calls.overfull, call.error.code, other.done) == (set(), Code.RESOURCE_EXHAUSTED, False)


def test_the_end_of_the_connection_ends_every_call_and_refuses_new_ones() -> None:
    calls, call = opened(Shape.UNARY)
    assert calls.close(ConnectionClosed("gone")) == [call]
    assert calls.close(ConnectionClosed("again")) == []
    assert isinstance(call.error, ConnectionClosed)
    with pytest.raises(ConnectionClosed, match="gone"):
        calls.open_call(METHODS[Shape.UNARY], b"")


def test_the_last_id_is_used_and_then_another_connection_is_needed() -> None:
    calls = ClientCalls()
    calls.next_stream_id = STREAM_ID_MAX
    assert calls.open_call(METHODS[Shape.UNARY], b"").stream_id == 0xFFFFFFFF
    with pytest.raises(ConnectionClosed, match="used up its stream ids"):
        calls.open_call(METHODS[Shape.UNARY], b"")


FRAMES = st.lists(
    st.tuples(
        st.integers(0, 10),
        st.sampled_from([0, REQUEST, RESPONSE, DATA, 9, RESPONSE | OVERSIZED, DATA | OVERSIZED]),
        st.integers(0, 7),
        st.sampled_from([b"", failure(Code.ABORTED)]) | st.binary(min_size=4, max_size=6),
    )
)


@given(FRAMES)
def test_any_frames_leave_a_client_that_can_still_be_used(frames: list[tuple[int, int, int, bytes]]) -> None:
    calls = ClientCalls(inbox_limits=InboxLimits(messages_max=2))
    mine = [calls.open_call(METHODS[shape], b"") for shape in Shape]
    calls.receive(frames)
    for call in mine:
        assert call.done is (call.stream_id not in calls.open)
    assert calls.overfull <= set(calls.open.values())
    last = calls.open_call(METHODS[Shape.UNARY], b"")
    calls.receive([(last.stream_id, RESPONSE, 0, Response(payload=b"ok").SerializeToString())])
    assert (last.error, last.payload) == (None, b"ok")
