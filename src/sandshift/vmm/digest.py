"""A digest of a stopped guest's memory, from outside: through the memfd that QEMU keeps it in.

Pages that are all zero do not count: one side may hold them as pages and the other as holes. Reading through mmap would
turn holes into pages, so extents are looked up with SEEK_DATA and read with pread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import xxhash

from sandshift.errors import NotSupported, Unavailable

PAGE_BYTES: Final = 4096
CHUNK_BYTES: Final = 1 << 20
ZERO_PAGE: Final = bytes(PAGE_BYTES)


def memory_digest_of_process(pid: int, memory_bytes: int) -> bytes:
    """xxh3_128 over the number and content of every page that is not zero, in order. Blocks: run it in a thread.

    Raises:
        NotSupported: the process has no memfd of that size.
        Unavailable: the process is gone.
    """
    path = memory_file(pid, memory_bytes)
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Unavailable(f"memory of VM process {pid} cannot be read: {error.strerror}") from error
    try:
        return digest_of_file(fd, memory_bytes)
    finally:
        os.close(fd)


def memory_file(pid: int, memory_bytes: int) -> Path:
    """The process's memfd that is the guest's memory, by its size: QEMU has others for its own use."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        for entry in folder.iterdir():
            if _link(entry).startswith("/memfd:memory-backend") and entry.stat().st_size == memory_bytes:
                return entry
    except OSError as error:
        raise Unavailable(f"VM process {pid} is gone or not ours: {error.strerror}") from error
    raise NotSupported(f"VM process {pid} keeps its guest's memory in no memfd: start it with shared memory")


def digest_of_file(fd: int, size_bytes: int) -> bytes:
    digest = xxhash.xxh3_128()
    for start, end in _extents(fd, size_bytes):
        offset = start
        while offset < end:
            chunk = os.pread(fd, min(CHUNK_BYTES, end - offset), offset)
            if not chunk:
                return digest.digest()
            _add_pages(digest, chunk, offset)
            offset += len(chunk)
    return digest.digest()


def _add_pages(digest: xxhash.xxh3_128, chunk: bytes, offset: int) -> None:
    for start in range(0, len(chunk), PAGE_BYTES):
        page = chunk[start : start + PAGE_BYTES]
        if page != ZERO_PAGE:
            digest.update(((offset + start) // PAGE_BYTES).to_bytes(8, "little"))
            digest.update(page)


def _extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where the file has data, as [start, end), page by page."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        yield start, position


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""
