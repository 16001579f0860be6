"""An event loop in virtual time, in which a process can be killed though all of them live in this one.

Time stands still while anything can happen and jumps to the next timer when nothing can. `run_in_executor` runs its
function at once. Whose code a callback is, says the context it runs in (`OWNER`): killing an owner drops everything
that is still to be run for it, so that none of its `finally` blocks runs, as with SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import logging
import os
import selectors
import socket
import stat
import sys
import warnings
from collections.abc import Callable, Generator
from typing import Any, Final

OWNER: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("owner", default="world")
"""The process that the running code belongs to, for instance "shim-2@source"."""
EPOCH_S: Final = 1_000_000.0
"""What the virtual clocks say when a history begins."""
STEPS_MAX: Final = 400_000
"""More turns of the loop than this are a livelock."""


class Stuck(Exception):
    """Nothing is left that could happen, or far too much has happened."""


class SimTask(asyncio.Task[Any]):
    """A task whose place in a set depends on when it was made, not on where in memory it lies."""

    _number = 0

    def __init__(self, coro: Any, **more: Any) -> None:
        SimTask._number += 1
        self._hash = SimTask._number
        super().__init__(coro, **more)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other


class SimSelector(selectors.EpollSelector):
    """Waits in virtual time. What is ready is told in the order in which it was registered."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = EPOCH_S
        self.steps = 0
        self.before_step: Callable[[], None] = lambda: None
        self._order: dict[int, int] = {}
        self._registered = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = super().register(fileobj, events, data)
        self._registered += 1
        self._order[key.fd] = self._registered
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Stuck(f"{STEPS_MAX} turns of the loop and no end")
        ready = super().select(0)
        if not ready and timeout != 0:
            if timeout is None:
                raise Stuck("nothing is left that could happen")
            self.now_s += timeout + 1e-9
        self.before_step()
        if len(ready) > 1:
            ready.sort(key=lambda each: self._order[each[0].fd])
        # A process that was killed just now reads nothing any more.
        registered = self.get_map()
        return [each for each in ready if each[0].fd in registered]


class SimLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.sim = SimSelector()
        super().__init__(self.sim)
        self._clock_resolution = 1e-9
        self._dead: set[str] = set()
        self._over = False
        self._tasks_held: list[asyncio.Task[Any]] = []
        self._accepted: dict[str, list[socket.socket]] = {}
        """By owner: one that has just been accepted is not yet waited on."""
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.sim.now_s

    def _make_task(self, loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        task = SimTask(coro, loop=loop, **more)
        self._tasks_held.append(
            task
        )  # those of the killed must not be collected: that would run their `finally`
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done: asyncio.Future[Any] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _sock_accept(self, fut: asyncio.Future[Any], sock: socket.socket) -> None:
        super()._sock_accept(fut, sock)  # type: ignore[misc]
        if fut.done() and not fut.cancelled() and fut.exception() is None:
            self._accepted.setdefault(OWNER.get(), []).append(fut.result()[0])

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:  # type: ignore[override]
        """Signals are for real processes."""

    # Handles of the dead are dropped wherever they come up.

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle: Any = super().call_soon(callback, *args, context=context)
        if self._over or (self._dead and handle._context.get(OWNER, "world") in self._dead):
            handle.cancel()
        return handle

    def kill(self, owner: str) -> None:
        """Nothing of `owner` runs any more, and the connections that it waited on are closed."""
        self._dead.add(owner)
        for handle in (*self._ready, *self._scheduled):  # type: ignore[attr-defined]
            if handle._context.get(OWNER, "world") == owner and not handle._cancelled:
                handle._cancelled = True
        self._scheduled = [handle for handle in self._scheduled if not handle._cancelled]  # type: ignore[attr-defined,has-type]
        heapq.heapify(self._scheduled)
        self._timer_cancelled_count = 0
        for accepted in self._accepted.pop(owner, []):
            if accepted.fileno() >= 0:
                hang_up(accepted.fileno())
        for key in list(self.sim.get_map().values()):
            handles = [handle for handle in key.data if handle is not None]
            if handles and all(handle._context.get(OWNER, "world") == owner for handle in handles):
                self.sim.unregister(key.fd)
                hang_up(key.fd)

    def end(self) -> None:
        """After a history: nothing happens any more, whatever is asked for, and what there was is let go of.

        The `finally` blocks of what never ended run now, into the void.
        """
        self._over = True
        for handle in (*self._ready, *self._scheduled):  # type: ignore[attr-defined]
            handle._cancelled = True
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()
        for key in list(self.sim.get_map().values()):
            if key.fd != self._ssock.fileno():  # type: ignore[attr-defined]
                self.sim.unregister(key.fd)
        for task in self._tasks_held:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
        asyncio._set_running_loop(self)  # what is in those blocks may ask for it
        with quietly():
            self._tasks_held.clear()
            gc.collect()
        asyncio._set_running_loop(None)
        self._ready.clear()  # type: ignore[attr-defined]
        self.close()

    def is_dead(self, owner: str) -> bool:
        return owner in self._dead


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """What was killed is let go of in the block: its `finally` blocks run, and what they say is no news."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _what: None
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    sys.unraisablehook = hook


def hang_up(descriptor: int) -> None:
    """Shut the connection down for every holder; the descriptor itself stays open. A pipe has no such thing."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as held:
                held.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def owned_by(owner: str) -> Generator[None]:
    """Tasks and callbacks made in the block belong to `owner`."""
    token = OWNER.set(owner)
    try:
        yield
    finally:
        OWNER.reset(token)
