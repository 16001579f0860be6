"""ttrpc.status, ttrpc.errors and ttrpc.codes: what an exception becomes, and what never leaves the server."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import Code, ConnectionClosed, StatusError
from ttrpc.frames import MESSAGE_BYTES_MAX
from ttrpc.status import UNEXPLAINED, decode_error, encode_error, oversized, status_of
from ttrpc.wire.ttrpc_pb2 import Response


def sent(error: StatusError) -> StatusError:
    response = Response.FromString(encode_error(error))
    assert response.payload == b""
    return decode_error(response.status)


@given(st.integers(-(2**31), 2**31 - 1).filter(bool), st.text())
def test_every_number_and_text_comes_back_with_what_is_not_utf8_replaced(number: int, message: str) -> None:
    got = sent(StatusError(number, message))
    assert (got.number, got.code) == (number, Code.of(number))
    assert got.message == message.encode("utf-8", "replace").decode()


def test_all_of_grpcs_codes_are_named() -> None:
    assert [code.value for code in Code] == list(range(17))
    assert (Code.of(5), Code.of(42), Code.of(-1)) == (Code.NOT_FOUND, Code.UNKNOWN, Code.UNKNOWN)


def test_numbers_beyond_an_int32_are_taken_as_go_shows_them() -> None:
    assert sent(StatusError(4294967295)).number == -1
    assert sent(StatusError(1 << 32)).code is Code.UNKNOWN


def test_ok_is_no_error() -> None:
    with pytest.raises(ValueError, match="OK is not an error"):
        StatusError(Code.OK)


def test_details_are_packed_once() -> None:
    packed = Any()
    packed.Pack(StringValue(value="already"))
    got = sent(StatusError(Code.ABORTED, "x", [StringValue(value="plain"), packed]))
    texts = []
    for detail in got.details:
        text = StringValue()
        assert isinstance(detail, Any)
        assert detail.Unpack(text)
        texts.append(text.value)
    assert texts == ["plain", "already"]


def test_a_message_is_cut_and_details_are_left_out_where_they_would_not_fit() -> None:
    got = sent(StatusError(Code.ABORTED, "x" * 10**6, [BytesValue(value=bytes(MESSAGE_BYTES_MAX))]))
    assert (len(got.message), got.message[-1], got.details) == (16384, "…", ())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StatusError(Code.NOT_FOUND, "no x"), Code.NOT_FOUND, "no x"),
        (asyncio.CancelledError(), Code.CANCELLED, "the call was cancelled"),
        (TimeoutError("secret"), Code.DEADLINE_EXCEEDED, "context deadline exceeded"),
        (NotImplementedError("secret"), Code.UNIMPLEMENTED, "this is not implemented"),
        (ValueError("secret"), Code.UNKNOWN, UNEXPLAINED),
        (PermissionError("/secret"), Code.UNKNOWN, UNEXPLAINED),
    ],
)
def test_only_what_was_meant_for_the_client_reaches_it(
    error: BaseException, code: Code, message: str
) -> None:
    status = status_of(error, "/s/m")
    assert (status.code, status.message) == (code, message)


def test_a_bugs_traceback_is_logged_with_the_method(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "ttrpc"):
        status_of(ValueError("secret"), "/s/m")
    (record,) = caplog.records
    assert record.getMessage() == "/s/m: the handler raised ValueError"
    assert record.exc_info is not None


def test_errors_say_what_they_are_and_survive_copies() -> None:
    error = StatusError(Code.ABORTED, "x")
    assert (str(error), str(StatusError(42)), str(StatusError(42, "y"))) == (
        "ABORTED: x",
        "code 42",
        "code 42: y",
    )
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message) == (Code.ABORTED, "x")
    closed = copy.copy(ConnectionClosed("gone"))
    assert (type(closed), closed.code, closed.message) == (ConnectionClosed, Code.UNAVAILABLE, "gone")


def test_oversized_has_gos_words() -> None:
    assert (
        oversized(4194305, 4194304).message == "message length 4194305 exceed maximum message size of 4194304"
    )
