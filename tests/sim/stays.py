"""What a caller has of a container on one host: the ends of its fifos, and what it was told of its processes' ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from tests.shim.pod import Bundle, Reader

STDOUT: Final = 1
STDERR: Final = 2
PAUSES_S: Final = (0.0, 0.0, 0.02, 0.3, 4.0)
"""How long a reader reads, and how long it does not; 0: it reads all the time."""
FEED_S: Final = 0.02
FEED_LINES_MAX: Final = 400
"""A writer of stdin stops then: what it wrote must come through, and is compared byte by byte."""
FIRST_MARK: Final = ord("A")
"""Lines of stdin begin with a letter of their stay, which is in no line of another."""
MARKS: Final = 26


@dataclass(frozen=True, slots=True)
class Program:
    """A process of the pod, wherever it runs: its id in the guest and what it does."""

    base: str
    exec_id: str
    args: tuple[str, ...]

    @property
    def process_id(self) -> str:
        return f"{self.base}:{self.exec_id}"

    @property
    def echoes(self) -> bool:
        return self.args[0] == "cat"

    def __str__(self) -> str:
        return f"{self.process_id} {' '.join(self.args)}"


class Fifos:
    """The caller's ends of one process's stdio. Its reader may stop and go on; its writer writes numbered lines."""

    def __init__(self, bundle: Bundle, program: Program, random: Random, stay: int) -> None:
        self.bundle = bundle
        self.program = program
        self.written = bytearray()
        self._random = random
        self._stay = stay
        self._fed = -1
        self._lines = 0
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._pause_s = random.choice(PAUSES_S)
        for reader in self._readers:
            reader.hold()
        self._read()
        if program.echoes:
            self._fed = os.open(bundle.paths["stdin"], os.O_RDWR | os.O_NONBLOCK)
            self._timers["feed"] = self._loop.call_later(FEED_S, self._feed)

    @property
    def _readers(self) -> tuple[Reader, Reader]:
        return self.bundle.stdout, self.bundle.stderr

    def data(self, stream: int) -> bytes:
        """All that came, what is still in the fifo too."""
        reader = self._readers[stream - 1]
        while reader._fd >= 0 and _take(reader):
            pass
        return bytes(reader.data)

    def _read(self) -> None:
        for reader in self._readers:
            reader.read()
        if self._pause_s:
            self._timers["read"] = self._loop.call_later(self._another_while(), self._pause)

    def _pause(self) -> None:
        for reader in self._readers:
            self._loop.remove_reader(reader._fd)
        self._timers["read"] = self._loop.call_later(self._another_while(), self._read)

    def _another_while(self) -> float:
        return self._random.uniform(0, 2 * self._pause_s)

    def read_on(self) -> None:
        """From now on it reads all the time."""
        self._pause_s = 0.0
        if (timer := self._timers.pop("read", None)) is not None:
            timer.cancel()
        self._read()

    def _feed(self) -> None:
        if self._fed < 0 or self._lines >= FEED_LINES_MAX:
            return
        lines = b"".join(
            b"%c%08d\n" % (FIRST_MARK + self._stay % MARKS, self._lines + more)
            for more in range(self._random.randrange(1, 9))
        )
        with contextlib.suppress(BlockingIOError):
            count = os.write(self._fed, lines)
            assert count == len(lines), "a pipe takes less than PIPE_BUF whole"
            self.written += lines
            self._lines += len(lines) // 10
        self._timers["feed"] = self._loop.call_later(self._random.uniform(0, 2 * FEED_S), self._feed)

    def stop_feeding(self) -> None:
        """The writer hangs up; what it wrote stays in the fifo."""
        if (timer := self._timers.pop("feed", None)) is not None:
            timer.cancel()

    def hang_up(self) -> None:
        self.stop_feeding()
        if self._fed >= 0:
            os.close(self._fed)
            self._fed = -1

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self.hang_up()
        self.bundle.close()


def _take(reader: Reader) -> bool:
    try:
        data = os.read(reader._fd, 1 << 20)
    except BlockingIOError:
        return False
    reader.data += data
    return bool(data)


@dataclass(eq=False)
class Stay:
    """One container on one host, from its Task.Create there on."""

    number: int
    host: str
    session_id: str
    """By which it came; empty: it was made there."""
    container_id: str
    base: str
    fifos: dict[str, Fifos]
    """Of its init ("") and of the exec sessions that have their caller here."""
    bound: set[str] = field(default_factory=set)
    """Exec sessions whose Start was answered here."""
    exits: dict[str, int] = field(default_factory=dict)
    """What Wait answered."""
    made: bool = False
    """Its Task.Create was answered."""
    gone: bool = False
    """Its shim knows nothing of it any more."""
    deleted: bool = False

    def __str__(self) -> str:
        return f"{self.container_id}@{self.host}"


def bundle_for(folder: Path, name: str, program: Program, *, annotations: dict[str, str]) -> Bundle:
    args: Sequence[str] = program.args
    return Bundle(folder, name, args, stdin=program.echoes, annotations=annotations, reads=False)
