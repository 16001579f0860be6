"""What a shim tells containerd: the suite stands in for containerd's events service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from google.protobuf.empty_pb2 import Empty

import ttrpc
from sandshift.conformance.answers import Broken, Skipped
from sandshift.conformance.scene import Scene
from sandshift.conformance.side import Side
from sandshift.wire.containerd import envelope_pb2, events_pb2
from sandshift.wire.containerd.events_ttrpc import EventsService

HEARD_S: Final = 10.0
"""How long an event that is expected may take. A shim that found nobody tries again within seconds."""


class Heard(EventsService):
    """The events of one shim, in their order."""

    def __init__(self) -> None:
        self.envelopes: list[envelope_pb2.Envelope] = []
        self._more = asyncio.Event()

    async def forward(self, request: events_pb2.ForwardRequest, context: ttrpc.CallContext) -> Empty:
        self.envelopes.append(request.envelope)
        self._more.set()
        return Empty()

    @property
    def topics(self) -> list[str]:
        return [one.topic for one in self.envelopes]

    async def wait_for(self, topic: str, holding: bytes = b"") -> envelope_pb2.Envelope:
        """The first event of a topic whose message holds these bytes. Raises Broken if none comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARD_S):
                while True:
                    for one in self.envelopes:
                        if one.topic == topic and holding in one.event.value:
                            return one
                    self._more.clear()
                    await self._more.wait()
        raise Broken(f"no event {topic} came within {HEARD_S:g} s; there were {self.topics}")


@contextlib.asynccontextmanager
async def listening(scene: Scene, side: Side) -> AsyncIterator[Heard]:
    """Stand where the side's shim sends its events. Raises Skipped if nobody can."""
    address = scene.target.event_sockets.get(side, "")
    if not address:
        raise Skipped(
            "the shims send their events nowhere that the suite could listen (--source-events, --destination-events)"
        )
    await asyncio.to_thread(Path(address).unlink, missing_ok=True)
    heard, server = Heard(), ttrpc.Server()
    server.register(heard)
    serving = asyncio.create_task(server.serve(ttrpc.listen(address)), name="events")
    try:
        yield heard
    finally:
        await server.shutdown(grace_s=0.2)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await asyncio.to_thread(Path(address).unlink, missing_ok=True)
