"""What a process takes on this host, as the kernel counts it. Source: proc(5), /proc/PID/stat."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_USER, _SYSTEM, _THREADS, _RESIDENT = 11, 12, 17, 21
"""Fields behind the command's closing bracket, which may hold anything itself."""


@dataclass(frozen=True, slots=True)
class Usage:
    user_us: int = 0
    system_us: int = 0
    threads: int = 0
    resident_bytes: int = 0


def usage_of(pid: int) -> Usage:
    """Nothing, for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Usage()
    return Usage(
        user_us=int(fields[_USER]) * 1_000_000 // _TICKS_PER_S,
        system_us=int(fields[_SYSTEM]) * 1_000_000 // _TICKS_PER_S,
        threads=int(fields[_THREADS]),
        resident_bytes=int(fields[_RESIDENT]) * _PAGE_BYTES,
    )
