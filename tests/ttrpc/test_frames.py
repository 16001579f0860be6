"""ttrpc.frames: bytes cut anywhere are the same frames."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttrpc import frames
from ttrpc.errors import ProtocolViolation
from ttrpc.frames import DATA, END_OF_STREAM, OVERSIZED, REQUEST, RESPONSE, FrameReader, encode

FRAMES = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=80)),
    max_size=12,
)


def reader(limit: int = 50, cut: int = 200, buffer: int = 24) -> FrameReader:
    """Small enough that every bound is met."""
    return FrameReader(limit, cut, buffer)


def expected(sent: list[tuple[int, int, int, bytes]], limit: int = 50) -> list[tuple[int, int, int, bytes]]:
    return [
        (stream, kind, flags, data)
        if len(data) <= limit
        else (stream, kind | OVERSIZED, flags, len(data).to_bytes(4))
        for stream, kind, flags, data in sent
    ]


def test_the_examples_in_the_docstrings_are_right() -> None:
    assert doctest.testmod(frames).failed == 0


def test_a_header_is_ten_bytes_big_endian_as_go_writes_it() -> None:
    frame = encode(0x01020304, REQUEST, 0x02, b"abc")
    assert frame == b"\x00\x00\x00\x03\x01\x02\x03\x04\x01\x02abc"
    assert FrameReader().feed(frame) == [(0x01020304, REQUEST, 2, b"abc")]


@given(FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_a_byte_stream_cut_anywhere_gives_the_same_frames(
    sent: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(encode(*frame) for frame in sent)
    got, receiving, turn = [], reader(), 0
    while data:
        size = cuts[turn % len(cuts)]
        got += receiving.feed(data[:size])
        data = data[size:]
        turn += 1
    assert got == expected(sent)


@given(FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_reading_into_space_gives_the_same_frames_as_feeding(
    sent: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(encode(*frame) for frame in sent)
    got, receiving, turn = [], reader(), 0
    while data:
        space = receiving.space()
        size = min(len(space), cuts[turn % len(cuts)], len(data))
        assert size > 0
        space[:size] = data[:size]
        got += receiving.filled(size)
        data = data[size:]
        turn += 1
    assert got == expected(sent)


def test_the_limit_itself_passes_and_one_more_is_dropped_without_harm_to_what_follows() -> None:
    receiving = FrameReader()
    at, over = bytes(frames.MESSAGE_BYTES_MAX), bytes(frames.MESSAGE_BYTES_MAX + 1)
    got = receiving.feed(
        encode(1, DATA, 0, at) + encode(3, RESPONSE, 0, over) + encode(5, DATA, END_OF_STREAM, b"")
    )
    assert [(stream, kind, len(data)) for stream, kind, _, data in got] == [
        (1, DATA, 4194304),
        (3, RESPONSE | OVERSIZED, 4),
        (5, DATA, 0),
    ]
    assert int.from_bytes(got[1][3]) == 4194305


def test_an_oversized_frame_shows_up_only_when_all_of_it_has_come() -> None:
    receiving = reader()
    frame = encode(1, DATA, 0, bytes(60))
    assert receiving.feed(frame[:-1]) == []
    assert receiving.feed(frame[-1:]) == [(1, DATA | OVERSIZED, 0, (60).to_bytes(4))]


def test_dropping_keeps_no_more_than_a_buffer() -> None:
    receiving = reader(limit=50, cut=10**6, buffer=24)
    receiving.feed(encode(1, DATA, 0, bytes(10**6))[:-1])
    assert len(receiving._buffer) <= 24 + 60


def test_the_buffer_grows_for_one_large_frame_and_shrinks_again() -> None:
    receiving = reader(limit=1000, cut=2000, buffer=24)
    assert receiving.feed(encode(1, DATA, 0, bytes(900))) == [(1, DATA, 0, bytes(900))]
    receiving.feed(encode(3, DATA, 0, b""))
    assert len(receiving.space()) == 24


def test_above_the_hard_bound_the_header_alone_is_a_violation() -> None:
    receiving = FrameReader()
    with pytest.raises(
        ProtocolViolation, match="a frame of 67108865 bytes: at most 67108864 are even skipped"
    ):
        receiving.feed(encode(1, DATA, 0, b"")[:0] + (67108865).to_bytes(4) + bytes(6))


def test_at_the_hard_bound_it_is_skipped() -> None:
    receiving = reader()
    receiving.feed(encode(1, DATA, 0, bytes(200)))
    with pytest.raises(ProtocolViolation):
        receiving.feed(encode(1, DATA, 0, bytes(201)))
