"""Where the output of a container's process goes on this host: a fifo, a file, or nowhere; by offset, without blocking.

A sink takes what fits and says how far it has taken; what it does not take stays in the agent, whose buffer then fills, so
that the process waits in its write. So a reader that does not read holds up its own stream and nothing else.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import stat
import termios
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from sandshift.errors import NotSupported, Rejected, Unavailable
from sandshift.shim.tasks.offsets import Offsets

PIPE_BYTES: Final = 256 << 10
"""Asked of the kernel for each fifo: fewer, larger writes. It may give less."""
FULL_DISK_S: Final = 1.0
"""How often a file whose disk is full is tried again."""
DRAIN_LOOK_S: Final = 0.05
"""How often a fifo whose stream has ended is looked at: its end is closed when the reader has everything."""


class Sink(ABC):
    """Takes one output stream from `delivered` on."""

    def __init__(self, offsets: Offsets, stream: int) -> None:
        self.stream = stream
        self._offsets = offsets
        self._thawed = asyncio.Event()
        self._thawed.set()

    @property
    def delivered(self) -> int:
        """Offset of the first byte that was not given to the caller."""
        return self._offsets[self.stream]

    def take(self, offset: int, data: bytes) -> int:
        """Take of `data`, which begins at `offset`, what is new and fits; the offset up to which everything is taken.

        Nothing is taken beyond a gap, nor while frozen.
        """
        if not self._thawed.is_set() or offset > self.delivered:
            return self.delivered
        fresh = memoryview(data)[self.delivered - offset :]
        while fresh and (written := self._write(fresh)):
            self._offsets[self.stream] += written
            fresh = fresh[written:]
        return self.delivered

    async def room(self) -> None:
        """Wait until `take` may take more."""
        await self._thawed.wait()
        await self._room()

    def freeze(self) -> int:
        self._thawed.clear()
        return self.delivered

    def thaw(self) -> None:
        self._thawed.set()

    @abstractmethod
    def _write(self, data: memoryview) -> int:
        """How much of `data` was written; 0: there is no room now."""

    @abstractmethod
    async def _room(self) -> None: ...

    async def drained(self) -> None:
        """The stream has ended: wait until its reader has everything."""
        return

    def has_reader(self) -> bool:
        """Whether it is of use to wait until everything is taken."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Nothing more comes. Idempotent."""


class Discard(Sink):
    """For a caller who wants no output."""

    def _write(self, data: memoryview) -> int:
        return len(data)

    async def _room(self) -> None:
        return

    def close(self) -> None:
        return


class FileSink(Sink):
    def __init__(self, path: Path, offsets: Offsets, stream: int) -> None:
        super().__init__(offsets, stream)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # O_NONBLOCK: the path may be a fifo, whose opening or writing would hold the event loop up.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise Unavailable(f"output file {path} cannot be opened: {error.strerror}") from error

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError:
            return 0  # A full disk, say: the bytes stay in the agent, and the process waits.

    async def _room(self) -> None:
        await asyncio.sleep(FULL_DISK_S)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FifoSink(Sink):
    """Writes into a fifo that the caller made. A second, reading end of ours keeps what is in it when no caller has it open,
    so that a containerd that ends and comes again costs neither a signal nor a byte."""

    def __init__(self, path: Path, offsets: Offsets, stream: int) -> None:
        super().__init__(offsets, stream)
        self._path = path
        self._keeper, self._descriptor = _open_fifo(path)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return 0

    async def _room(self) -> None:
        await writable(self._descriptor)

    async def drained(self) -> None:
        left = array.array("i", [0])
        while self._keeper >= 0:
            fcntl.ioctl(self._keeper, termios.FIONREAD, left)
            if not left[0]:
                return
            await asyncio.sleep(DRAIN_LOOK_S)

    def has_reader(self) -> bool:
        """Whether anybody but us has it open. What is in it stays, whatever the answer."""
        if self._keeper < 0:
            return False
        os.close(self._keeper)
        self._keeper = -1
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:  # ENXIO: nobody reads; or the fifo is gone.
            found = False
        else:
            found = True
        with contextlib.suppress(OSError):
            self._keeper = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return found

    def close(self) -> None:
        for descriptor in (self._descriptor, self._keeper):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._keeper = -1


def _open_fifo(path: Path) -> tuple[int, int]:
    """Reading and writing end. Raises Unavailable, naming the path."""
    keeper = -1
    try:
        if not stat.S_ISFIFO(path.stat().st_mode):
            raise Rejected(f"stdio path {path} is not a fifo; write files as file://{path}")
        keeper = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return keeper, os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if keeper >= 0:
            os.close(keeper)
        raise Unavailable(f"fifo {path} cannot be opened: {error.strerror}") from error


def check_stdio(name: str, value: str) -> None:
    """Raises NotSupported or Rejected for what output cannot be written to, before anything is made."""
    scheme = _scheme(value)
    if scheme not in ("", "fifo", "file"):
        raise NotSupported(
            f"{name} = {value!r}: this shim writes to fifos and file:// paths, not to {scheme}://; name one of those"
        )
    if value and not _path(value).is_absolute():
        raise Rejected(f"{name} = {value!r}: the path must be absolute")


def open_sink(value: str, offsets: Offsets, stream: int) -> Sink:
    """The sink that a stdio value of containerd's names: empty, a fifo's path, or file://PATH.

    Raises Unavailable if it cannot be opened, NotSupported and Rejected as `check_stdio`.
    """
    check_stdio(("stdin", "stdout", "stderr")[stream], value)
    if not value:
        return Discard(offsets, stream)
    if _scheme(value) == "file":
        return FileSink(_path(value), offsets, stream)
    return FifoSink(_path(value), offsets, stream)


def _scheme(value: str) -> str:
    return urlsplit(value).scheme if "://" in value else ""


def _path(value: str) -> Path:
    return Path(unquote(urlsplit(value).path)) if "://" in value else Path(value)


def fifo_path(value: str) -> Path:
    """The path of a stdin value. Raises as `check_stdio`; files cannot be stdin."""
    check_stdio("stdin", value)
    if _scheme(value) == "file":
        raise NotSupported(f"stdin = {value!r}: stdin is read from a fifo")
    return _path(value)


async def readable(descriptor: int) -> None:
    """Wait until `descriptor` can be read, or its other end is closed."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def writable(descriptor: int) -> None:
    """Wait until `descriptor` takes more."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
