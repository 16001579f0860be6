"""Harm done to a guest from outside: one byte of one page of the pattern, through /proc/PID/mem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sandshift.cli.demo.workload import PAGE_BYTES, RECORD, pattern_page

CHUNK_BYTES = 8 << 20


def alter_page(pid: int, marker: bytes) -> int:
    """Flip one bit in the middle of a whole page of the pattern in this process's memory; returns the page's number."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for address, held in _pattern_pages(pid, memory, marker):
            _, number, _ = RECORD.unpack_from(held)
            os.pwrite(memory.fileno(), bytes([held[2048] ^ 1]), address + 2048)
            return number
    raise AssertionError(f"process {pid} holds no page of the pattern")


def generations(pid: int, marker: bytes) -> dict[int, int]:
    """Page number -> generation of every whole page of the pattern in this process's memory."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        records = [RECORD.unpack_from(held) for _, held in _pattern_pages(pid, memory, marker)]
    return {number: generation for _, number, generation in records}


def _pattern_pages(pid: int, memory, marker: bytes) -> Iterator[tuple[int, bytes]]:
    for start, end in _writable_anonymous(pid):
        for chunk_start in range(start, end, CHUNK_BYTES):
            try:
                chunk = os.pread(memory.fileno(), min(CHUNK_BYTES, end - chunk_start), chunk_start)
            except OSError:
                continue
            for offset in range(0, len(chunk), PAGE_BYTES):
                held = chunk[offset : offset + PAGE_BYTES]
                if held.startswith(marker) and held == pattern_page(*RECORD.unpack_from(held)):
                    yield chunk_start + offset, held


def _writable_anonymous(pid: int) -> Iterator[tuple[int, int]]:
    """The largest first: a guest's memory is the largest that QEMU has."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access.startswith("rw") and (inode == "0" or "memfd:" in "".join(name)):
            start, end = (int(part, 16) for part in span.split("-"))
            found.append((start, end))
    yield from sorted(found, key=lambda span: span[0] - span[1])
