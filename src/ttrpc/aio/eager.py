"""Run a coroutine at once up to its first suspension, and only then make a task of what is left.

Most unary handlers never suspend, and a task costs them a turn of the loop and a quarter of the throughput. From Python
3.12 on asyncio does this itself (`eager_start`). On 3.11 it is done here with the documented hooks for task
implementations (`_enter_task`, `_leave_task`): while the first step runs, `current_task()` is a `FirstStep`, which stands
for the task that may follow, so that `asyncio.timeout` and `TaskGroup` work in handlers from their first line on.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Coroutine, Generator
from typing import Any

HAS_EAGER_START = sys.version_info >= (3, 12)


def start_eagerly(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None]
) -> asyncio.Task[None] | None:
    """Begin `coro`, which must not raise. None when it has finished already, else the task that finishes it.

    May be called where no task is running only: in callbacks of the loop.
    """
    if HAS_EAGER_START:
        task: asyncio.Task[None] = asyncio.Task(coro, loop=loop, eager_start=True)  # type: ignore[call-arg]
        return None if task.done() else task
    return _first_step(loop, coro)


def _first_step(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None]
) -> asyncio.Task[None] | None:
    context = contextvars.copy_context()
    standing_in = FirstStep(loop, coro)
    asyncio.tasks._enter_task(loop, standing_in)  # type: ignore[arg-type]  # noqa: SLF001  # documented for task implementations
    try:
        awaited = context.run(coro.send, None)
    except StopIteration:
        return None
    finally:
        asyncio.tasks._leave_task(loop, standing_in)  # type: ignore[arg-type]  # noqa: SLF001
    return standing_in.become_task(awaited, context)


class FirstStep:
    """What `current_task()` is until there is a task; afterwards it passes everything on to that task."""

    __slots__ = ("__weakref__", "_cancel_message", "_cancels", "_coro", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None]) -> None:
        self._loop = loop
        self._coro = coro
        self._task: asyncio.Task[None] | None = None
        # Requests to cancel that came before there was a task.
        self._cancels = 0
        self._cancel_message: Any = None

    def become_task(self, awaited: Any, context: contextvars.Context) -> asyncio.Task[None]:
        """The coroutine has suspended on `awaited`: a task takes over from there."""
        task = self._loop.create_task(_rest(self._coro, awaited), context=context)
        self._task = task
        for _ in range(self._cancels):
            task.cancel(self._cancel_message)
        return task

    def cancel(self, msg: Any = None) -> bool:
        if self._task is not None:
            return self._task.cancel(msg)
        self._cancels += 1
        self._cancel_message = msg
        return True

    def uncancel(self) -> int:
        if self._task is not None:
            return self._task.uncancel()
        self._cancels = max(0, self._cancels - 1)
        return self._cancels

    def cancelling(self) -> int:
        return self._task.cancelling() if self._task is not None else self._cancels

    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def cancelled(self) -> bool:
        return self._task is not None and self._task.cancelled()

    def get_coro(self) -> Coroutine[Any, Any, None]:
        return self._coro

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def get_name(self) -> str:
        return self._task.get_name() if self._task is not None else "ttrpc call"

    def add_done_callback(self, callback: Callable[..., object], *, context: Any = None) -> None:
        if self._task is None:
            raise RuntimeError("the call has no task before it first waits for something")
        self._task.add_done_callback(callback, context=context)

    def remove_done_callback(self, callback: Callable[..., object]) -> int:
        return 0 if self._task is None else self._task.remove_done_callback(callback)


def _rest(coro: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, None, None]:
    """What is left of `coro`, which has been sent into already and waits for `awaited`.

    Comes started: a task that is cancelled before its first step throws into what it was given, and that must find
    the way to `coro`.
    """
    rest = _steps(coro, awaited)
    next(rest)
    return rest


def _steps(coro: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, None, None]:
    thrown: BaseException | None = None
    try:
        yield
    except asyncio.CancelledError as error:
        # As Task.cancel does it: what is awaited is cancelled, and only if it cannot be, the coroutine itself.
        if awaited is None or not awaited.cancel(error.args[0] if error.args else None):
            thrown = error
    step_due = thrown is not None
    while True:
        if step_due:
            try:
                awaited = coro.send(None) if thrown is None else coro.throw(thrown)
            except StopIteration:
                return
        thrown, step_due = None, True
        try:
            yield awaited
        except GeneratorExit:
            coro.close()
            raise
        except BaseException as error:  # noqa: BLE001  # all of them belong to the coroutine
            thrown = error
