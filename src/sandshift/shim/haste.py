"""The shim's threads before other work of the host, for as long as a guest may have to wait for them.

In the blackout the guest runs nowhere until the two shims have passed the right to run: some ten steps of a fraction of a
millisecond, each of which waits for a core. On a host whose cores are busy that wait is most of the handover. A shim
sleeps nearly always, so nobody misses what it takes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Final, Protocol

HASTE_STEPS: Final = 10
"""By how much the niceness falls: nine times the weight. Source: linux/kernel/sched/core.c, sched_prio_to_weight."""
NICE_MIN: Final = -20


class Haste(Protocol):
    """Both are idempotent and never fail."""

    def begin(self) -> None: ...

    def end(self) -> None: ...


class NoHaste:
    """For a shim that is one of many in a process."""

    def begin(self) -> None:
        return

    def end(self) -> None:
        return


class ThreadHaste:
    """Of all threads of this process. What is started meanwhile inherits it: begin when the VM's process is there.

    Does nothing where this process may not (no CAP_SYS_NICE).
    """

    def __init__(
        self,
        *,
        get: Callable[[int, int], int] = os.getpriority,
        put: Callable[[int, int, int], None] = os.setpriority,
    ) -> None:
        self._get = get
        self._put = put
        self._usual: int | None = None
        """The niceness before; None: no haste."""

    def begin(self) -> None:
        if self._usual is not None:
            return
        usual = self._get(os.PRIO_PROCESS, 0)
        if self._all(max(NICE_MIN, usual - HASTE_STEPS)):
            self._usual = usual

    def end(self) -> None:
        if self._usual is not None:
            self._all(self._usual)
            self._usual = None

    def _all(self, nice: int) -> bool:
        """Linux keeps it per thread, whatever setpriority(2)'s name for the number is."""
        for thread in threading.enumerate():
            try:
                with contextlib.suppress(ProcessLookupError):  # It has ended.
                    self._put(os.PRIO_PROCESS, thread.native_id or 0, nice)
            except OSError:
                return False
        return True
