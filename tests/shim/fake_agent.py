"""The agent's client on a fake guest: answers while the virtual CPUs run, as `guest.client.Guest` does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from sandshift.errors import IllegalMove, Unavailable
from sandshift.guest.client import GuestExit, GuestInfo, GuestProcess
from sandshift.guest.containers import ContainerEvent, ContainerPid, ContainerStats
from sandshift.sandbox.disks import GuestMount, GuestRootfs
from sandshift.vmm.fake_containers import FakeContainers
from sandshift.vmm.fake_process import FakeProcess

LOOK_S = 0.005
"""How often a fake guest is looked at by who waits for it, of the loop's time; less and less often while nothing comes."""
LOOK_FACTOR_MAX = 8
"""How many times longer the longest wait between two looks is."""
EVENTS_LOOK_S = 0.1


class FakeGuest:
    look_s = LOOK_S
    way_s = 0.0
    """How long bytes are on their way between agent and shim: the guest may stop, or the shim die, meanwhile."""

    def __init__(self, process: FakeProcess, reply_s: float) -> None:
        self._process = process
        self._reply_s = reply_s
        self.containers = FakeGuestContainers(self)

    async def _runs(self) -> None:
        try:
            async with asyncio.timeout(self._reply_s):
                await self._process.runs.wait()
                if self._process.faults.hang:
                    await asyncio.Event().wait()
        except TimeoutError as error:
            raise Unavailable(f"the guest's agent did not answer within {self._reply_s:g} s") from error

    async def _on_its_way(self) -> None:
        if self.way_s:
            await asyncio.sleep(self.way_s)

    async def inside(self) -> FakeContainers:
        """What is in the guest, once it runs."""
        await self._runs()
        return self._process.look().containers

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def info(self) -> GuestInfo:
        await self._runs()
        guest = self._process.look()
        return GuestInfo("0", guest.boot_id, "fake", 0, 0, "", "", 0, "", personalized=True)

    async def personalize(self, **_what: object) -> None:
        await self._runs()

    async def set_clock(self, _clock_ns: Callable[[], int]) -> int:
        await self._runs()
        return 0

    async def start_process(
        self,
        process_id: str,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        terminal: bool = False,
        stdin: bool = False,
        container_id: str = "",
        process_spec: bytes = b"",
    ) -> int:
        inside = await self.inside()
        if not container_id:
            return 2
        return inside.start_process(process_id, container_id, process_spec, terminal=terminal, stdin=stdin)

    async def list_processes(self) -> list[GuestProcess]:
        inside = await self.inside()
        return [
            GuestProcess(
                task.process_id,
                task.pid,
                tuple(task.args),
                task.exited,
                max(task.exit_code, 0),
                task.streams[1].end,
                task.streams[2].end if 2 in task.streams else 0,
            )
            for task in inside.tasks.values()
        ]

    async def follow_output(
        self,
        process_id: str,
        stream: int,
        delivered: Callable[[], int],
        take: Callable[[int, bytes], int],
        *,
        room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if ":" not in process_id:
            await asyncio.Event().wait()
        factor = 1
        while True:
            await self._process.runs.wait()
            inside = self._process.look().containers
            at = delivered()
            data, ended = inside.read(process_id, stream, at)
            if ended:
                return
            await self._on_its_way()
            taken = take(at, data) if data else at
            if self._process.runs.is_set():  # Else it never hears that they were taken.
                self._process.look().containers.acknowledge(process_id, stream, taken)
            if taken < at + len(data) and room is not None:
                await room()
            else:
                factor = 1 if data else min(2 * factor, LOOK_FACTOR_MAX)
                await asyncio.sleep(factor * self.look_s)

    async def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool = False) -> int:
        end, taken = offset + len(data), offset
        while True:
            await self._on_its_way()
            inside = await self.inside()
            taken = inside.write_input(process_id, taken, data[taken - offset :], eof=eof)
            if taken >= end:
                await self._on_its_way()
                return taken
            await asyncio.sleep(self.look_s)

    async def wait_process(self, process_id: str) -> GuestExit:
        if ":" not in process_id:
            await asyncio.Event().wait()
        factor = 1
        while True:
            await self._process.runs.wait()
            task = self._process.look().containers.task(process_id)
            if task.exited:
                return GuestExit(task.exit_code, task.exited_at_ns)
            await asyncio.sleep(factor * self.look_s)
            factor = min(2 * factor, LOOK_FACTOR_MAX)

    async def signal_process(self, process_id: str, number: int, *, whole_group: bool = False) -> None:
        (await self.inside()).signal(process_id, number, self.now_s())

    async def forget_process(self, process_id: str) -> None:
        (await self.inside()).forget(process_id)

    async def resize_terminal(self, process_id: str, *, columns: int, rows: int) -> None:
        task = (await self.inside()).task(process_id)
        if not task.terminal:
            raise IllegalMove(f"process {process_id} has no terminal")
        task.size = (columns, rows)

    async def power_off(self) -> None:
        self._process.power_off()

    async def close(self) -> None:
        return


class FakeGuestContainers:
    """As `guest.containers.GuestContainers`."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest

    async def prepare_pod(self, **share: object) -> None:
        inside = await self._guest.inside()
        inside.pod = {name: repr(value) for name, value in share.items()}

    async def create(
        self,
        container_id: str,
        spec: bytes,
        rootfs: GuestRootfs,
        mounts: Sequence[GuestMount] = (),
        *,
        terminal: bool,
        stdin: bool,
    ) -> int:
        inside = await self._guest.inside()
        return inside.create(container_id, spec, (rootfs, tuple(mounts)), terminal=terminal, stdin=stdin)

    async def start(self, container_id: str) -> None:
        (await self._guest.inside()).start(container_id)

    async def delete(self, container_id: str) -> None:
        (await self._guest.inside()).delete(container_id, self._guest.now_s())

    async def pause(self, container_id: str) -> None:
        (await self._guest.inside()).set_paused(container_id, paused=True)

    async def resume(self, container_id: str) -> None:
        (await self._guest.inside()).set_paused(container_id, paused=False)

    async def update(self, container_id: str, resources: bytes) -> None:
        (await self._guest.inside()).update(container_id, resources)

    async def stats(self, container_id: str) -> ContainerStats:
        count = len((await self._guest.inside()).pids(container_id))
        return ContainerStats(1000, 600, 400, 0, 0, 1 << 20, 0, 4096, 8192, 2 << 20, 0, count, 64, 7, 9)

    async def pids(self, container_id: str) -> list[ContainerPid]:
        return [ContainerPid(*one) for one in (await self._guest.inside()).pids(container_id)]

    async def events(self, from_number: int = 0) -> AsyncIterator[ContainerEvent]:
        last = max(from_number - 1, 0)
        while True:
            for number, name, at_ns in (await self._guest.inside()).oom:
                if number > last:
                    last = number
                    yield ContainerEvent(number, name, "oom", at_ns)
            await asyncio.sleep(EVENTS_LOOK_S)
