"""How long a destination waits for bytes, and what the kernel tells of the connection on which they come."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Final

from sandshift.session.phases import Outcome

TCP_STATE: Final = struct.Struct("=B")
TCP_STATE_AT: Final = 0
TCP_ENDED: Final = (7, 8)
"""TCP_CLOSE and TCP_CLOSE_WAIT. Source: include/net/tcp_states.h; tcpi_state is the first byte of struct tcp_info."""
TCP_RTT: Final = struct.Struct("=I")
TCP_RTT_AT: Final = 148
"""Offset of tcpi_min_rtt, microseconds: tcpi_rtt still counts how long the last pass filled the buffers, 12 ms where the
way took 0.1 (measured). Source: include/uapi/linux/tcp.h."""
TCP_RTT_UNKNOWN: Final = 0xFFFF_FFFF
"""tcpi_min_rtt of a connection on which nothing was measured yet."""
TCP_BYTES_RECEIVED: Final = struct.Struct("=Q")
TCP_BYTES_RECEIVED_AT: Final = 128
"""Offset of tcpi_bytes_received in struct tcp_info. Source: include/uapi/linux/tcp.h."""


class Patience:
    """How long a destination waits for bytes: the transfer's deadline, and a stall. Reads the kernel's count of the socket."""

    def __init__(self, descriptor: int, stall_s: float) -> None:
        self._descriptor = descriptor
        self._stall_s = stall_s
        self._began_s = time.monotonic()
        self._received = -1
        self._moved_at_s = self._began_s

    def is_over(self, now_s: float, deadline_s: float) -> tuple[Outcome, str] | None:
        received = received_bytes(self._descriptor)
        if received is None or received != self._received:
            self._received, self._moved_at_s = received if received is not None else -1, now_s
        if over := self.deadline_is_over(now_s - self._began_s, deadline_s):
            return over
        if received is not None and now_s - self._moved_at_s > self._stall_s:
            return Outcome.STALL, f"no byte came for {self._stall_s:g} s"
        return None

    def deadline_is_over(self, lasted_s: float, deadline_s: float) -> tuple[Outcome, str] | None:
        if lasted_s > deadline_s:
            return Outcome.DEADLINE, f"the transfer was not over within {deadline_s:g} s"
        return None


def received_bytes(descriptor: int) -> int | None:
    """What the kernel has received on a TCP connection; None where it does not count (a Unix socket)."""
    return tcp_info(descriptor, TCP_BYTES_RECEIVED, TCP_BYTES_RECEIVED_AT)


def has_ended(descriptor: int) -> bool:
    """A TCP connection is closed, or its peer will send no more."""
    return tcp_info(descriptor, TCP_STATE, TCP_STATE_AT) in TCP_ENDED


def round_trip_us(descriptor: int) -> int:
    """The shortest that was measured on a TCP connection; 0 if none was."""
    shortest_us = tcp_info(descriptor, TCP_RTT, TCP_RTT_AT)
    return 0 if shortest_us is None or shortest_us == TCP_RTT_UNKNOWN else shortest_us


def tcp_info(descriptor: int, field: struct.Struct, offset: int) -> int | None:
    """One field of a TCP connection's TCP_INFO; None for what is no TCP connection, or is closed."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as held:
            info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + field.size)
    except OSError:
        return None
    if len(info) < offset + field.size:
        return None
    value: int = field.unpack_from(info, offset)[0]
    return value
