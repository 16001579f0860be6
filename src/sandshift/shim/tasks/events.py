"""Events for containerd: published in order over ttrpc, kept while nobody takes them, dropped only when there are too many.

Publishing never waits: containerd may be away, and no call of its own may hang on that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import ttrpc
from sandshift.wire.containerd import envelope_pb2, events_pb2
from sandshift.wire.containerd.events_ttrpc import EventsClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 4096
"""Events that wait; then the oldest is dropped."""
FORWARD_S: Final = 5.0
"""How long one Forward may take."""
RETRY_FIRST_S: Final = 0.05
RETRY_MOST_S: Final = 2.0
REFUSALS: Final = (
    ttrpc.Code.INVALID_ARGUMENT,
    ttrpc.Code.UNIMPLEMENTED,
    ttrpc.Code.NOT_FOUND,
    ttrpc.Code.FAILED_PRECONDITION,
)
PUSH_S: Final = 1.0
"""How long the end of the shim waits for what is still queued."""


class Publisher:
    """Sends to the ttrpc socket at `address`, each event until it was taken; to nobody if `address` is empty."""

    def __init__(self, address: str, namespace: str, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.address = address
        self._namespace = namespace
        self._clock_ns = clock_ns
        self._queue: deque[envelope_pb2.Envelope] = deque()
        self._dropped = 0
        self._added = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None

    def publish(self, topic: str, event: Message) -> None:
        """Queue an event; it bears the time of this call."""
        if not self.address:
            return
        envelope = envelope_pb2.Envelope(namespace=self._namespace, topic=topic)
        envelope.timestamp.FromNanoseconds(self._clock_ns())
        envelope.event.type_url = event.DESCRIPTOR.full_name
        envelope.event.value = event.SerializeToString()
        if len(self._queue) >= QUEUE_MAX:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(envelope)
        self._empty.clear()
        self._added.set()
        if self._task is None:
            self._task = asyncio.create_task(self._send_all(), name="publish events")

    async def _send_all(self) -> None:
        """Task: sees its own failures, each of which is an attempt that comes again."""
        client: ttrpc.Client | None = None
        pause_s = RETRY_FIRST_S
        try:
            while True:
                await self._next()
                envelope = self._queue[0]
                try:
                    client = client or await ttrpc.connect(self.address, timeout_s=FORWARD_S)
                    request = events_pb2.ForwardRequest(envelope=envelope)
                    await EventsClient(client).forward(request, timeout_s=FORWARD_S)
                except (ttrpc.StatusError, OSError, TimeoutError) as error:
                    if _was_refused(error):
                        log.warning("containerd refuses event %s: %s", envelope.topic, error)
                        self._done_with(envelope)
                        continue
                    log.info("event %s waits for containerd: %s", envelope.topic, error)
                    await _closed(client)
                    client = None
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, RETRY_MOST_S)
                else:
                    pause_s = RETRY_FIRST_S
                    self._done_with(envelope)
        finally:
            await _closed(client)

    async def _next(self) -> None:
        while not self._queue:
            self._empty.set()
            self._added.clear()
            await self._added.wait()
        if self._dropped:
            log.warning("%d events were dropped: nobody took them", self._dropped)
            self._dropped = 0

    def _done_with(self, envelope: envelope_pb2.Envelope) -> None:
        if self._queue and self._queue[0] is envelope:  # Else it was dropped meanwhile.
            self._queue.popleft()

    async def close(self, push_s: float = PUSH_S) -> None:
        """Send what is queued, for `push_s` at most, and end."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(push_s):
                await self._empty.wait()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None


def _was_refused(error: Exception) -> bool:
    """Whether containerd has read the event and does not want it: then it never will."""
    return isinstance(error, ttrpc.StatusError) and error.code in REFUSALS


async def _closed(client: ttrpc.Client | None) -> None:
    if client is not None:
        await client.close()
