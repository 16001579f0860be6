"""Both ends of the link over a wire that loses ranges: every byte arrives once, in order, in bounded memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandshift.link.endpoint import HOST_PAYLOAD_BYTES_MAX, GuestEnd, HostEnd
from sandshift.link.frames import HEADER_BYTES, Frame, FrameReader, Kind
from sandshift.link.stream import RECEIVE_BYTES_MAX, RESEND_FIRST_S, SEND_BYTES_MAX, Stream


class Wire:
    """One direction: bytes on the way, in order; ranges of them can be swallowed."""

    def __init__(self) -> None:
        self.way = bytearray()

    def carry(self, count: int) -> bytes:
        data = bytes(self.way[:count])
        del self.way[:count]
        return data


class Pair:
    """A host end and a guest end, and the two streams' bytes as their users see them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.host, self.guest = HostEnd(epoch=7), GuestEnd()
        self.down, self.up = Wire(), Wire()
        self.host_wrote, self.host_read = bytearray(), bytearray()
        self.guest_wrote, self.guest_read = bytearray(), bytearray()

    def write_at_host(self, data: bytes) -> None:
        if self.host.stream.sending.room_bytes > 0:
            self.host.stream.sending.write(data)
            self.host_wrote += data

    def write_at_guest(self, data: bytes) -> None:
        if self.guest.stream is not None and self.guest.stream.sending.room_bytes > 0:
            self.guest.stream.sending.write(data)
            self.guest_wrote += data

    def send(self) -> None:
        for end, wire in ((self.host, self.down), (self.guest, self.up)):
            while buffers := end.next_output(self.now_s):
                wire.way += b"".join(buffers)

    def deliver(self, down_bytes: int, up_bytes: int) -> None:
        self.guest.feed(self.down.carry(down_bytes), self.now_s)
        self.host.feed(self.up.carry(up_bytes), self.now_s)

    def read(self) -> None:
        self.host_read += self.host.stream.receiving.read(1 << 30, self.now_s)
        if self.guest.stream is not None:
            self.guest_read += self.guest.stream.receiving.read(1 << 30, self.now_s)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for end in (self.host, self.guest):
            end.on_timer(self.now_s)

    def run_to_rest(self) -> None:
        for _ in range(400):
            self.send()
            self.deliver(1 << 30, 1 << 30)
            self.read()
            if self.is_at_rest:
                return
            self.pass_time(0.05)
        raise AssertionError("the link did not come to rest")

    @property
    def is_at_rest(self) -> bool:
        return (
            self.guest.stream is not None
            and not self.down.way
            and not self.up.way
            and self.host.stream.sending.is_all_taken
            and self.guest.stream.sending.is_all_taken
        )


STEPS = st.one_of(
    st.tuples(st.just("host writes"), st.binary(min_size=1, max_size=30_000)),
    st.tuples(st.just("guest writes"), st.binary(min_size=1, max_size=200_000)),
    st.tuples(st.just("deliver"), st.integers(0, 200_000)),
    st.tuples(st.just("lose down"), st.integers(0, 40_000)),
    st.tuples(st.just("lose up"), st.integers(0, 40_000)),
    st.tuples(st.just("pass time"), st.sampled_from([0.001, 0.05, 0.3, 5.0])),
    st.tuples(st.just("send"), st.just(0)),
    st.tuples(st.just("read"), st.just(0)),
    st.tuples(st.just("cut"), st.integers(0, 5_000)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_whatever_is_lost_every_byte_arrives_once_and_in_order(steps):
    pair = Pair()
    for step, value in steps:
        match step:
            case "host writes":
                pair.write_at_host(value)
            case "guest writes":
                pair.write_at_guest(value)
            case "deliver":
                pair.deliver(value, value)
            case "lose down":
                pair.down.carry(value)
            case "lose up":
                pair.up.carry(value)
            case "pass time":
                pair.pass_time(value)
            case "send":
                pair.send()
            case "read":
                pair.read()
            case (
                "cut"
            ):  # the socket is closed and opened again: what was on the way is lost, the end of it torn
                pair.down.carry(len(pair.down.way) - value if len(pair.down.way) > value else 0)
                pair.up.carry(1 << 30)
                pair.host.wire_renewed()
    pair.run_to_rest()
    assert pair.guest_read == pair.host_wrote
    assert pair.host_read == pair.guest_wrote


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.0, 0.25))
def test_a_long_transfer_over_a_bad_wire_ends(seed: int, loss: float):
    chance = random.Random(seed)
    pair = Pair()
    pair.run_to_rest()
    total = chance.randbytes(2 << 20)
    place = 0
    for _ in range(20_000):
        if place < len(total) and pair.guest.stream.sending.room_bytes > 0:
            pair.write_at_guest(total[place : place + 65_536])
            place += 65_536
        pair.send()
        if chance.random() < loss:
            pair.up.carry(chance.randrange(60_000))
        if chance.random() < loss:
            pair.down.carry(chance.randrange(200))
        pair.deliver(80_000, 80_000)
        pair.read()
        pair.pass_time(0.01)
        if len(pair.host_read) == len(total):
            break
    assert pair.host_read == total


