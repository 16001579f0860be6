"""The shim's copy of the channel: frames whole and in order, told once when it is lost, never another's descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandshift.errors import Rejected, Unavailable
from sandshift.session.statement import frame
from sandshift.shim.handed_socket import copy_descriptor, facts_of
from sandshift.shim.migration.channel import UNSENT_BYTES_MAX, Channel, peer_of
from sandshift.shim.migration.patience import received_bytes
from sandshift.shim.migration.restoring import find_socket


class Ear:
    def __init__(self, channel: Channel) -> None:
        self.frames: list[bytes] = []
        self.losses: list[str] = []
        self.news = asyncio.Event()
        self.channel = channel
        channel.begin(self._on_frame, self._on_lost)

    def _on_frame(self, data: bytes) -> None:
        self.frames.append(data)
        if data == b"bad":
            self.channel.refuse("it does not verify")
        self.news.set()

    def _on_lost(self, why: str) -> None:
        self.losses.append(why)
        self.news.set()

    async def hear(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.frames) + len(self.losses) < count:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    own, other = socket.socketpair()
    channel = Channel(own.detach())
    yield channel, other
    other.close()


async def test_frames_come_whole_however_they_are_cut(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    ear = Ear(channel)
    data = frame(b"one") + frame(b"two") + frame(b"three")
    for at in range(0, len(data), 3):
        other.send(data[at : at + 3])
        await asyncio.sleep(0)
    await ear.hear(3)
    assert ear.frames == [b"one", b"two", b"three"]
    channel.close()


async def test_nothing_is_read_after_a_frame_that_was_refused(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    ear = Ear(channel)
    other.send(frame(b"bad") + frame(b"good"))
    await ear.hear(2)
    assert (ear.frames, ear.losses) == ([b"bad"], ["it does not verify"])


async def test_the_end_of_the_peer_is_told_once(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    ear = Ear(channel)
    other.close()
    await ear.hear(1)
    channel.send(b"into the void")
    channel.close()
    assert ear.losses == ["closed by the other side"]
    assert channel.lost


async def test_a_peer_that_reads_late_gets_all_of_it(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    Ear(channel)
    sent = [bytes([number]) * 60_000 for number in range(UNSENT_BYTES_MAX // 60_000)]
    for one in sent:
        channel.send(one)
    wanted, got = b"".join(map(frame, sent)), bytearray()
    assert channel._unsent, "more than the kernel holds"
    other.setblocking(False)
    async with asyncio.timeout(20):
        while len(got) < len(wanted):
            got += await asyncio.get_running_loop().sock_recv(other, 1 << 16)
    assert got == wanted
    channel.close()


async def test_frames_for_a_peer_that_never_reads_are_dropped_whole(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, other = pair
    Ear(channel)
    for _ in range(3 * UNSENT_BYTES_MAX // 60_000):
        channel.send(b"x" * 60_000)
    assert UNSENT_BYTES_MAX < len(channel._unsent) <= UNSENT_BYTES_MAX + len(frame(b"x" * 60_000))
    left, got = len(channel._unsent), bytearray()
    other.setblocking(False)
    async with asyncio.timeout(20):
        while left or channel._unsent:
            got += await asyncio.get_running_loop().sock_recv(other, 1 << 16)
            left = len(channel._unsent)
    with contextlib.suppress(BlockingIOError):
        while True:
            got += other.recv(1 << 16)
    one = frame(b"x" * 60_000)
    assert got == one * (len(got) // len(one))
    channel.close()


async def test_cutting_a_lost_channel_harms_no_socket_that_has_its_number_now(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, _other = pair
    number = channel.descriptor
    channel.close()
    one, other = socket.socketpair()
    assert number in (one.fileno(), other.fileno())  # The kernel gives the lowest free number.
    with one, other:
        channel.cut()
        other.send(b"still whole")
        assert one.recv(20) == b"still whole"


def test_a_socket_is_found_by_its_cookie_and_only_by_that() -> None:
    one, other = socket.socketpair()
    with one, other:
        cookie = facts_of(one.fileno()).cookie
        copy = find_socket(os.getpid(), cookie)
        assert copy is not None
        assert facts_of(copy).cookie == cookie
        os.close(copy)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - links, not files
        assert find_socket(os.getpid(), cookie + (1 << 40)) is None
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above


def test_what_is_no_socket_no_process_or_no_descriptor_is_named() -> None:
    with open(os.devnull) as file, pytest.raises(Rejected, match="not a socket"):  # noqa: PTH123 - its number counts
        facts_of(file.fileno())
    with pytest.raises(Rejected, match="fd = 99999 is not open"):
        copy_descriptor(os.getpid(), 99999)
    with pytest.raises(Rejected, match="pid = 0 is not a process"):
        copy_descriptor(0, 1)


def test_an_unconnected_socket_says_so_and_a_closed_one_counts_no_bytes() -> None:
    with socket.socket() as alone:
        facts = facts_of(alone.fileno())
        assert (facts.family, facts.type, facts.connected) == (socket.AF_INET, socket.SOCK_STREAM, False)
        assert peer_of(alone.fileno()) == ""
    assert received_bytes(99999) is None


async def test_what_is_lent_stays_the_channel_though_it_is_cut_and_its_number_given_to_another_file(
    pair: tuple[Channel, socket.socket], tmp_path: Path
) -> None:
    channel, other = pair
    number = channel.descriptor
    with channel.lent() as lent:
        channel.cut()
        with (tmp_path / "another").open("wb") as another:
            assert another.fileno() == number  # the lowest that is free
            with socket.socket(fileno=os.dup(lent)) as held:
                assert held.recv(1) == b""
    assert other.recv(1) == b""
    with pytest.raises(Unavailable, match="closed before the transfer began"), channel.lent():
        pass
