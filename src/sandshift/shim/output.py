"""The output of a sandbox's processes on this host: taken from the agent by offset, kept in a file, acknowledged after.

A byte counts as delivered once it is in the file. The handover record of a migration names that offset; the destination
goes on from there, so no byte is lost and none comes twice. `freeze` marks the moment: from then on nothing more is
taken, whatever still arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from sandshift.errors import Unavailable

STDOUT: Final = 1
STDERR: Final = 2
STREAMS: Final = (STDOUT, STDERR)
READ_BYTES_MAX: Final = 64 << 10
NAME_PATTERN: Final = "{process_id}.{stream}.{base}.log"


class OutputFile:
    """What one stream of one process has said on this host, from the offset `base` on."""

    def __init__(self, folder: Path, process_id: str, stream: int, base: int) -> None:
        self.process_id = process_id
        self.stream = stream
        self.base = base
        self.path = folder / NAME_PATTERN.format(process_id=process_id, stream=stream, base=base)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be opened: {error.strerror}") from error
        self._delivered = base + os.fstat(self._descriptor).st_size
        self._changed = asyncio.Event()
        self._frozen = False
        self.ended = False

    @property
    def delivered(self) -> int:
        """Offset of the first byte that is not in the file yet."""
        return self._delivered

    def take(self, offset: int, data: bytes) -> int:
        """Keep `data`, which begins at `offset`; what is there already is skipped. Answers the offset to acknowledge.

        A gap is refused (the caller asks again from `delivered`); after `freeze` nothing is taken. A full disk raises
        Unavailable: the bytes stay in the agent.
        """
        if self._frozen or offset > self._delivered:
            return self._delivered
        fresh = memoryview(data)[self._delivered - offset :]
        try:
            while fresh:
                written = os.write(self._descriptor, fresh)
                fresh = fresh[written:]
                self._delivered += written
        except OSError as error:
            raise Unavailable(
                f"{self.path} cannot be written: {error.strerror}; free space on its disk"
            ) from error
        finally:
            self._wake()
        return self._delivered

    def freeze(self) -> int:
        self._frozen = True
        return self._delivered

    def thaw(self) -> None:
        self._frozen = False

    def end(self) -> None:
        """The process has closed this stream and all of it is here."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, *, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        """(offset, data) from the beginning on; with `follow` also what comes later, until the stream ends."""
        at = self.base
        while True:
            changed = self._changed
            data = os.pread(self._descriptor, READ_BYTES_MAX, at - self.base)
            if data:
                yield at, data
                at += len(data)
            elif self.ended or not follow:
                return
            else:
                await changed.wait()

    def close(self) -> None:
        self.end()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """(process id, stream, base) of every output file that a former shim left in `folder`."""
    found = []
    for path in folder.glob("*.log"):
        process_id, stream, base, _suffix = path.name.rsplit(".", 3)
        found.append((process_id, int(stream), int(base)))
    return sorted(found)
