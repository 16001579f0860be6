"""stdin of a container's process: from the caller's fifo to the agent, by offset.

Bytes are looked at (tee) and sent, and taken out of the fifo only when the agent has them: so a shim that is killed, or a
guest that moves away in the middle, loses none and sends none twice. What is still in the fifo then was never the guest's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import stat
from typing import TYPE_CHECKING, Final, Protocol

from sandshift.errors import Rejected, Unavailable
from sandshift.shim.processes import until_done
from sandshift.shim.tasks.offsets import INPUT_ASK, INPUT_CLOSED, STDIN, Offsets
from sandshift.shim.tasks.stdio import readable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 10
SPLICE_F_NONBLOCK: Final = 2
"""Source: include/linux/splice.h."""


class TakesInput(Protocol):
    async def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool = False) -> int: ...


class InputPump:
    """Reads the fifo while the process lives. A writing end of ours keeps it open, so that a caller who goes away (a
    containerd that ends and comes again) is no end of input: only CloseIO makes it one."""

    def __init__(self, path: Path, offsets: Offsets, process_id: str) -> None:
        """Raises Unavailable if the fifo cannot be opened; Rejected if it is none."""
        self._offsets = offsets
        self._process_id = process_id
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        """The last one that was told to stop: it may still be waiting on a descriptor."""
        self._fifo = self._keeper = -1
        try:
            if not stat.S_ISFIFO(path.stat().st_mode):
                raise Rejected(f"stdin path {path} is not a fifo: make it with mkfifo, or leave stdin empty")
            self._fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not offsets.has(INPUT_CLOSED):
                self._keeper = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise Unavailable(f"stdin fifo {path} cannot be opened: {error.strerror}") from error
        self._look_in, self._look_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def follow(self, guest: TakesInput) -> None:
        """Begin to pump, or go on; what the agent has is asked first."""
        if self._task is None and self._fifo >= 0:
            self._task = asyncio.create_task(self._run(guest), name=f"stdin {self._process_id}")

    async def let_go(self) -> None:
        """Stop, at any point; what becomes of a piece on its way the agent says later."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def freeze(self) -> None:
        """Stop at once, without waiting."""
        if self._task is not None:
            self._task.cancel()
            self._ending, self._task = self._task, None

    def close_input(self) -> None:
        """CloseIO: when all that callers have written is through, and they have closed their ends, stdin ends."""
        self._offsets.set_flag(INPUT_CLOSED)
        if self._keeper >= 0:
            os.close(self._keeper)
            self._keeper = -1

    def close(self) -> None:
        """The process has ended. Idempotent. The descriptors go when nobody waits on them any more."""
        self.freeze()
        if self._ending is not None and not self._ending.done():
            self._ending.add_done_callback(lambda _task: self._close())
        else:
            self._close()

    def _close(self) -> None:
        for name in ("_fifo", "_keeper", "_look_in", "_look_out"):
            descriptor = getattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)
            setattr(self, name, -1)

    async def _run(self, guest: TakesInput) -> None:
        """Task: ends with the input, with the process, or when cancelled. After an error of the agent's it begins again."""
        what = f"stdin of {self._process_id}"
        try:
            await until_done(what, lambda: self._pump(guest), progress=lambda: self._offsets[STDIN])
        except OSError as error:
            log.warning("%s is not pumped any more: %s", what, error)

    async def _pump(self, guest: TakesInput) -> None:
        await self._catch_up(guest)
        while (data := await self._look()) is not None:
            at = self._offsets[STDIN]
            self._consume(await guest.write_input(self._process_id, at, data) - at)
        await guest.write_input(self._process_id, self._offsets[STDIN], b"", eof=True)

    async def _catch_up(self, guest: TakesInput) -> None:
        """What the agent took and an earlier shim did not take out of the fifo any more."""
        taken = await guest.write_input(self._process_id, 0, b"")
        if self._offsets.has(INPUT_ASK):
            self._offsets[STDIN] = taken
            self._offsets.set_flag(INPUT_ASK, on=False)
        self._consume(taken - self._offsets[STDIN])

    async def _look(self) -> bytes | None:
        """What is in the fifo next, still in there; None at the end of input."""
        while True:
            try:
                count = tee(self._fifo, self._look_out, PIECE_BYTES)
            except BlockingIOError:
                await readable(self._fifo)
                continue
            if not count and not self._offsets.has(INPUT_CLOSED):
                await readable(self._fifo)
                continue
            return os.read(self._look_in, count) if count else None

    def _consume(self, count: int) -> None:
        while count > 0 and (data := os.read(self._fifo, min(count, PIECE_BYTES))):
            self._offsets[STDIN] += len(data)
            count -= len(data)


@functools.cache
def _tee() -> Callable[[int, int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).tee
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    function.restype = ctypes.c_ssize_t
    return function


def tee(source: int, target: int, count: int) -> int:
    """Copy what is in one pipe to another, and leave it there; 0: empty, and nobody can write. Source: tee(2).

    Raises:
        BlockingIOError: empty, or `target` is full.
    """
    copied = _tee()(source, target, count, SPLICE_F_NONBLOCK)
    if copied < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return copied
