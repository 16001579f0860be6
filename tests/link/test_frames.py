"""Frames and the reader that finds its way back."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from sandshift.link.frames import HEADER_BYTES, MAGIC, PAYLOAD_BYTES_MAX, Frame, FrameReader, Kind, padding

frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    epoch=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    arrived=st.integers(0, 2**64 - 1),
    taken=st.integers(0, 2**64 - 1),
    payload=st.binary(max_size=400) | st.just(MAGIC * 20),
)


def test_a_frame_looks_as_documented():
    frame = Frame(Kind.DATA, epoch=0x0102030405060708, offset=9, arrived=11, taken=10, payload=b"hello")
    assert frame.encode().hex() == (
        "f5534c1a0200000001020304050607080000000000000009000000000000000b000000000000000a000000053610a6863a2a64e768656c6c6f"
    )
    assert HEADER_BYTES == 52


@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 300), min_size=1))
def test_frames_cut_anywhere_come_out_whole(sent: list[Frame], cuts: list[int]):
    reader = FrameReader()
    wire = b"".join(frame.encode() for frame in sent)
    got: list[Frame] = []
    turn = 0
    while wire:
        size = cuts[turn % len(cuts)]
        got += reader.feed(wire[:size])
        wire = wire[size:]
        turn += 1
    assert got == sent
    assert reader.held_bytes == reader.skipped_bytes == 0


@given(frames, frames, st.binary(max_size=200), st.integers(0, 100), st.integers(1, 300))
def test_what_follows_a_loss_and_padding_is_found(
    torn: Frame, after: Frame, noise: bytes, keep: int, lost: int
):
    reader = FrameReader()
    wire = torn.encode()
    damaged = wire[:keep] + wire[keep + lost :] + noise
    found = reader.feed(damaged + padding(PAYLOAD_BYTES_MAX) + after.encode())
    assert found[-1] == after
    assert reader.held_bytes < HEADER_BYTES


def test_a_torn_frame_swallows_no_good_frame_that_it_claimed():
    reader = FrameReader()
    torn = Frame(Kind.DATA, 1, payload=bytes(1000)).encode()[:500]
    hello = Frame(Kind.HELLO, 2)
    assert reader.feed(torn + hello.encode()) == []
    assert reader.feed(padding(1000)) == [hello]


def test_a_flipped_bit_in_the_payload_loses_the_frame_and_no_other():
    reader = FrameReader()
    first, second = Frame(Kind.DATA, 1, payload=b"abc"), Frame(Kind.DATA, 1, offset=3, payload=b"def")
    damaged = bytearray(first.encode())
    damaged[-1] ^= 1
    assert reader.feed(bytes(damaged) + second.encode()) == [second]
    assert reader.skipped_bytes == len(damaged)


def test_garbage_without_end_is_not_kept():
    reader = FrameReader()
    tracemalloc.start()
    for _ in range(200):
        assert reader.feed(b"\xf5\x53" * 32768) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert reader.held_bytes < HEADER_BYTES


def test_a_length_beyond_the_bound_is_not_waited_for():
    reader = FrameReader()
    too_long = Frame(Kind.DATA, 1, payload=bytes(PAYLOAD_BYTES_MAX + 1)).encode()
    after = Frame(Kind.ACK, 1)
    assert reader.feed(too_long[:HEADER_BYTES] + after.encode()) == [after]
