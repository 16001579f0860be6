"""One process of a container as its shim follows it: the init or an exec session, its stdio, its exit.

The agent keeps output and exit until they are acknowledged or forgotten, so following can stop and begin anew at any
moment: in this shim, in a restarted one, or in the destination's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from sandshift.errors import NotFound
from sandshift.sandbox.model import Process, agent_id
from sandshift.shim.processes import Exit, until_done
from sandshift.shim.tasks.offsets import BEGUN, INPUT_ASK, Offsets
from sandshift.shim.tasks.stdin import InputPump
from sandshift.shim.tasks.stdio import Sink, check_stdio, fifo_path, open_sink

if TYPE_CHECKING:
    from pathlib import Path

    from sandshift.guest.client import Guest

STDOUT: Final = 1
STDERR: Final = 2
EXIT_UNKNOWN: Final = 255
"""The guest knows nothing of the process, or no exit of it."""
DRAIN_S: Final = 5.0
"""How long after the end of a process its output may take to come to its end; a grandchild may hold it open for ever."""


class Stdio(msgspec.Struct, frozen=True):
    """Where a process's streams are on this host, as the caller named them."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False

    def check(self) -> None:
        """Raises NotSupported or Rejected, naming the stream, for what is none that this shim can use."""
        if self.stdin:
            fifo_path(self.stdin)
        check_stdio("stdout", self.stdout)
        if not self.terminal:
            check_stdio("stderr", self.stderr)


class ProcessRecord(msgspec.Struct):
    """A process as it is written down for a later shim."""

    exec_id: str = ""
    stdio: Stdio = Stdio()
    pid: int = 0
    started: bool = False
    spec: bytes = b""
    stdin: bool = False
    """The process in the guest has a stdin, whether or not anybody feeds it here."""
    terminal: bool = False
    bound: bool = True
    """Its stdio is that of a caller on this host. Not so of an exec session that has come from elsewhere: Task.Exec with its
    id binds it; until then its output waits in the guest."""
    exit_code: int = -1
    """-1: it has not ended."""
    exited_at_ns: int = 0


