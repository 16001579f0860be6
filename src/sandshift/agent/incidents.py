"""What happens to containers beyond their processes' ends: memory ran out. Kept, numbered, told as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from sandshift.agent import libc
from sandshift.agent.cgroup import Group

KEPT_MAX: Final = 1000
_EVENTS_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Incident:
    number: int
    container_id: str
    kind: str
    at_ns: int


class Incidents:
    def __init__(self) -> None:
        self._kept: deque[Incident] = deque(maxlen=KEPT_MAX)
        self._next = 1
        self._more = asyncio.Event()
        self._kills: dict[str, int] = {}
        self._groups: dict[str, Group] = {}
        self._descriptor = -1

    def watch(self, container_id: str, group: Group) -> None:
        """Look after a container from now on. Where the kernel cannot, it is looked at when its init ends."""
        self._groups[container_id] = group
        self._kills[container_id] = group.oom_kills()
        if self._descriptor < 0:
            self._descriptor = libc.inotify()
            asyncio.get_running_loop().add_reader(self._descriptor, self._changed)
        with contextlib.suppress(OSError):
            libc.watch(self._descriptor, str(group.path / "memory.events"), libc.IN_MODIFY)

    def look(self, container_id: str) -> None:
        """Write down what has happened to it by now."""
        group = self._groups.get(container_id)
        if group is None or (kills := group.oom_kills()) <= self._kills[container_id]:
            return
        self._kills[container_id] = kills
        self._kept.append(Incident(self._next, container_id, "oom", time.time_ns()))
        self._next += 1
        self._more.set()

    def drop(self, container_id: str) -> None:
        """It is removed. What has happened to it stays."""
        self._groups.pop(container_id, None)
        self._kills.pop(container_id, None)

    async def follow(self, from_number: int) -> AsyncIterator[Incident]:
        """From a number on, as they come, for ever."""
        following = max(from_number, 1)
        while True:
            for one in list(self._kept):
                if one.number >= following:
                    following = one.number + 1
                    yield one
            if following >= self._next:
                self._more.clear()
                await self._more.wait()

    def close(self) -> None:
        """Watch nobody any more."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _changed(self) -> None:
        """Some group has changed. Which one does not matter: there are few, and looking is cheap."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, _EVENTS_BYTES)
        for container_id in list(self._groups):
            self.look(container_id)
