"""Something to await once, resumed in the same turn of the loop in which its bytes arrived.

A `Future` resumes its task one turn later: one more `select` per call, which is a tenth of a call. A `Waiter` keeps to the
same protocol (`_asyncio_future_blocking`, documented by `asyncio.isfuture`), so tasks await and cancel it as usual, but
`resume_now` runs the task's next step at once. That is allowed only where no task is running: in callbacks of the loop
such as a transport's. Everywhere else it is `resume_soon`.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any


class Waiter:
    """Pending until one of `resume_now`, `resume_soon` and `cancel` is called; then it stays done."""

    __slots__ = (
        "__weakref__",
        "_asyncio_future_blocking",
        "_callback",
        "_cancel_message",
        "_cancelled",
        "_context",
        "_done",
        "_loop",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._done = False
        self._cancelled = False
        self._cancel_message: Any = None
        self._callback: Callable[[Waiter], object] | None = None
        self._context: contextvars.Context | None = None

    def __await__(self) -> Generator[Waiter, None, None]:
        if not self._done:
            if self._callback is not None:
                raise RuntimeError("a ttrpc call can be awaited by one task only")
            self._asyncio_future_blocking = True
            yield self
        self.result()

    __iter__ = __await__

    def resume_now(self) -> None:
        """Finish, and run whoever awaits it before returning. Only where no task is running."""
        if self._done:
            return
        self._done = True
        callback = self._callback
        if callback is not None:
            self._callback = None
            if self._context is None:
                callback(self)
            else:
                self._context.run(callback, self)

    def resume_soon(self) -> None:
        """Finish; whoever awaits it runs in the loop's next turn."""
        if not self._done:
            self._done = True
            self._schedule()

    def _schedule(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self, context=self._context)

    # What a task asks of what it awaits.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Waiter], object], *, context: contextvars.Context | None = None
    ) -> None:
        self._callback, self._context = callback, context
        if self._done:
            self._schedule()

    def remove_done_callback(self, callback: Callable[[Waiter], object]) -> int:
        if self._callback is None or self._callback != callback:
            return 0
        self._callback = None
        return 1

    def cancel(self, msg: Any = None) -> bool:
        """What `Task.cancel` calls while the task waits here."""
        if self._done:
            return False
        self._done = self._cancelled = True
        self._cancel_message = msg
        self._schedule()
        return True

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return self._cancelled

    def result(self) -> None:
        if self._cancelled:
            raise self._cancelled_error()
        if not self._done:
            raise asyncio.InvalidStateError("the call has not ended yet")

    def exception(self) -> BaseException | None:
        if self._cancelled:
            raise self._cancelled_error()
        return None

    def _cancelled_error(self) -> asyncio.CancelledError:
        return (
            asyncio.CancelledError()
            if self._cancel_message is None
            else asyncio.CancelledError(self._cancel_message)
        )

    # Older Task implementations build the CancelledError themselves.
    _make_cancelled_error = _cancelled_error
