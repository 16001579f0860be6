"""What two fake VMs say to each other over a real socket: few, small frames, read to the byte.

Nothing is read beyond the last frame, as with QEMU: afterwards the socket belongs to the shims again. So a cut or a stall
of the socket acts on a fake transfer just as on a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import struct
from typing import Final

from sandshift.errors import PeerProtocolError
from sandshift.vmm.channel import end_connection

HEADER: Final = struct.Struct(">cI")
FRAME_BYTES_MAX: Final = 1 << 20


class FrameKind(enum.Enum):
    HELLO = b"H"
    """JSON: what must be equal, and the proof of the key."""
    WELCOME = b"W"
    """Back: the destination takes this guest."""
    PAGES = b"P"
    """Page numbers and contents."""
    LAST = b"L"
    """JSON: the guest's other state. Nothing follows."""
    LOADED = b"A"
    """Back: everything is here."""
    REFUSED = b"E"
    """Back: why not."""


class FakeStream:
    """A duplicate of the handed socket. Whoever awaits here waits for the peer, for as long as it takes."""

    def __init__(self, channel_fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(channel_fd))
        self._socket.setblocking(False)  # noqa: FBT003

    async def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Raises OSError if the peer is gone."""
        await asyncio.get_running_loop().sock_sendall(
            self._socket, HEADER.pack(kind.value, len(payload)) + payload
        )

    async def receive(self) -> tuple[FrameKind, bytes]:
        """The next frame.

        Raises:
            EOFError: the stream ended.
            OSError: it broke.
            PeerProtocolError: it is not a fake VM's stream.
        """
        kind, size = HEADER.unpack(await self._exactly(HEADER.size))
        if size > FRAME_BYTES_MAX or kind not in {known.value for known in FrameKind}:
            raise PeerProtocolError("not a migration stream")
        return FrameKind(kind), await self._exactly(size)

    def shut_down(self) -> None:
        """End the connection for every holder of it, as QEMU does when a transfer fails or is cancelled."""
        end_connection(self._socket)

    def close(self) -> None:
        """Close our duplicate. The connection stays as long as others hold theirs."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, OSError):
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
        self._socket.close()

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await asyncio.get_running_loop().sock_recv(self._socket, size - len(data))
            if not part:
                raise EOFError
            data += part
        return data
