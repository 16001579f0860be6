"""Following one output stream of a process in the guest: read by offset, taken by a sink, acknowledged after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from sandshift.wire.sandshift import agent_pb2 as pb
from sandshift.wire.sandshift.agent_ttrpc import AgentClient
from ttrpc import StatusError

ACK_BYTES: Final = 512 << 10
"""Acknowledged at once when so much was taken since the last time."""
ACK_S: Final = 0.1
"""And after this, whatever was taken."""
RETAKE_S: Final = 0.02
"""How often a sink that takes nothing (frozen for a move) is offered the bytes again."""


class OutputReader:
    """Reads from `delivered()` on and offers each piece to `take(offset, data)`, which answers up to where it has taken.

    A sink that does not take is offered the same bytes until it does; meanwhile the agent's buffer fills and the process
    waits in its write. What the sink has taken is acknowledged, and the agent forgets it.
    """

    def __init__(
        self,
        agent: AgentClient,
        process_id: str,
        stream: int,
        delivered: Callable[[], int],
        take: Callable[[int, bytes], int],
        room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`room`: returns when the sink may take more; without it the sink is asked again and again."""
        self._agent = agent
        self._process_id = process_id
        self._stream = stream
        self._delivered = delivered
        self._take = take
        self._room = room or _a_moment
        self._taken = delivered()
        self._acknowledged = self._taken
        self._some_taken = asyncio.Event()
        self._much_taken = asyncio.Event()

    async def run(self) -> None:
        """Read until the process has closed the stream and all of it was taken.

        Raises:
            StatusError: what the agent answered, or ConnectionClosed.
            Exception: whatever `take` raises; the bytes stay in the agent.
        """
        acknowledging = asyncio.create_task(
            self._task_acknowledge(), name=f"ack {self._process_id}/{self._stream}"
        )
        try:
            while not await self._read_from(self._delivered()):
                pass
        finally:
            acknowledging.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await acknowledging
        await self._acknowledge()

    async def _read_from(self, offset: int) -> bool:
        """Read from `offset` on. Whether the stream's end was reached; else the sink wants to go on elsewhere."""
        request = pb.ReadOutputRequest(process_id=self._process_id, stream=self._stream, offset=offset)
        async with self._agent.read_output(request) as pieces:
            async for piece in pieces:
                if piece.eof:
                    return True
                if not await self._offer(piece.offset, piece.data):
                    return False
        return False

    async def _offer(self, offset: int, data: bytes) -> bool:
        """Give `data` to the sink, again and again until all of it is taken. False: the sink has gone back before it."""
        while (taken := self._take(offset, data)) < offset + len(data):
            if taken < offset:
                return False
            await self._room()
        self._taken = taken
        self._some_taken.set()
        if taken - self._acknowledged >= ACK_BYTES:
            self._much_taken.set()
        return True

    async def _task_acknowledge(self) -> None:
        """Acknowledge while `run` reads. A failure is not told: `run` meets the same."""
        while True:
            await self._some_taken.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACK_S):
                    await self._much_taken.wait()
            self._some_taken.clear()
            self._much_taken.clear()
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        offset = self._taken
        if offset <= self._acknowledged:
            return
        request = pb.AckOutputRequest(process_id=self._process_id, stream=self._stream, offset=offset)
        with contextlib.suppress(StatusError):
            await self._agent.ack_output(request)
            self._acknowledged = offset


async def _a_moment() -> None:
    await asyncio.sleep(RETAKE_S)
