"""The processes of a sandbox as its shim follows them: start, output, exit; frozen during a move, taken up again after.

The agent keeps output and exit codes until they are acknowledged, so following can stop and begin anew at any offset,
in this shim, in a restarted one, or in the destination's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import AlreadyThere, NotFound, SandshiftError
from sandshift.guest.client import Guest
from sandshift.sandbox import codec
from sandshift.sandbox.model import Process
from sandshift.shim.output import NAME_PATTERN, STREAMS, OutputFile, files_in

log = logging.getLogger(__name__)

AGAIN_FIRST_S: Final = 0.5
AGAIN_MAX_S: Final = 30.0
"""Between two tries to follow what could not be followed; doubled each time, from the first again once something came."""


@dataclass(slots=True)
class Exit:
    code: int
    exited_at_ns: int


class FollowedProcess:
    """One process: its two output files and the future of its exit."""

    def __init__(
        self, process_id: str, pid: int, args: tuple[str, ...], folder: Path, bases: Mapping[int, int]
    ) -> None:
        self.process_id = process_id
        self.pid = pid
        self.args = args
        self.outputs = {
            stream: OutputFile(folder, process_id, stream, bases.get(stream, 0)) for stream in STREAMS
        }
        self.exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def exited(self) -> bool:
        return self.exit.done() and not self.exit.cancelled()

    def offsets(self) -> dict[int, int]:
        return {stream: output.delivered for stream, output in self.outputs.items()}


class Processes:
    """All processes of the sandbox that were started with RunProcess."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guest: Guest | None = None
        self._all: dict[str, FollowedProcess] = {}
        self.frozen = False
        """Since the guest stopped for its last pass: what is adopted or followed only then takes nothing either."""

    @property
    def followed(self) -> bool:
        return self._guest is not None

    def all(self) -> list[FollowedProcess]:
        return list(self._all.values())

    def get(self, process_id: str) -> FollowedProcess:
        try:
            return self._all[process_id]
        except KeyError:
            known = ", ".join(sorted(self._all)) or "none"
            raise NotFound(f"process {process_id!r} is not one of this sandbox's; it has: {known}") from None

    async def run(self, process_id: str, args: list[str], env: dict[str, str], cwd: str) -> FollowedProcess:
        """Start a process. Calling twice with the same id and arguments is one call; other arguments: AlreadyThere."""
        known = self._all.get(process_id)
        if known is not None:
            if known.args != tuple(args):
                raise AlreadyThere(
                    f"process {process_id!r} exists with other arguments: {' '.join(known.args)}"
                )
            return known
        assert self._guest is not None
        pid = await self._guest.start_process(process_id, args, env=env, cwd=cwd)
        return self.adopt(process_id, pid, args, {})

    def adopt(
        self, process_id: str, pid: int, args: Iterable[str], bases: Mapping[int, int]
    ) -> FollowedProcess:
        """Know a process that exists in the guest; its output is followed from `bases` (stream -> offset) on.

        Raises Rejected for an id that is none: it may be the guest's word, and becomes the name of a file of this host.
        """
        if process_id in self._all:
            return self._all[process_id]
        codec.process_id(process_id)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        process = FollowedProcess(process_id, pid, tuple(args), self._folder, bases)
        self._all[process_id] = process
        if self.frozen:
            _freeze(process)
        if self._guest is not None:
            self._follow(process)
        return process

    def forget_output(self) -> None:
        """Remove what an earlier stay of this sandbox on this host left."""
        for process_id, stream, base in files_in(self._folder):
            (self._folder / NAME_PATTERN.format(process_id=process_id, stream=stream, base=base)).unlink(
                missing_ok=True
            )

    def bases_on_disk(self) -> dict[str, dict[int, int]]:
        """Process id -> stream -> base offset of the files that a former shim of this sandbox left."""
        bases: dict[str, dict[int, int]] = {}
        for process_id, stream, base in files_in(self._folder):
            bases.setdefault(process_id, {})[stream] = base
        return bases

    def offsets_on_disk(self) -> dict[tuple[str, int], int]:
        """(process id, stream) -> first byte not delivered, by the files that a former shim of this sandbox left."""
        return {
            (process_id, stream): base
            + (self._folder / NAME_PATTERN.format(process_id=process_id, stream=stream, base=base))
            .stat()
            .st_size
            for process_id, stream, base in files_in(self._folder)
        }

    def follow(self, guest: Guest) -> None:
        """Follow every process through `guest` from where its files end."""
        self._guest = guest
        for process in self._all.values():
            if not self.frozen:
                _thaw(process)
            self._follow(process)

    def _follow(self, process: FollowedProcess) -> None:
        if process.tasks or process.exited:
            return
        process.tasks = [
            asyncio.create_task(
                self._follow_stream(process, output), name=f"output {process.process_id}/{stream}"
            )
            for stream, output in process.outputs.items()
        ] + [asyncio.create_task(self._follow_exit(process), name=f"exit {process.process_id}")]

    async def _follow_stream(self, process: FollowedProcess, output: OutputFile) -> None:
        """Ends with the stream, or when cancelled. After an error (a full disk, say) it begins again: the agent keeps the bytes."""
        guest = self._guest
        assert guest is not None

        async def follow() -> None:
            await guest.follow_output(
                process.process_id, output.stream, lambda: output.delivered, output.take
            )
            output.end()

        what = f"output {output.stream} of {process.process_id}"
        await until_done(what, follow, progress=lambda: output.delivered)

    async def _follow_exit(self, process: FollowedProcess) -> None:
        guest = self._guest
        assert guest is not None

        async def wait() -> None:
            code, exited_at_ns = await guest.wait_process(process.process_id)
            if not process.exit.done():
                process.exit.set_result(Exit(code, exited_at_ns))

        await until_done(f"the exit of {process.process_id}", wait, progress=lambda: 0)

    def freeze(self) -> dict[tuple[str, int], int]:
        """From now on nothing more is taken. Answers (process id, stream) -> first byte not delivered."""
        self.frozen = True
        for process in self._all.values():
            _freeze(process)
        return {
            (process.process_id, stream): offset
            for process in self._all.values()
            for stream, offset in process.offsets().items()
        }

    def thaw(self) -> None:
        """The sandbox stays here: take output again from where it was frozen."""
        self.frozen = False
        for process in self._all.values():
            _thaw(process)

    def as_model(self) -> tuple[Process, ...]:
        """The processes that still run or whose output is not all delivered, for the saved state."""
        return tuple(Process(process.process_id, process.pid, process.args) for process in self._all.values())

    async def let_go(self) -> None:
        """Stop following, without an end: somebody else will."""
        tasks = [task for process in self._all.values() for task in process.tasks]
        for process in self._all.values():
            process.tasks = []
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._guest = None

    async def end_all(self, exit_: Exit) -> None:
        """The sandbox is gone: every process has ended with `exit_`, unless it had before."""
        await self.let_go()
        for process in self._all.values():
            if not process.exit.done():
                process.exit.set_result(exit_)
            for output in process.outputs.values():
                output.end()

    async def logs(
        self, process_id: str, stream: int, *, follow: bool
    ) -> AsyncIterator[tuple[int, int, bytes]]:
        """(stream, offset, data) of one stream, or of both as it comes (0)."""
        process = self.get(process_id)
        if stream in process.outputs:
            async for offset, data in process.outputs[stream].read(follow=follow):
                yield stream, offset, data
            return
        async for item in _merged(
            [_tagged(number, output, follow=follow) for number, output in process.outputs.items()]
        ):
            yield item


