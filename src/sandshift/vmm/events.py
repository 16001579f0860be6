"""What a VM says, to everybody who listens: in order, each listener everything from its subscription on."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from typing import Final

from sandshift.errors import NoRoom
from sandshift.vmm.machine import MachineEvent

PENDING_EVENTS_MAX: Final = 10_000
"""A guest can provoke events; a listener that does not read must not cost unbounded memory."""


class EventStream:
    """One listener's view: an asynchronous iterator that ends after DEAD or `close`.

    Listening begins when it is made, not at the first `async for`. It is dropped when nobody holds it any more.
    """

    def __init__(self) -> None:
        self._pending: deque[MachineEvent] = deque()
        self._something = asyncio.Event()
        self._over = False
        self._lost = 0

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> MachineEvent:
        """The next event.

        Raises:
            NoRoom: more than PENDING_EVENTS_MAX were waiting, so some are lost.
        """
        while not self._pending:
            if self._over:
                raise StopAsyncIteration
            self._something.clear()
            await self._something.wait()
        if self._lost:
            raise NoRoom(
                f"{self._lost} events of the VM were not read in time and are lost: ask for its state again"
            )
        return self._pending.popleft()

    def close(self) -> None:
        """End the iteration after what is pending. Idempotent."""
        self._over = True
        self._something.set()

    def take_pending(self) -> list[MachineEvent]:
        """What has come and was not read, without waiting."""
        taken = list(self._pending)
        self._pending.clear()
        return taken

    def put(self, event: MachineEvent) -> None:
        """For the fan-out only."""
        if self._over:
            return
        if len(self._pending) >= PENDING_EVENTS_MAX:
            self._lost += 1
            return
        self._pending.append(event)
        self._something.set()


class EventFanout:
    """Gives each event to all streams that exist."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._last: MachineEvent | None = None

    def subscribe(self) -> EventStream:
        """A new listener. One that comes after the last event gets that event alone."""
        stream = EventStream()
        if self._last is not None:
            stream.put(self._last)
            stream.close()
        else:
            self._streams.add(stream)
        return stream

    def emit(self, event: MachineEvent) -> None:
        if self._last is None:
            for stream in list(self._streams):
                stream.put(event)

    def end(self) -> None:
        """End every stream without a last event: we no longer listen, the VM goes on."""
        for stream in list(self._streams):
            stream.close()

    def finish(self, last: MachineEvent) -> None:
        """Emit `last` and end every stream. Idempotent: what comes later is not heard."""
        self.emit(last)
        if self._last is None:
            self._last = last
            for stream in list(self._streams):
                stream.close()