class ContainerProcess:
    def __init__(
        self,
        guest_id: str,
        record: ProcessRecord,
        folder: Path,
        on_exit: Callable[[ContainerProcess], None],
        *,
        fresh: bool = False,
    ) -> None:
        """`folder`: of the offsets, which begin at 0 if `fresh`. `on_exit` is called once, when the exit may be told."""
        self.record = record
        self.process_id = agent_id(guest_id, record.exec_id)
        self.exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._may_end = asyncio.Event()
        """Cleared while its caller has not heard of it yet: see `introducing`."""
        self._may_end.set()
        self._end_is_untold = False
        self._offsets = Offsets(folder, self.process_id)
        if fresh:
            self._offsets.clear()
        self._on_exit = on_exit
        self._sinks: dict[int, Sink] = {}
        self._input: InputPump | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._task_exit: asyncio.Task[None] | None = None
        self._frozen = False
        if record.exit_code >= 0:
            self.exit.set_result(Exit(record.exit_code, record.exited_at_ns))

    @property
    def exec_id(self) -> str:
        return self.record.exec_id

    @property
    def exited(self) -> bool:
        return self.exit.done()

    # Streams

    def open_stdio(self) -> None:
        """Open what the caller named. Idempotent. Raises Unavailable, naming what cannot be opened; nothing is open then."""
        if self._sinks or not self.record.bound:
            return
        stdio = self.record.stdio
        named = (
            {STDOUT: stdio.stdout} if self.record.terminal else {STDOUT: stdio.stdout, STDERR: stdio.stderr}
        )
        try:
            for stream, value in named.items():
                self._sinks[stream] = open_sink(value, self._offsets, stream)
            if self.record.stdin and stdio.stdin and not self.exited:
                self._input = InputPump(fifo_path(stdio.stdin), self._offsets, self.process_id)
        except BaseException:
            self.close_stdio()
            raise

    def close_stdio(self) -> None:
        for sink in self._sinks.values():
            sink.close()
        self._sinks = {}
        if self._input is not None:
            self._input.close()
            self._input = None

    def begin_at(self, offsets: Mapping[int, int]) -> None:
        """This process comes from elsewhere, where its streams (1, 2) were delivered up to there. Only the first call counts,
        whichever shim made it: later ones may have delivered more."""
        if self._offsets.has(BEGUN):
            return
        self._offsets.set_flag(BEGUN)
        for stream in (STDOUT, STDERR):
            self._offsets[stream] = offsets.get(stream, 0)
        self._offsets.set_flag(INPUT_ASK)

    def close_input(self) -> None:
        if self._input is not None:
            self._input.close_input()

    def offsets(self) -> dict[tuple[str, int], int]:
        return {(self.process_id, stream): self._offsets[stream] for stream in (STDOUT, STDERR)}

    def freeze(self) -> dict[tuple[str, int], int]:
        """From now on nothing more is taken; (process id, stream) -> first byte not delivered."""
        self._frozen = True
        for sink in self._sinks.values():
            sink.freeze()
        if self._input is not None:
            self._input.freeze()
        return self.offsets()

    def thaw(self, guest: Guest | None) -> None:
        self._frozen = False
        for sink in self._sinks.values():
            sink.thaw()
        if self._input is not None and guest is not None and not self.exited:
            self._input.follow(guest)

    # Following

    def follow(self, guest: Guest) -> None:
        """Follow exit and streams from where they are. Idempotent."""
        if not self.record.pid:
            return
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._follow_stream(guest, sink), name=f"{self.process_id}/{sink.stream}")
                for sink in self._sinks.values()
            ]
        if self._input is not None and not self.exited and not self._frozen:
            self._input.follow(guest)
        if self._task_exit is None and not self.exited:
            self._task_exit = asyncio.create_task(self._follow_exit(guest), name=f"exit {self.process_id}")

    async def _follow_stream(self, guest: Guest, sink: Sink) -> None:
        """Task: ends with the stream, or when cancelled. After an error it begins again: the agent keeps the bytes."""

        async def follow() -> None:
            await guest.follow_output(
                self.process_id, sink.stream, lambda: sink.delivered, sink.take, room=sink.room
            )
            await sink.drained()

        what = f"output {sink.stream} of {self.process_id}"
        await until_done(what, follow, progress=lambda: sink.delivered)
        sink.close()

    async def _follow_exit(self, guest: Guest) -> None:
        async def wait() -> None:
            try:
                code, exited_at_ns = await guest.wait_process(self.process_id)
            except NotFound:
                code, exited_at_ns = EXIT_UNKNOWN, time.time_ns()
            await self._may_end.wait()
            self.end(Exit(code, exited_at_ns))

        await until_done(f"the exit of {self.process_id}", wait, progress=lambda: 0)

    def end(self, exit_: Exit) -> None:
        """The process has ended. The first call counts."""
        if self.exit.done():
            return
        self.record.exit_code, self.record.exited_at_ns = exit_.code, exit_.exited_at_ns
        if self._input is not None:
            self._input.close()
            self._input = None
        self.exit.set_result(exit_)
        if self._may_end.is_set():
            self._on_exit(self)
        else:
            self._end_is_untold = True

    def introducing(self) -> None:
        """It is about to be told of: an end that comes meanwhile, the VM's too, is not told before `introduced`."""
        self._may_end.clear()

    def introduced(self) -> None:
        self._may_end.set()
        if self._end_is_untold:
            self._end_is_untold = False
            self._on_exit(self)

    async def drain(self) -> None:
        """The process has ended: wait until the output is through that somebody takes, for DRAIN_S at most."""
        # None is followed in a sandbox that has ended.
        following = zip(self._tasks, self._sinks.values(), strict=False)
        read = [task for task, sink in following if sink.has_reader()]
        if read:
            await asyncio.wait(read, timeout=DRAIN_S)

    async def let_go(self) -> None:
        """Stop following, without an end: somebody else will. stdio stays open."""
        tasks = [*self._tasks, *([self._task_exit] if self._task_exit else [])]
        self._tasks, self._task_exit = [], None
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for task in tasks:
            if task is not asyncio.current_task():
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._input is not None:
            await self._input.let_go()

    async def close(self) -> None:
        """Follow no more and close everything; what is on disk stays."""
        await self.let_go()
        self.close_stdio()
        self._offsets.close()

    async def forget(self) -> None:
        """The process is deleted."""
        await self.close()
        self._offsets.remove()

    def as_model(self) -> Process:
        record = self.record
        return Process(
            process_id=self.process_id,
            pid=record.pid,
            terminal=record.terminal,
            stdin=record.stdin,
            exec_id=record.exec_id,
            started=record.started,
            spec=b"" if record.pid else record.spec,
        )
