"""An agent on this host: the real service, the real link, real processes; only the machine itself is not changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from sandshift.agent.main import serve
from sandshift.agent.system import System
from sandshift.agent.table import Table
from sandshift.guest.client import Guest
from tests.link.port import Port


@dataclass
class RecordingSystem(System):
    """Writes down what would be done to the machine. The clock runs from `now_ns` and stands still."""

    done: list[tuple[str, object]] = field(default_factory=list)
    now_ns: int = 1_000_000_000_000
    id_reads: int = 0
    refuse: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def boot_id(self) -> str:
        self.id_reads += 1
        return "0f0e0d0c-0000-4000-8000-000000000001"

    def realtime_ns(self) -> int:
        return self.now_ns

    def set_realtime_ns(self, realtime_ns: int) -> None:
        self.done.append(("clock", realtime_ns))
        self.now_ns = realtime_ns

    def add_entropy(self, entropy: bytes) -> None:
        if self.refuse:
            raise OSError(self.refuse)
        self.done.append(("entropy", entropy))

    def set_machine_id(self, machine_id: str) -> None:
        self.done.append(("machine id", machine_id))

    def set_hostname(self, hostname: str) -> None:
        self.done.append(("hostname", hostname))

    def set_nameservers(self, nameservers) -> None:
        self.done.append(("nameservers", list(nameservers)))

    def card_index(self, place: int) -> int:
        if place > 1:
            raise LookupError(f"network card {place}: the machine has 2")
        return 2 + place

    def apply_network(self, messages) -> None:
        self.done.append(("network", list(messages)))

    def power_off(self) -> None:
        self.done.append(("power off", None))


@dataclass
class House:
    port: Port
    table: Table
    system: RecordingSystem

    @contextlib.asynccontextmanager
    async def guest(self, reply_s: float = 10.0) -> AsyncIterator[Guest]:
        connected = await Guest.connect(self.port.path, reply_s=reply_s)
        try:
            yield connected
        finally:
            await connected.close()


@contextlib.asynccontextmanager
async def agent_house(folder: Path) -> AsyncIterator[House]:
    port = Port(folder / "agent")
    house = House(port, Table(), RecordingSystem())
    serving = asyncio.create_task(serve(port.guest_descriptor, house.table, house.system))
    try:
        yield house
    finally:
        for process_id, process in house.table.items():
            process.signal(9, whole_group=True)
            await process.wait()
            house.table.forget(process_id)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await port.close()


class Sink:
    """Takes everything, unless frozen."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.data = bytearray()
        self.frozen = False

    def delivered(self) -> int:
        return self.base + len(self.data)

    def take(self, offset: int, data: bytes) -> int:
        if not self.frozen and offset <= self.delivered():
            self.data += data[self.delivered() - offset :]
        return self.delivered()
