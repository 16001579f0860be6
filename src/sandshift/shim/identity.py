"""Which process a pid means: with the time of its start it names one process, however pids are used again."""

from __future__ import annotations


def started_ticks_of(pid: int) -> int:
    """Clock ticks from boot to the start of `pid`, as /proc says: with the pid it names one process. -1: no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - `start` is timed and does without pathlib
            stat = file.read()
    except OSError:
        return -1
    return int(stat.rpartition(")")[2].split()[19])
