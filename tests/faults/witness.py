"""Who runs the guest: what the taps of both hosts saw of it, stamped by the one kernel that both stand on.

The guest counts in its own memory and says the number every 5 ms. One runner, wherever it is, counts on: of all that was
captured on both hosts together, in the order of the kernel's stamps, each number is higher than the one before. Two
runners begin from one image, or from an older one, so one of them says a number that was said before; that is seen
whatever a shim, QEMU or this harness believes. Nothing is taken from the hosts but frames that came out of a tap.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sandshift.net.namespace import make_socket

PORT: Final = 7100
DATAGRAM: Final = struct.Struct("<8sQQQ")
"""As in guest/beacon.py: marker, number, generation, pages found wrong."""
UDP_PAYLOAD_AT: Final = 42
"""Ethernet 14, IPv4 without options 20, UDP 8 bytes."""
FRAME_BYTES_MAX: Final = 2048
BUFFER_BYTES: Final = 16 << 20
"""A minute of datagrams, if the harness is held up for as long."""

# Source: linux/if_packet.h, asm-generic/socket.h, linux/filter.h.
_ETH_P_IP: Final = 0x0800
_ETH_P_ALL: Final = 0x0003
"""Before a bridge takes the frame; what asks for one protocol is asked after that, and would not see a tap's."""
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_SO_ATTACH_FILTER: Final = 26
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_PACKET_IGNORE_OUTGOING: Final = 23
_TIMESPEC: Final = struct.Struct("qq")
_STATISTICS: Final = struct.Struct("II")
_INSTRUCTION: Final = struct.Struct("HBBI")


@dataclass(frozen=True, slots=True, order=True)
class Sighting:
    """One datagram of the guest that came out of a tap."""

    at_ns: int
    """The kernel's stamp, nanoseconds since the epoch."""
    host: str
    number: int
    generation: int
    bad_pages: int


@dataclass(frozen=True, slots=True)
class Clash:
    """A number that a single guest cannot have said there and then."""

    earlier: Sighting
    later: Sighting

    def __str__(self) -> str:
        after_ms = (self.later.at_ns - self.earlier.at_ns) / 1e6
        return (
            f"host {self.later.host} said {self.later.number} {after_ms:.1f} ms after host {self.earlier.host} had said"
            f" {self.earlier.number}"
        )


def clashes(sightings: Iterable[Sighting]) -> list[Clash]:
    """Where what was seen is not one guest that counts on. Empty: there was never more than one runner."""
    found: list[Clash] = []
    highest: Sighting | None = None
    for each in sorted(sightings):
        if highest is not None and each.number <= highest.number:
            found.append(Clash(highest, each))
        else:
            highest = each
    return found


def runners(sightings: Iterable[Sighting]) -> list[str]:
    """The hosts on which the guest was seen, in the order in which it came there."""
    hosts: list[str] = []
    for each in sorted(sightings):
        if not hosts or hosts[-1] != each.host:
            hosts.append(each.host)
    return hosts


def longest_silence_ns(sightings: Sequence[Sighting], since_ns: int) -> int:
    """The longest time without a word of the guest that ended after `since_ns`."""
    times = [each.at_ns for each in sorted(sightings)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times) if later > since_ns]
    return max(gaps, default=0)


class Witness:
    """Captures on both hosts. Made by `watching`."""

    def __init__(self, sniffers: dict[str, socket.socket]) -> None:
        self._sniffers = sniffers
        self._marker = b""
        self._tap = ""
        self._seen: list[Sighting] = []
        self._news = asyncio.Event()
        for host, sniffer in sniffers.items():
            asyncio.get_running_loop().add_reader(sniffer, self._on_readable, host, sniffer)

    def watch(self, marker: bytes, tap: str) -> None:
        """From now on look for this guest, on taps of this name; forget what was seen."""
        self._drain()
        self._marker, self._tap, self._seen = marker, tap, []

    def forget(self) -> None:
        """A new story begins: keep the last sighting, so that it must go on from there."""
        self._drain()
        self._seen = self._seen[-1:]

    @property
    def seen(self) -> list[Sighting]:
        self._drain()
        return list(self._seen)

    async def wait_for(self, count: int, *, host: str, since_ns: int, sweeps: int = 0) -> bool:
        """Wait until `host` has said `count` numbers after `since_ns`, over so many sweeps through its memory.

        The caller bounds it.
        """
        while True:
            heard = [each for each in self.seen if each.host == host and each.at_ns > since_ns]
            if len(heard) >= count and heard[-1].generation - heard[0].generation >= sweeps:
                return True
            self._news.clear()
            await self._news.wait()

    def drops(self) -> int:
        """Frames that the kernel could not keep for us since the last time it was asked: unseen."""
        return sum(
            _STATISTICS.unpack(each.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size))[1]
            for each in self._sniffers.values()
        )

    def close(self) -> None:
        for sniffer in self._sniffers.values():
            asyncio.get_running_loop().remove_reader(sniffer)
            sniffer.close()

    def _drain(self) -> None:
        for host, sniffer in self._sniffers.items():
            self._on_readable(host, sniffer)

    def _on_readable(self, host: str, sniffer: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, ancillary, _flags, address = sniffer.recvmsg(FRAME_BYTES_MAX, 64)
                self._take(host, frame, ancillary, str(address[0]))
        self._news.set()

    def _take(self, host: str, frame: bytes, ancillary: list[tuple[int, int, bytes]], interface: str) -> None:
        if interface != self._tap or len(frame) < UDP_PAYLOAD_AT + DATAGRAM.size:
            return
        marker, number, generation, bad = DATAGRAM.unpack_from(frame, UDP_PAYLOAD_AT)
        if marker != self._marker:
            return
        ((_level, _kind, stamp),) = ancillary
        seconds, nanoseconds = _TIMESPEC.unpack(stamp)
        self._seen.append(Sighting(seconds * 1_000_000_000 + nanoseconds, host, number, generation, bad))


@contextlib.asynccontextmanager
async def watching(namespaces: dict[str, str]) -> AsyncIterator[Witness]:
    """A witness on every interface of these network namespaces, by host. Needs CAP_NET_RAW."""
    witness = Witness({host: _sniffer(namespace) for host, namespace in namespaces.items()})
    try:
        yield witness
    finally:
        witness.close()


def _sniffer(namespace: str) -> socket.socket:
    """All that comes in on any interface and is of the guest's; taps that are made later too."""
    sniffer = make_socket(namespace, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    sniffer.setblocking(False)
    sniffer.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    sniffer.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sniffer.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    program = _only_udp_to(PORT)
    held = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HL", len(program) // _INSTRUCTION.size, ctypes.addressof(held))
    sniffer.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
    return sniffer


def _only_udp_to(port: int) -> bytes:
    """Classic BPF: IPv4, UDP, no options, that destination port; anything else is not kept."""
    reject = 9
    steps = (
        (0x28, 0, 0, 12),  # EtherType
        (0x15, 0, reject - 2, _ETH_P_IP),
        (0x30, 0, 0, 14),  # the first byte of the IPv4 header
        (0x15, 0, reject - 4, 0x45),
        (0x30, 0, 0, 23),  # protocol
        (0x15, 0, reject - 6, 17),
        (0x28, 0, 0, 36),  # destination port
        (0x15, 0, 1, port),
        (0x06, 0, 0, FRAME_BYTES_MAX),
        (0x06, 0, 0, 0),
    )
    return b"".join(_INSTRUCTION.pack(*step) for step in steps)
