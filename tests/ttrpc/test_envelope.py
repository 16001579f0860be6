"""ttrpc.envelope: written by hand, and the same as protobuf reads and writes it."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import envelope
from ttrpc.envelope import TIMEOUT_NANO_MAX, encode_request, request_suffix, response_head
from ttrpc.wire.ttrpc_pb2 import Request, Response

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def test_the_examples_in_the_docstrings_are_right() -> None:
    assert doctest.testmod(envelope).failed == 0


@given(
    TEXT,
    TEXT,
    st.binary(max_size=600),
    st.none() | st.floats(1e-9, 1e6),
    st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_a_request_reads_back_as_what_went_in(
    service: str, method: str, payload: bytes, timeout_s: float | None, metadata: dict[str, str]
) -> None:
    prefix = Request(service=service, method=method).SerializeToString()
    read = Request.FromString(encode_request(prefix, payload, request_suffix(timeout_s, metadata)))
    assert (read.service, read.method, read.payload) == (service, method, payload)
    assert read.timeout_nano == (0 if timeout_s is None else max(1, int(timeout_s * 1e9)))
    assert [(pair.key, pair.value) for pair in read.metadata] == [
        (key.lower(), metadata[key]) for key in metadata
    ]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 16383, 16384, 2097151, 2097152, 4194298])
def test_a_response_is_what_protobuf_writes(size: int) -> None:
    payload = bytes(size)
    assert response_head(size) + payload == Response(payload=payload).SerializeToString()


def test_an_empty_response_is_no_bytes_as_go_sends_it() -> None:
    assert response_head(0) == b""


def test_several_values_of_a_key_are_entries_in_order_with_lower_case_keys() -> None:
    read = Request.FromString(request_suffix(None, {"A-Key": ["1", "2"], "b": "3"}))
    assert [(pair.key, pair.value) for pair in read.metadata] == [("a-key", "1"), ("a-key", "2"), ("b", "3")]


@pytest.mark.parametrize(
    ("timeout_s", "nanoseconds"), [(1e-12, 1), (1.5, 1_500_000_000), (1e300, TIMEOUT_NANO_MAX)]
)
def test_a_timeout_is_never_sent_as_none_nor_above_what_fits(timeout_s: float, nanoseconds: int) -> None:
    assert Request.FromString(request_suffix(timeout_s, None)).timeout_nano == nanoseconds
