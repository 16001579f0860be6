"""The shim's own copy of the channel's socket, after the VM process has finished with it: handover frames, nothing else.

Nothing is read from it before then, and the destination writes nothing before it has read one frame, for its peer's VM
process might still be reading. O_NONBLOCK belongs to the connection and not to the copy: it is set only here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

from sandshift.errors import PeerProtocolError, Unavailable
from sandshift.session.statement import FrameReader, frame
from sandshift.shim.handed_socket import close_quietly

log = logging.getLogger(__name__)

READ_BYTES: Final = 64 << 10
UNSENT_BYTES_MAX: Final = 1 << 20
"""Frames are idempotent and small; a peer that takes none gets no more."""


class Channel:
    """Owns `descriptor`. `on_frame` is called with each frame's bytes, `on_lost` once when nothing more can come."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._writable = False
        self._paused = False
        self._on_frame: Callable[[bytes], None] = lambda _data: None
        self._on_lost: Callable[[str], None] = lambda _why: None
        self.lost = False
        self.peer = peer_of(descriptor)
        """The other side's address; empty for a Unix socket."""

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @contextlib.contextmanager
    def lent(self) -> Iterator[int]:
        """A copy that stays the channel's for the block, for who waits between taking it and giving it to the VM process.

        The channel may be closed meanwhile, and its number be another file's by then.

        Raises:
            Unavailable: the channel is closed.
        """
        if self.lost:
            raise Unavailable("the channel was closed before the transfer began")
        copy = os.dup(self._descriptor)
        try:
            yield copy
        finally:
            os.close(copy)

    @property
    def open(self) -> bool:
        return self._socket is not None and not self.lost

    def begin(self, on_frame: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        """The VM process has finished: take over."""
        if self._socket is not None or self.lost:
            return
        self._on_frame, self._on_lost = on_frame, on_lost
        self._socket = socket.socket(fileno=os.dup(self._descriptor))
        self._socket.setblocking(False)  # noqa: FBT003 - its only form
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    def pause(self) -> None:
        """Read no more until `go_on`: the peer's frames wait in its own socket. Idempotent."""
        if self._socket is not None and not self._paused:
            self._paused = True
            asyncio.get_running_loop().remove_reader(self._socket)

    def go_on(self) -> None:
        """Read again. Idempotent."""
        if self._socket is not None and self._paused:
            self._paused = False
            asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    def send(self, signed: bytes) -> None:
        """Send one frame, at best effort: a channel that is lost, or takes nothing, loses it."""
        if self._socket is None or self.lost or len(self._unsent) > UNSENT_BYTES_MAX:
            return
        self._unsent += frame(signed)
        self._flush()

    def _flush(self) -> None:
        assert self._socket is not None
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            if not self._writable:
                self._writable = True
                asyncio.get_running_loop().add_writer(self._socket, self._flush)
            return
        except OSError as error:
            self._lose(error.strerror or "broken")
            return
        if self._writable:
            self._writable = False
            asyncio.get_running_loop().remove_writer(self._socket)

    def _on_readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.strerror or "broken")
            return
        if not data:
            self._lose("closed by the other side")
            return
        try:
            for one in self._reader.feed(data):
                if self.lost:
                    return  # What follows a frame that was refused is not looked at.
                self._on_frame(one)
        except PeerProtocolError as error:
            self.refuse(error.message)

    def refuse(self, why: str) -> None:
        """The peer does not speak as agreed: end the connection, also for the copy that the VM process keeps."""
        if not self.lost:
            self._shut_down()
        self._lose(why)

    def _lose(self, why: str) -> None:
        if self.lost:
            return
        self.close()
        log.warning("the channel is lost: %s", why)
        self._on_lost(why)

    def cut(self) -> None:
        """End the connection for everybody who holds a copy, the VM processes too: a transfer that is to be ended."""
        if self.lost:
            return  # The number may be another's by now.
        self._shut_down()
        self.close()

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as held:
            held.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of our copy. Idempotent."""
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        if not self.lost:
            self.lost = True
            close_quietly(self._descriptor)


def peer_of(descriptor: int) -> str:
    """Where a connected socket leads, as far as it has an address."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as held:
        name = held.getpeername()
        if isinstance(name, tuple):
            return str(name[0])
    return ""
