"""One process in the guest: started, fed, read, watched until its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sandshift.agent.output import ALL_STREAMS_BYTES, Budget, OutputBuffer

STDOUT: Final = 1
STDERR: Final = 2
PIPE_BYTES: Final = 1 << 20
"""Asked of the kernel for each output pipe: fewer, larger reads."""
READ_BYTES: Final = 256 << 10
STDIN_BYTES_MAX: Final = 256 << 10
_END_OF_INPUT: Final = b"\x04"
"""What a terminal's line discipline takes for the end of input."""
_DEFAULT_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
}


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """All that a process is started from. Equal plans under one id are one process."""

    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    terminal: bool = False
    stdin: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    code: int
    """The exit status, or 128 plus the signal."""
    at_ns: int
    """CLOCK_REALTIME."""


class OutputRoom(Budget):
    """The budget, and the streams that wait for room in it or in themselves."""

    def __init__(self, bytes_max: int = ALL_STREAMS_BYTES) -> None:
        super().__init__(bytes_max)
        self.waiting: set[OutputStream] = set()

    def wake(self) -> None:
        """There may be room: whoever has some goes on."""
        for stream in list(self.waiting):
            stream.resume_if_room()


class OutputStream:
    """Reads a descriptor into an OutputBuffer while there is room."""

    def __init__(self, descriptor: int, room: OutputRoom) -> None:
        self._room = room
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._is_reading = False
        self.buffer = OutputBuffer(room)
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(descriptor, False)
        self._resume()

    async def wait(self) -> None:
        """Wait until more came, or the end."""
        self._changed.clear()
        await self._changed.wait()

    def acknowledge(self, offset: int) -> None:
        self.buffer.acknowledge(offset)
        self._room.wake()

    def resume_if_room(self) -> None:
        if not self.buffer.is_full:
            self._resume()

    def forget(self) -> None:
        """Read no more and drop what is held."""
        self.close()
        self.buffer.acknowledge(self.buffer.end)
        self._room.wake()

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._room.waiting.discard(self)
        if self._descriptor >= 0:
            self._pause()
            os.close(self._descriptor)
            self._descriptor = -1
        self.buffer.is_ended = True
        self._changed.set()

    def _resume(self) -> None:
        self._room.waiting.discard(self)
        if not self._is_reading and self._descriptor >= 0:
            self._is_reading = True
            self._loop.add_reader(self._descriptor, self._readable)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._descriptor)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last process is gone
                raise
            data = b""
        if not data:
            self.close()
            return
        self.buffer.append(data)
        if self.buffer.is_full:
            self._pause()
            self._room.waiting.add(self)
        self._changed.set()


class InputStream:
    """Writes to a descriptor what `take` accepts, in order."""

    def __init__(self, descriptor: int, *, terminal: bool) -> None:
        self._descriptor = descriptor
        self._terminal = terminal
        self._loop = asyncio.get_running_loop()
        self._waiting = bytearray()
        self._changed = asyncio.Event()
        self._is_ending = False
        self._is_writing = False
        self.taken = 0
        """Bytes accepted so far."""
        os.set_blocking(descriptor, False)

    async def take(self, offset: int, data: bytes, *, eof: bool) -> int:
        """Accept the part of `data` that is new and fits, waiting for room; how far stdin is taken now.

        Raises:
            ValueError: `offset` lies beyond what was taken: bytes are missing.
        """
        if offset > self.taken:
            raise ValueError(f"stdin is taken up to {self.taken}, not to {offset}")
        while self._is_open and len(self._waiting) >= STDIN_BYTES_MAX:
            self._changed.clear()
            await self._changed.wait()
        fresh = data[self.taken - offset :]
        if self._is_open:
            fresh = fresh[: STDIN_BYTES_MAX - len(self._waiting)]
            self._waiting += fresh
        self.taken += len(fresh)
        if eof and self.taken >= offset + len(data):
            self._is_ending = True
        self._flush()
        return self.taken

    def close(self) -> None:
        """Close, and drop what is not written. Idempotent."""
        if self._descriptor >= 0:
            self._watch(writable=False)
            os.close(self._descriptor)
            self._descriptor = -1
        self._waiting.clear()
        self._changed.set()

    @property
    def _is_open(self) -> bool:
        return self._descriptor >= 0

    def _flush(self) -> None:
        if not self._is_open:
            return
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except BlockingIOError:
            self._watch(writable=True)
            self._changed.set()
            return
        except OSError:  # the process has closed its end: nobody will ever read it
            self.close()
            return
        self._watch(writable=False)
        self._changed.set()
        if self._is_ending:
            self._end()

    def _end(self) -> None:
        if self._terminal:
            self._is_ending = False
            with contextlib.suppress(OSError):
                os.write(self._descriptor, _END_OF_INPUT)
        else:
            self.close()

    def _watch(self, *, writable: bool) -> None:
        if writable and not self._is_writing:
            self._loop.add_writer(self._descriptor, self._flush)
        elif not writable and self._is_writing:
            self._loop.remove_writer(self._descriptor)
        self._is_writing = writable