def test_a_sender_that_gets_no_answer_holds_no_more_than_its_bound():
    pair = Pair()
    pair.run_to_rest()
    written = 0
    while pair.guest.stream.sending.room_bytes > 0:
        pair.write_at_guest(bytes(100_000))
        written += 100_000
    assert SEND_BYTES_MAX <= written <= SEND_BYTES_MAX + 100_000


def test_a_reader_that_reads_nothing_holds_no_more_than_its_bound():
    stream = Stream(1, 65_536)
    for place in range(0, RECEIVE_BYTES_MAX * 2, 65_536):
        stream.on_frame(Frame(Kind.DATA, 1, place, payload=bytes(65_536)), 0.0)
    assert stream.receiving.ready_bytes <= RECEIVE_BYTES_MAX


def test_a_slow_reader_costs_one_frame_per_probe():
    pair = Pair()
    pair.run_to_rest()
    for _ in range(8):
        pair.write_at_guest(bytes(128 << 10))
    pair.send()
    pair.deliver(1 << 30, 1 << 30)
    pair.send()
    pair.deliver(1 << 30, 1 << 30)
    pair.pass_time(RESEND_FIRST_S)
    pair.send()
    frames = FrameReader().feed(bytes(pair.up.way))
    assert [frame.kind for frame in frames] == [Kind.DATA]
    pair.deliver(1 << 30, 1 << 30)
    pair.send()
    assert [frame.kind for frame in FrameReader().feed(bytes(pair.down.way))] == [Kind.ACK]
    pair.run_to_rest()
    assert pair.host_read == pair.guest_wrote


def test_a_new_epoch_ends_the_old_connection_and_starts_at_zero():
    pair = Pair()
    pair.run_to_rest()
    pair.write_at_host(b"from the old shim")
    pair.run_to_rest()
    old = pair.guest.stream
    pair.host = HostEnd(epoch=8)
    pair.host_wrote.clear()
    pair.guest_read.clear()
    pair.write_at_host(b"from the new shim")
    pair.run_to_rest()
    assert old.is_gone
    assert pair.guest.stream.epoch == 8
    assert pair.guest_read == b"from the new shim"


def test_a_migration_that_tears_a_frame_does_not_swallow_the_new_hello():
    pair = Pair()
    pair.run_to_rest()
    pair.write_at_host(bytes(16 << 10))
    pair.send()
    pair.guest.feed(pair.down.carry(1000), pair.now_s)
    pair.down.way.clear()
    pair.host = HostEnd(epoch=8)
    pair.host_wrote.clear()
    pair.write_at_host(b"after the move")
    pair.run_to_rest()
    assert pair.guest_read == b"after the move"


def test_frames_of_an_unknown_epoch_are_answered_with_gone():
    guest = GuestEnd()
    guest.feed(Frame(Kind.DATA, 5, payload=b"x").encode(), 0.0)
    frames = FrameReader().feed(b"".join(guest.next_output(0.0)))
    assert frames == [Frame(Kind.GONE, 5)]
    assert guest.next_output(0.0) == []


def test_gone_ends_the_hosts_connection_but_what_came_before_can_be_read():
    host = HostEnd(epoch=5)
    host.feed(Frame(Kind.HELLO, 5).encode() + Frame(Kind.DATA, 5, payload=b"last words").encode(), 0.0)
    host.feed(Frame(Kind.GONE, 5).encode(), 0.0)
    assert host.stream.is_gone
    assert host.stream.receiving.read(100, 0.0) == b"last words"
    assert host.next_output(10.0) == []


@pytest.mark.parametrize("number", [-1, 2**63])
def test_an_acknowledgement_of_what_was_never_sent_is_ignored(number: int):
    stream = Stream(1, 1000)
    stream.sending.write(b"abc")
    stream.next_output(0.0)
    stream.sending.on_taken(number, 0.0)
    assert stream.sending.taken == 0


def test_hello_is_repeated_ever_more_seldom_and_padded_ever_more_seldom():
    host = HostEnd(epoch=1)
    assert len(b"".join(host.next_output(0.0))) == HEADER_BYTES
    times, padded, now_s = [], [], 0.0
    for number in range(2, 10):
        at_s = host.next_timer_s()
        times.append(round(at_s - now_s, 3))
        now_s = at_s
        host.on_timer(now_s)
        if len(b"".join(host.next_output(now_s))) == 2 * HEADER_BYTES + HOST_PAYLOAD_BYTES_MAX:
            padded.append(number)
    assert times == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert padded == [2, 4, 8]
