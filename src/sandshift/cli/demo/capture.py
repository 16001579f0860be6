"""A packet capture on the switch's bridge that looks for the writer's pattern in everything that crosses it.

All that goes between the two hosts crosses the bridge: if memory travels in the clear, its pages are seen here. A thread
reads an AF_PACKET socket; what it could not read in time the kernel counts, so a capture with gaps is known as such.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sandshift import net
from sandshift.cli.demo.workload import PAGE_BYTES, RECORD
from sandshift.errors import Rejected, Unavailable

PATTERN_RUN_BYTES: Final = 64
"""So many bytes of the pattern in a row are no coincidence: its marker alone is 64 random bits."""
RECEIVE_BUFFER_BYTES: Final = 256 << 20
"""What may wait for the thread: a whole demo's move."""
_FRAME_BYTES_MAX: Final = 1 << 18
"""A frame of a veth pair is as long as the segment offload makes it: up to 64 KiB, or 185 KiB with BIG TCP."""
_LOOK_UP_S: Final = 0.05

# Source: linux/if_packet.h, linux/if_ether.h, asm-generic/socket.h.
_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_PROMISC: Final = 1
_PACKET_STATISTICS: Final = 6
_ETH_P_ALL: Final = 0x0003
_SO_RCVBUFFORCE: Final = 33
_MEMBERSHIP: Final = struct.Struct("iHH8s")
_STATISTICS: Final = struct.Struct("II")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a capture saw."""

    packets: int = 0
    bytes: int = 0
    drops: int = 0
    """Packets that the kernel could not keep for us: unseen."""
    pattern_blocks: int = 0
    """Places where at least 64 bytes in a row were the writer's pattern; at most one is counted per page's length."""


def count_pattern_blocks(data: bytes | bytearray, marker: bytes, length: int | None = None) -> int:
    """How many pages' worth of the pattern are in the first `length` bytes of `data`: runs of one record, repeated."""
    end = len(data) if length is None else length
    found, start = 0, 0
    while (start := data.find(marker, start, end)) >= 0:
        run = data[start : min(start + PATTERN_RUN_BYTES, end)]
        if run == run[: RECORD.size] * (PATTERN_RUN_BYTES // RECORD.size):
            found += 1
            start += PAGE_BYTES
        else:
            start += 1
    return found


class Capture:
    """Runs from `capturing`. `seen` may be asked at any time."""

    def __init__(self, sniffer: socket.socket, marker: bytes) -> None:
        self._sniffer = sniffer
        self._marker = marker
        self._packets = self._bytes = self._drops = self._blocks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="demo-capture", daemon=True)
        self._thread.start()

    @property
    def seen(self) -> Seen:
        return Seen(self._packets, self._bytes, self._drops, self._blocks)

    def stop(self) -> Seen:
        """Read what is still waiting, end, and say what was seen. Blocks for up to 50 ms; calling twice is harmless."""
        self._stop.set()
        self._thread.join()
        self._sniffer.close()
        return self.seen

    def _read(self) -> None:
        frame = bytearray(_FRAME_BYTES_MAX)
        while True:
            if self._stop.is_set():
                self._sniffer.settimeout(0)  # what is waiting still counts; what comes later does not
            try:
                length = self._sniffer.recv_into(frame)
            except TimeoutError:
                continue
            except BlockingIOError:
                break
            self._packets += 1
            self._bytes += length
            if length > PATTERN_RUN_BYTES:
                self._blocks += count_pattern_blocks(frame, self._marker, length)
        statistics = self._sniffer.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
        self._drops += _STATISTICS.unpack(statistics)[1]


@contextlib.contextmanager
def capturing(namespace: str, interface: str, marker: bytes) -> Iterator[Capture]:
    """Capture on `interface` of the network namespace for the time of the `with`.

    Raises:
        Rejected: no privilege. Unavailable: no such interface.
    """
    capture = Capture(_open_sniffer(namespace, interface), marker)
    try:
        yield capture
    finally:
        capture.stop()


def _open_sniffer(namespace: str, interface: str) -> socket.socket:
    try:
        sniffer = net.make_socket(namespace, socket.AF_PACKET, socket.SOCK_RAW)
    except PermissionError as error:
        raise Rejected("a packet capture needs root (CAP_NET_RAW); run it as root") from error
    try:
        sniffer.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        sniffer.bind((interface, _ETH_P_ALL))
        index = net.run_in(namespace, lambda: socket.if_nametoindex(interface))
        # Without this a bridge hands up only what is addressed to itself.
        membership = _MEMBERSHIP.pack(index, _PACKET_MR_PROMISC, 0, b"")
        sniffer.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
        sniffer.settimeout(_LOOK_UP_S)
    except OSError as error:
        sniffer.close()
        raise Unavailable(f"cannot capture on {interface} in {namespace}: {error.strerror}") from error
    return sniffer