def _freeze(process: FollowedProcess) -> None:
    for output in process.outputs.values():
        output.freeze()


def _thaw(process: FollowedProcess) -> None:
    for output in process.outputs.values():
        output.thaw()


async def until_done(what: str, work: Callable[[], Awaitable[None]], *, progress: Callable[[], int]) -> None:
    """Do `work` until it succeeds, or the agent says that there is no such thing. The same error is logged once."""
    pause_s, said = AGAIN_FIRST_S, ""
    while True:
        before = progress()
        try:
            await work()
        except NotFound as error:
            log.warning("%s is not followed any more: %s", what, error)
            return
        except SandshiftError as error:
            if error.message != said:
                said = error.message
                log.warning("%s is not followed, which is tried again: %s", what, error)
        else:
            return
        if progress() != before:
            pause_s = AGAIN_FIRST_S
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, AGAIN_MAX_S)


async def _tagged(stream: int, output: OutputFile, *, follow: bool) -> AsyncIterator[tuple[int, int, bytes]]:
    async for offset, data in output.read(follow=follow):
        yield stream, offset, data


async def _merged(
    sources: list[AsyncIterator[tuple[int, int, bytes]]],
) -> AsyncIterator[tuple[int, int, bytes]]:
    """What the sources give, as it comes; ends with the last of them."""
    waiting = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while waiting:
            done, _pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                try:
                    yield future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(source))] = source
    finally:
        for future in waiting:
            future.cancel()
