"""The client: keeps asking for the next number on one connection, and writes down every answer and when it came.

It sends at a fixed beat, whether answers come or not, so that a silence shows to within one beat. What the record
proves is decided in `proof.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from sandshift import net
from sandshift.errors import PeerProtocolError, SandshiftError, TimedOut, Unavailable

BEAT_S: Final = 0.005
LINE_BYTES_MAX: Final = 65536
_CONNECT_AGAIN_S: Final = 0.05
_DRAIN_S: Final = 5.0
_ASKED_UNANSWERED_MAX: Final = 20_000
"""100 s of beats: beyond it the connection is taken for dead."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request. Times are monotonic, ns."""

    number: int
    nonce_matched: bool
    asked_ns: int
    answered_ns: int


class CounterClient:
    """One connection to the counter service. `answers` grows while it talks; `failure` says why it ended, if it did."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.answers: list[Answer] = []
        self.failure: str = ""
        self._reader = reader
        self._writer = writer
        self._asked: deque[tuple[bytes, int]] = deque()
        self._count = 0
        self._task: asyncio.Task[None] | None = None
        self._asking = True
        self._settled = asyncio.Event()
        """No more is asked and all is answered, or no more will be."""

    @classmethod
    async def connect(cls, namespace: str, address: str, port: int, *, timeout_s: float) -> CounterClient:
        """Connect from the network namespace, retrying until the service listens.

        Raises:
            TimedOut: nobody listened within `timeout_s`.
        """
        connection = await _connect_until(namespace, address, port, timeout_s)
        return cls(*await asyncio.open_connection(sock=connection, limit=LINE_BYTES_MAX))

    @property
    def unanswered(self) -> int:
        return len(self._asked)

    def start(self) -> None:
        """Talk from now on, until `stop`."""
        self._task = asyncio.create_task(self._talk(), name="demo-client")

    async def stop(self) -> None:
        """Ask no more, wait for what is still unanswered (bounded), and close. Never raises for a dead connection."""
        self._asking = False
        if self._task and self._asked and not self.failure:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), _DRAIN_S)
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def cut(self) -> None:
        """Reset the connection, as a firewall would: for the negative control."""
        self._writer.transport.abort()

    async def _talk(self) -> None:
        asking = asyncio.create_task(self._ask(), name="demo-client-ask")
        try:
            await self._listen()
        except (OSError, SandshiftError) as error:
            self.failure = str(error) or type(error).__name__
        finally:
            self._settled.set()
            asking.cancel()

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        beat_s = loop.time()
        while self._asking:
            nonce = b"%x" % self._count
            self._count += 1
            self._asked.append((nonce, time.monotonic_ns()))
            self._writer.write(b"N %s\n" % nonce)
            beat_s = max(beat_s + BEAT_S, loop.time())
            await asyncio.sleep(beat_s - loop.time())

    async def _listen(self) -> None:
        rest = b""
        while True:
            data = await self._reader.read(LINE_BYTES_MAX)
            if not data:
                raise Unavailable("the service, or something between, closed the connection")
            now_ns = time.monotonic_ns()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line, now_ns)
            if len(self._asked) > _ASKED_UNANSWERED_MAX:
                raise TimedOut(f"{len(self._asked)} requests are unanswered")
            if not self._asking and not self._asked:
                self._settled.set()

    def _take(self, line: bytes, now_ns: int) -> None:
        number, _, nonce = line.partition(b" ")
        if not self._asked or not number.isdigit():
            raise PeerProtocolError(f"the service answered {line[:80]!r}, which nobody asked for")
        asked_nonce, asked_ns = self._asked.popleft()
        self.answers.append(Answer(int(number), nonce == asked_nonce, asked_ns, now_ns))


async def ask_service(
    namespace: str, address: str, port: int, command: str, *, timeout_s: float
) -> dict[str, object]:
    """One command to the service, on a connection of its own: "CHECK", "STATUS" or "WHO". Returns its JSON.

    Raises:
        TimedOut, Unavailable: no answer. PeerProtocolError: not JSON.
    """
    try:
        async with asyncio.timeout(timeout_s):
            connection = await net.connect_tcp(namespace, address, port, timeout_s=timeout_s)
            reader, writer = await asyncio.open_connection(sock=connection, limit=LINE_BYTES_MAX)
            try:
                writer.write(command.encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise TimedOut(f"the workload did not answer {command} within {timeout_s:g} s") from error
    except OSError as error:
        raise Unavailable(f"the workload did not answer {command}: {error.strerror}") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise PeerProtocolError(f"the workload answered {command} with {line[:80]!r}") from error
    if not isinstance(answer, dict):
        raise PeerProtocolError(f"the workload answered {command} with {line[:80]!r}")
    return answer


async def _connect_until(namespace: str, address: str, port: int, timeout_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        left_s = deadline_s - loop.time()
        try:
            return await net.connect_tcp(namespace, address, port, timeout_s=max(left_s, _CONNECT_AGAIN_S))
        except (Unavailable, TimedOut) as error:
            if loop.time() >= deadline_s:
                raise TimedOut(f"nobody listened on {address} port {port} within {timeout_s:g} s") from error
        await asyncio.sleep(_CONNECT_AGAIN_S)
