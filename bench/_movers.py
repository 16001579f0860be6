"""The two kinds of move that bench/migration.py compares, behind one interface: set up, move once, take down."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from bench._migration_figures import Run
from sandshift.cli.demo.client import CounterClient
from sandshift.cli.demo.lab import Lab
from sandshift.cli.demo.proof import longest_silence_ms
from sandshift.cli.demo.scenario import failure_of, fleet_host
from sandshift.cli.demo.topology import GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH
from sandshift.cli.demo.workload import Workload
from sandshift.errors import Aborted
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import NAMESPACE_DEFAULT
from sandshift.fleet.launch import Card, Wish, launch, run_process, stop
from sandshift.fleet.request import Migration

LISTEN_S = 60.0
WARM_UP_S = 1.0
AFTERWARDS_S = 0.7
GAP_MARGIN_NS = 500_000_000


@dataclass(frozen=True, slots=True)
class Moved:
    """What a mover says about its move; the client's view is measured around it."""

    total_ms: float
    blackout_ms: float
    passes: int
    bytes_transferred: int
    calls_ms: dict[str, float]


class Mover(Protocol):
    """One way to run a guest with the workload on host A and to move it to host B."""

    def guest(self, lab: Lab, workload: Workload) -> contextlib.AbstractAsyncContextManager[None]:
        """The guest with its workload on host A, its counter reachable at GUEST_ADDRESS; ended afterwards."""
        ...

    async def move(self) -> Moved:
        """Move it to host B."""
        ...


class Ours:
    """Through both shims, driven by the fleet: all that `sandshift migrate` does."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._request: Migration | None = None

    @contextlib.asynccontextmanager
    async def guest(self, lab: Lab, workload: Workload) -> AsyncIterator[None]:
        sandbox = f"bench-{uuid.uuid4().hex[:8]}"
        source, destination = fleet_host(lab.host_a), fleet_host(lab.host_b)
        card = Card((f"{GUEST_ADDRESS}/{PREFIX_LENGTH}",), mac=GUEST_MAC)
        shim = await launch(source, Wish(sandbox, memory_bytes=self._memory_bytes, card=card))
        try:
            await run_process(shim, tuple(workload.arguments()))
        finally:
            await shim.close()
        self._request = Migration(source, destination, sandbox, f"bench-{sandbox}")
        try:
            yield
        finally:
            for host in (source, destination):
                if host.has_shim(NAMESPACE_DEFAULT, sandbox):
                    await stop(host, NAMESPACE_DEFAULT, sandbox, grace_s=0)

    async def move(self) -> Moved:
        assert self._request is not None
        result = await migrate(self._request)
        if failure := failure_of(result):
            raise Aborted(f"our move failed: {failure}")
        if result.total_ms is None or result.stopped_at_us is None or result.resumed_at_us is None:
            raise Aborted(f"our move said not when the guest stopped and ran again: {result.warnings}")
        return Moved(
            total_ms=result.total_ms,
            blackout_ms=(result.resumed_at_us - result.stopped_at_us) / 1000,  # One machine has one clock.
            passes=result.passes,
            bytes_transferred=result.bytes_transferred,
            calls_ms={f"{call.side.word} {call.call}": round(call.took_ms, 1) for call in result.calls},
        )


async def measure(mover: Mover, lab: Lab, workload: Workload) -> Run:
    """One move of a fresh guest, with a client that talks to it throughout."""
    async with mover.guest(lab, workload):
        client = await CounterClient.connect(
            lab.client_namespace, GUEST_ADDRESS, workload.port, timeout_s=LISTEN_S
        )
        client.start()
        try:
            await asyncio.sleep(WARM_UP_S)
            began_ns = time.monotonic_ns()
            moved = await mover.move()
            ended_ns = time.monotonic_ns()
            await asyncio.sleep(AFTERWARDS_S)
        finally:
            await client.stop()
    if client.failure or client.unanswered:
        raise Aborted(
            f"the client's connection did not survive: {client.failure or f'{client.unanswered} unanswered'}"
        )
    return Run(
        total_ms=moved.total_ms,
        blackout_ms=moved.blackout_ms,
        client_gap_ms=longest_silence_ms(client.answers, from_ns=began_ns, to_ns=ended_ns + GAP_MARGIN_NS),
        passes=moved.passes,
        bytes_transferred=moved.bytes_transferred,
        calls_ms=moved.calls_ms,
    )