class Process:
    """A started process. Lives on after the end until it is forgotten."""

    def __init__(self, plan: ProcessPlan, room: OutputRoom) -> None:
        """Start it.

        Raises:
            OSError: the program cannot be started: not found, not allowed, no such folder.
        """
        self.plan = plan
        self.exit: Exit | None = None
        self.outputs: dict[int, OutputStream] = {}
        self.input: InputStream | None = None
        self._room = room
        self._ended = asyncio.Event()
        self._start()
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self.reap)

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    def signal(self, number: int, *, whole_group: bool) -> None:
        """Send a signal. After the end nothing happens.

        Raises:
            ValueError: there is no such signal.
        """
        if self.exit is not None:
            return
        if not 0 <= number < signal.NSIG:
            raise ValueError(f"there is no signal {number}")
        with contextlib.suppress(ProcessLookupError):
            if whole_group:
                os.killpg(self.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)

    def reap(self) -> None:
        """Take the exit status, if the process has ended. Idempotent."""
        if self.exit is not None or (status := self._popen.poll()) is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exit = Exit(128 - status if status < 0 else status, time.time_ns())
        self._ended.set()

    def close(self) -> None:
        """Give up its streams and what they hold. Idempotent."""
        for output in self.outputs.values():
            output.forget()
        if self.input is not None:
            self.input.close()

    def _start(self) -> None:
        environment = {**_DEFAULT_ENVIRONMENT, **self.plan.env}
        with contextlib.ExitStack() as children:
            if self.plan.terminal:
                stdin, stdout, stderr = self._open_terminal(children)
            else:
                stdin, stdout, stderr = self._open_pipes(children)
            try:
                self._popen = subprocess.Popen(
                    list(self.plan.args),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env=environment,
                    cwd=self.plan.cwd or "/",
                    start_new_session=True,
                    preexec_fn=_take_terminal if self.plan.terminal else None,  # noqa: PLW1509  (one thread)
                )
            except BaseException:
                self.close()
                raise

    def _open_pipes(self, children: contextlib.ExitStack) -> tuple[int, int, int]:
        ends: dict[int, int] = {}
        for stream in (STDOUT, STDERR):
            ours, ends[stream] = os.pipe2(os.O_CLOEXEC)
            children.callback(os.close, ends[stream])
            self.outputs[stream] = OutputStream(ours, self._room)
        stdin: int = subprocess.DEVNULL
        if self.plan.stdin:
            stdin, ours = os.pipe2(os.O_CLOEXEC)
            children.callback(os.close, stdin)
            self.input = InputStream(ours, terminal=False)
        return stdin, ends[STDOUT], ends[STDERR]

    def _open_terminal(self, children: contextlib.ExitStack) -> tuple[int, int, int]:
        ours, theirs = os.openpty()
        children.callback(os.close, theirs)
        self.outputs[STDOUT] = OutputStream(ours, self._room)
        self.input = InputStream(os.dup(ours), terminal=True)
        return theirs, theirs, theirs


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
