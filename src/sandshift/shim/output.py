"""The output of a sandbox's processes on this host: taken from the agent by offset, kept in a file, acknowledged after.

A byte counts as delivered once it is in the file. The handover record of a migration names that offset; the destination
goes on from there, so no byte is lost and none comes twice. `freeze` marks the moment: from then on nothing more is
taken, whatever still arrives.

The file keeps the last KEPT_BYTES_MAX of a stream. What is older is dropped as a hole at the file's beginning, so that
offsets, and with them a restarted shim and a move, are what they would be without.
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
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
READ_BYTES_MAX: Final = 64 << 10
KEPT_BYTES_MAX: Final = 64 << 20
"""What is kept at least of a stream that says more, as of a log that rotates: these files may lie in memory."""
DROP_BYTES: Final = 16 << 20
"""The oldest is dropped in pieces of this, a multiple of every file system's block. So the file holds no more than both."""
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
        self._first = base + _hole_bytes(self._descriptor)
        self._changed = asyncio.Event()
        self._frozen = False
        self.ended = False

    @property
    def delivered(self) -> int:
        """Offset of the first byte that is not in the file yet."""
        return self._delivered

    @property
    def first(self) -> int:
        """Offset of the first byte that is still in the file."""
        return self._first

    def take(self, offset: int, data: bytes) -> int:
        """Keep `data`, which begins at `offset`; what is there already is skipped. Answers the offset to acknowledge.

        A gap is refused (the caller asks again from `delivered`); after `freeze` nothing is taken. A full disk raises
        Unavailable: the bytes stay in the agent; so does a file system that cannot drop the oldest ones.
        """
        if self._frozen or offset > self._delivered:
            return self._delivered
        self._drop_oldest()
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

    def _drop_oldest(self) -> None:
        """Make the hole longer if as much is held as may be."""
        pieces = (self._delivered - self._first - KEPT_BYTES_MAX) // DROP_BYTES
        if pieces <= 0:
            return
        first = self._first + pieces * DROP_BYTES
        try:
            _make_hole(self._descriptor, first - self.base)
        except OSError as error:
            held = self._delivered - self._first
            raise Unavailable(
                f"{self.path} holds {held} bytes, and the oldest cannot be dropped: {error.strerror};"
                " let RUN_DIR lie on tmpfs, ext4, xfs or btrfs"
            ) from error
        self._first = first

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
        """(offset, data) from `first` on; with `follow` also what comes later, until the stream ends.

        Who reads more slowly than the process writes misses what was dropped meanwhile: the offsets tell.
        """
        at = self.base
        while True:
            changed = self._changed
            at = max(at, self._first)
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


def _hole_bytes(descriptor: int) -> int:
    """The length of the hole that a file begins with."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError:  # empty, or on a file system that knows no holes
        return 0


def _make_hole(descriptor: int, length_bytes: int) -> None:
    """Give the file's first `length_bytes` back to the disk; its length stays. Raises OSError.

    fallocate(2) with FALLOC_FL_PUNCH_HOLE, for which Python has no name.
    """
    import ctypes  # noqa: PLC0415 - seldom needed, and every shim would pay for it

    libc = ctypes.CDLL(None, use_errno=True)
    start, length = ctypes.c_int64(0), ctypes.c_int64(length_bytes)
    if libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, length) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """(process id, stream, base) of every output file that a former shim left in `folder`."""
    found = []
    for path in folder.glob("*.log"):
        process_id, stream, base, _suffix = path.name.rsplit(".", 3)
        found.append((process_id, int(stream), int(base)))
    return sorted(found)
