"""One process in the guest: started, fed, read, watched until its end.

`Process` is all that goes for any; `PlainProcess` is one that the agent starts itself. Those of containers, which runc
starts, are in `adopted.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sandshift.agent.streams import InputStream, OutputRoom, OutputStream

STDOUT: Final = 1
STDERR: Final = 2
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
    container_id: str = ""
    """Of a process of a container."""
    spec: bytes = b""
    """What such a one was asked for with."""


@dataclass(frozen=True, slots=True)
class Exit:
    code: int
    """The exit status, or 128 plus the signal."""
    at_ns: int
    """CLOCK_REALTIME."""


class Process:
    """A process that runs or has ended. Lives on after the end until it is forgotten."""

    def __init__(self, plan: ProcessPlan, room: OutputRoom) -> None:
        self.plan = plan
        self.pid = 0
        self.exit: Exit | None = None
        self.outputs: dict[int, OutputStream] = {}
        self.input: InputStream | None = None
        self._room = room
        self._ended = asyncio.Event()
        self._pidfd = -1

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

    def resize_terminal(self, columns: int, rows: int) -> None:
        """Set the size of its terminal. After the end nothing happens.

        Raises:
            ValueError: it has none, or there is no such size.
        """
        if not self.plan.terminal or self.input is None:
            raise ValueError("it has no terminal")
        self.input.resize_terminal(columns, rows)

    def reap(self) -> None:
        """Take the exit status, if the process has ended. Idempotent."""
        if self.exit is None and (status := self._poll()) is not None:
            self._end(status)

    def close(self) -> None:
        """Give up its streams and what they hold. Idempotent."""
        for output in self.outputs.values():
            output.forget()
        if self.input is not None:
            self.input.close()

    def _watch(self, pid: int) -> None:
        """It is `pid` from now on."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self.reap)

    def _poll(self) -> int | None:
        """Its status once it has ended, a signal as its negative number."""
        raise NotImplementedError

    def _end(self, status: int) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
        self.exit = Exit(128 - status if status < 0 else status, time.time_ns())
        self._ended.set()

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


class PlainProcess(Process):
    """A process of the guest's own, in no container."""

    def __init__(self, plan: ProcessPlan, room: OutputRoom) -> None:
        """Start it.

        Raises:
            OSError: the program cannot be started: not found, not allowed, no such folder.
        """
        super().__init__(plan, room)
        self._start()
        self._watch(self._popen.pid)

    def _poll(self) -> int | None:
        return self._popen.poll()

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

    def _open_terminal(self, children: contextlib.ExitStack) -> tuple[int, int, int]:
        ours, theirs = os.openpty()
        children.callback(os.close, theirs)
        self.outputs[STDOUT] = OutputStream(ours, self._room)
        self.input = InputStream(os.dup(ours), terminal=True)
        return theirs, theirs, theirs


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
