"""Control groups of containers (version 2): what they count, who is in them, freezing, killing, removing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

from ttrpc import Code, StatusError

TOP: Final = Path("/sys/fs/cgroup")
POD: Final = "pod"
CONTROLLERS: Final = ("cpu", "memory", "pids", "io", "cpuset", "hugetlb")
"""What containers can be limited in, where the kernel has it."""
SETTLES_S: Final = 10.0
"""How long freezing and ending may take."""
_LOOK_S: Final = 0.002


def delegate(top: Path = TOP) -> None:
    """Make the pod's group, with every controller that the kernel has. Idempotent."""
    has = set((top / "cgroup.controllers").read_text().split())
    wanted = " ".join(f"+{name}" for name in CONTROLLERS if name in has)
    (top / "cgroup.subtree_control").write_text(wanted)
    (top / POD).mkdir(exist_ok=True)
    (top / POD / "cgroup.subtree_control").write_text(wanted)


def path_of(container_id: str) -> str:
    """As a spec's cgroupsPath names it."""
    return f"/{POD}/{container_id}"


class Group:
    """The group of one container; all of it may be gone."""

    def __init__(self, container_id: str, top: Path = TOP) -> None:
        self.path = top / POD / container_id

    def pids(self) -> list[int]:
        """Everybody in it and in the groups below it, ascending."""
        found: set[int] = set()
        for folder, _, _ in os.walk(self.path):
            found.update(int(line) for line in _text(Path(folder) / "cgroup.procs").split())
        return sorted(found)

    def signal(self, number: int) -> None:
        """Send everybody in it a signal."""
        if number == signal.SIGKILL:
            self.kill()
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill everybody in it, frozen or not."""
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")

    async def freeze(self, *, frozen: bool) -> None:
        """Freeze or thaw everybody in it; returns when that is so.

        Raises:
            StatusError: NOT_FOUND: it is gone; DEADLINE_EXCEEDED.
        """
        try:
            (self.path / "cgroup.freeze").write_text("1" if frozen else "0")
        except OSError as error:
            raise StatusError(
                Code.NOT_FOUND, f"container {self.path.name} has no processes any more"
            ) from error
        if not await self._settles("frozen", "1" if frozen else "0"):
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"container {self.path.name} does not stand still within {SETTLES_S:g} s",
            )

    async def remove(self) -> None:
        """Kill whoever is left, and remove it with all below it. Idempotent.

        Raises:
            StatusError: DEADLINE_EXCEEDED: something in it does not end.
        """
        self.kill()
        if not await self._settles("populated", "0"):
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"container {self.path.name}: processes {self.pids()} do not end within {SETTLES_S:g} s",
            )
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                Path(folder).rmdir()

    async def _settles(self, name: str, value: str) -> bool:
        """Wait until cgroup.events says so. True if the group is gone."""
        deadline_s = time.monotonic() + SETTLES_S
        while fields(_text(self.path / "cgroup.events")).get(name, value) != value:
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def oom_kills(self) -> int:
        return number(fields(_text(self.path / "memory.events")).get("oom_kill", "0"))

    def stats(self) -> dict[str, int]:
        """By the names of ContainerStatsResponse. What the kernel does not count is left out."""
        cpu, memory = fields(_text(self.path / "cpu.stat")), fields(_text(self.path / "memory.stat"))
        told = {
            "cpu_usage_us": cpu.get("usage_usec"),
            "cpu_user_us": cpu.get("user_usec"),
            "cpu_system_us": cpu.get("system_usec"),
            "cpu_throttled_periods": cpu.get("nr_throttled"),
            "cpu_throttled_us": cpu.get("throttled_usec"),
            "memory_usage_bytes": _text(self.path / "memory.current"),
            "memory_limit_bytes": _text(self.path / "memory.max"),
            "memory_anon_bytes": memory.get("anon"),
            "memory_file_bytes": memory.get("file"),
            "memory_peak_bytes": _text(self.path / "memory.peak"),
            "pids_current": _text(self.path / "pids.current"),
            "pids_limit": _text(self.path / "pids.max"),
        }
        counted = {name: number(text) for name, text in told.items() if text}
        read_bytes, written_bytes = io_bytes(_text(self.path / "io.stat"))
        return {
            **counted,
            "oom_kills": self.oom_kills(),
            "io_read_bytes": read_bytes,
            "io_write_bytes": written_bytes,
        }


def fields(text: str) -> dict[str, str]:
    """A file of lines "name value"."""
    return dict(line.split(" ", 1) for line in text.splitlines() if " " in line)


def number(text: str) -> int:
    """A value; "max" is 0: no limit."""
    word = text.strip()
    return int(word) if word.isdigit() else 0


def io_bytes(text: str) -> tuple[int, int]:
    """Read and written, over all disks, from io.stat."""
    words = [word.partition("=") for word in text.split()]
    return (
        sum(number(value) for name, _, value in words if name == "rbytes"),
        sum(number(value) for name, _, value in words if name == "wbytes"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
