"""The containers of a sandbox: made, started, fed, read, ended and deleted as containerd's Task service asks.

What is legal during a migration is asked before (task_service.py); what must be known to a later shim is written down
before it is answered. The guest's agent does the work, and keeps output and exits until they are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandshift.errors import AlreadyThere, IllegalMove, NoRoom, NotFound, Rejected, SandshiftError
from sandshift.sandbox.oci import PodShare, guest_process, guest_resources
from sandshift.sandbox.patching import Mount
from sandshift.shim.processes import Exit
from sandshift.shim.stopwatch import Stopwatch
from sandshift.shim.tasks import container_events as tell
from sandshift.shim.tasks.container_process import ContainerProcess, ProcessRecord, Stdio
from sandshift.shim.tasks.live_container import ContainerRecord, LiveContainer, Standing
from sandshift.shim.tasks.roster import Roster

if TYPE_CHECKING:
    from sandshift.guest.client import Guest
    from sandshift.guest.containers import ContainerStats
    from sandshift.shim.sandbox import LiveSandbox

log = logging.getLogger(__name__)

SIGKILL: Final = 9
PIDS_S: Final = 3.0
"""containerd asks after its own restart, and gives it 5 s in all."""
KILL_S: Final = 10.0
"""How long a container that was never started may take to be gone."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a Task.Create asks for."""

    container_id: str
    bundle: Path
    rootfs: tuple[Mount, ...]
    stdio: Stdio


class Containers(Roster):
    """One per sandbox. Methods raise errors of `sandshift.errors`; a refused or failed call leaves nothing behind."""

    def __init__(self, sandbox: LiveSandbox) -> None:
        super().__init__(sandbox)
        self._making: dict[str, LiveContainer] = {}
        """Those whose Create is under way."""

    def is_creating(self, container: LiveContainer) -> bool:
        return container.container_id in self._making

    # The life of a container

    async def create(self, order: Order) -> int:
        """Make a container whose init waits for `start`; its pid in the guest.

        Raises:
            AlreadyThere: the id is taken.
            NoRoom: the sandbox has as many as it may.
            Rejected, NotSupported: spec, rootfs or stdio cannot be had in a VM; names what.
        """
        name = order.container_id
        if name in self._all or name in self._making:
            raise AlreadyThere(f"container {name!r} is in sandbox {self._sandbox.sandbox_id} already")
        most = self._sandbox.config.migration.limits.containers_max
        if len(self._all.keys() | self._making.keys()) >= most:
            raise NoRoom(
                f"sandbox {self._sandbox.sandbox_id} has {most} containers: at most that many are allowed"
            )
        order.stdio.check()
        record = ContainerRecord(
            container_id=name,
            guest_id=self._free_guest_id(name),
            init=ProcessRecord(
                stdio=order.stdio, stdin=bool(order.stdio.stdin), terminal=order.stdio.terminal
            ),
            bundle=str(order.bundle),
            rootfs=order.rootfs,
        )
        container = self._making[name] = self._live(record, fresh=True)
        try:
            async with container.lock:
                await self._create(container, order)
        except BaseException:
            await self._undo(container)
            raise
        finally:
            del self._making[name]
        tell.created(self._sandbox.events, container)
        if self._guest is not None:
            container.init.follow(self._guest)
        return container.pid

    async def _create(self, container: LiveContainer, order: Order) -> None:
        guest, record = self._sandbox.require_guest(), container.record
        watch = Stopwatch()
        fitted = await self._sandbox.fitter.fit(
            order.bundle, order.rootfs, pod=self._pod(), scratch_folder=self._sandbox.places.scratch_dir
        )
        packed, record.annotations = fitted.packed, fitted.annotations
        watch.lap("rootfs")
        plugged = await self._sandbox.disks.plug(record.guest_id, packed.plan, packed.folder_disks)
        watch.lap("disks")
        record.layers, record.writable, record.mounts = plugged.layers, plugged.writable, plugged.mounts
        container.init.open_stdio()
        await self._prepare_pod(guest)
        watch.lap("pod")
        self._all[order.container_id] = container
        await self.save()
        record.init.pid = await guest.containers.create(
            record.guest_id,
            fitted.spec,
            plugged.rootfs,
            packed.guest_mounts(plugged.mount_layers),
            terminal=record.init.terminal,
            stdin=record.init.stdin,
        )
        watch.lap("container")
        record.made = True
        await self.save()
        watch.tell(f"container {container.container_id}")

    async def _undo(self, container: LiveContainer) -> None:
        """A creation has failed: nothing of it stays. What cannot be taken back is in the log."""
        self._all.pop(container.container_id, None)
        try:
            await self._forget_in_guest(container)
            await container.init.forget()
            await self._let_disks_go(container)
            await self.save()
        except SandshiftError as error:
            log.warning("container %s was not undone whole: %s", container.container_id, error)

    async def _let_disks_go(self, container: LiveContainer) -> None:
        """What the guest does not let go of in time stays plugged in, and goes with the VM."""
        try:
            await self._sandbox.disks.release(container.guest_id)
        except SandshiftError as error:
            log.warning("container %s has left a disk: %s", container.container_id, error)

    def _free_guest_id(self, wanted: str) -> str:
        """The guest may still know a container that came from elsewhere by the id that is wanted here."""
        taken = {one.guest_id for one in (*self._all.values(), *self._making.values())}
        names = (wanted, *(f"{wanted}-{number}" for number in range(2, len(taken) + 3)))
        return next(name for name in names if name not in taken)

    def _pod(self) -> PodShare:
        inits = (one.pid for one in self._all.values() if one.pid)
        return PodShare(hostname=self._sandbox.model.hostname, pids=frozenset(inits))

    async def _prepare_pod(self, guest: Guest) -> None:
        if not self._pod_prepared:
            share = self._sandbox.pod_share
            await guest.containers.prepare_pod(
                hosts=share.hosts,
                resolv_conf=share.resolv_conf,
                shm_bytes=share.shm_bytes,
                sysctls=share.sysctls,
            )
            self._pod_prepared = True

    async def start(self, container_id: str, exec_id: str) -> int:
        """Release the init, or start an exec session; its pid. RUNNING is written down before the process runs."""
        container = self.get(container_id)
        process = container.process(exec_id)
        async with container.lock:
            if process.record.started and container.record.adopted:
                await self._take_up(container, process)
                return process.record.pid
            if container.standing(process) is not Standing.CREATED:
                raise IllegalMove(
                    f"{_named(container, exec_id)} is {container.standing(process).name.lower()}: it was started before"
                )
            process.introducing()
            try:
                await self._start(container, process)
                tell.started(self._sandbox.events, container, process)
            finally:
                # After the answer: nobody hears of the end first.
                asyncio.get_running_loop().call_soon(process.introduced)
        return process.record.pid

    async def _start(self, container: LiveContainer, process: ContainerProcess) -> None:
        guest, record = self._sandbox.require_guest(), process.record
        record.started = True
        try:
            if process.exec_id:
                process.open_stdio()
                await self.save()
                record.pid = await guest.start_process(
                    process.process_id,
                    [],
                    container_id=container.guest_id,
                    process_spec=record.spec,
                    terminal=record.terminal,
                    stdin=record.stdin,
                )
            else:
                await self.save()
                await guest.containers.start(container.guest_id)
        except BaseException:
            record.started = False
            if process.exec_id:
                process.close_stdio()
            with contextlib.suppress(SandshiftError):  # A later shim must not find it started, either.
                await self.save()
            raise
        if process.exec_id:
            process.follow(guest)
            await self.save()

    async def _take_up(self, container: LiveContainer, process: ContainerProcess) -> None:
        """An exec session that came from elsewhere has its caller here now: give it its output."""
        process.open_stdio()
        await self.save()
        if self._guest is not None:
            process.follow(self._guest)

    async def exec(self, container_id: str, exec_id: str, spec: bytes, stdio: Stdio) -> None:
        """Add a process to a container that runs; `start` starts it. Or bind one that came from elsewhere, which may have ended
        already, and its container too: what it said waits in the guest."""
        container = self.get(container_id)
        stdio.check()
        fitted = guest_process(_json("spec", spec))
        async with container.lock:
            if not container.awaits(exec_id) and container.standing(container.init) is not Standing.RUNNING:
                raise IllegalMove(
                    f"container {container_id} is {container.standing(container.init).name.lower()}: exec needs a "
                    "running one"
                )
            came = container.awaits(exec_id)
            container.add_exec(exec_id, fitted, stdio)
            process = container.process(exec_id)
            ended_before = process.exited
            process.introducing()
            try:
                await self.save()
            except BaseException:
                if came:
                    process.record.bound = False
                else:
                    container.drop_exec(exec_id)
                    await process.forget()
                raise
            else:
                tell.exec_added(self._sandbox.events, container, exec_id)
                if ended_before:
                    tell.exited(self._sandbox.events, container, process)
            finally:
                process.introduced()

    async def kill(self, container_id: str, exec_id: str, number: int, *, everything: bool) -> None:
        """Send a signal. Raises NotFound for what has ended, as containerd expects of a shim."""
        container = self.get(container_id)
        process = container.process(exec_id)
        if process.exited or not process.record.pid:
            raise NotFound(f"{_named(container, exec_id)} has no process: it has ended, or was not started")
        guest = self._sandbox.require_guest()
        await guest.signal_process(process.process_id, number, whole_group=everything)

    async def wait(self, container_id: str, exec_id: str) -> Exit:
        return await asyncio.shield(self.get(container_id).process(exec_id).exit)

    async def delete(self, container_id: str, exec_id: str) -> ContainerProcess:
        """Forget an ended container or exec session, here and in the guest; what was never started is ended first.

        Raises:
            IllegalMove: it runs.
        """
        container = self.get(container_id)
        process = container.process(exec_id)
        async with container.lock:
            if container.standing(process) in (Standing.RUNNING, Standing.PAUSED):
                raise IllegalMove(f"{_named(container, exec_id)} runs: kill it before it is deleted")
            if exec_id:
                await self._delete_exec(container, process)
            else:
                await self._delete(container)
        return process

    async def _delete_exec(self, container: LiveContainer, process: ContainerProcess) -> None:
        await process.drain()
        if self._guest is not None and process.record.pid:
            await self._guest.forget_process(process.process_id)
        _resolve(process)
        container.drop_exec(process.exec_id)
        await process.forget()
        await self.save()

    async def _delete(self, container: LiveContainer) -> None:
        if not container.init.exited:
            await self._end_unstarted(container)
        await self._end_execs(container)
        await asyncio.gather(*(process.drain() for process in container.processes() if process.exited))
        if self._guest is not None:
            await self._forget_in_guest(container)
        self._all.pop(container.container_id, None)
        for process in container.processes():
            await process.forget()
        await self._let_disks_go(container)
        await self.save()
        tell.deleted(self._sandbox.events, container)

    async def _end_execs(self, container: LiveContainer) -> None:
        """The init has ended, and with it every exec session: whoever waits for one hears of it."""
        execs = [process for process in container.processes() if process.exec_id and not process.exited]
        started = [process for process in execs if process.record.started]
        if started and self._guest is not None:  # How each has ended is on its way.
            await asyncio.wait([asyncio.shield(process.exit) for process in started], timeout=KILL_S)
        for process in execs:
            if process.record.started:
                process.end(Exit(128 + SIGKILL, time.time_ns()))
            else:
                _resolve(process)

    async def _end_unstarted(self, container: LiveContainer) -> None:
        init = container.init
        if self._guest is None:
            init.end(Exit(128 + SIGKILL, time.time_ns()))
            return
        await self._guest.signal_process(init.process_id, SIGKILL)
        init.follow(self._guest)
        try:
            async with asyncio.timeout(KILL_S):
                await asyncio.shield(init.exit)
        except TimeoutError:
            raise IllegalMove(
                f"container {container.container_id} does not end within {KILL_S:g} s: repeat"
            ) from None

    # Its processes

    async def pids(self, container_id: str) -> list[tuple[int, str]]:
        """(pid, exec id) of its processes; never empty before `delete`: containerd takes an empty answer for a lost task."""
        container = self.get(container_id)
        found: Sequence[tuple[int, str]] = ()
        if self._guest is not None and container.init.record.started and not container.init.exited:
            try:
                async with asyncio.timeout(PIDS_S):
                    found = await self._guest.containers.pids(container.guest_id)
            except (SandshiftError, TimeoutError) as error:
                log.info("processes of container %s are not known now: %s", container_id, error)
        named = {process.process_id: process.exec_id for process in container.processes()}
        return [(pid, named.get(process_id, "")) for pid, process_id in found] or [(container.pid, "")]

    async def pause(self, container_id: str) -> None:
        await self._set_paused(container_id, paused=True)

    async def resume(self, container_id: str) -> None:
        await self._set_paused(container_id, paused=False)

    async def _set_paused(self, container_id: str, *, paused: bool) -> None:
        container = self.get(container_id)
        async with container.lock:
            standing = container.standing(container.init)
            if standing is not (Standing.RUNNING if paused else Standing.PAUSED):
                raise IllegalMove(f"container {container_id} is {standing.name.lower()}")
            calls = self._sandbox.require_guest().containers
            await (calls.pause if paused else calls.resume)(container.guest_id)
            container.record.paused = paused
            await self.save()
        (tell.paused if paused else tell.resumed)(self._sandbox.events, container)

    async def update(self, container_id: str, resources: bytes) -> None:
        container = self.get(container_id)
        fitted = guest_resources(_json("resources", resources))
        await self._sandbox.require_guest().containers.update(container.guest_id, fitted)

    async def stats(self, container_id: str) -> ContainerStats:
        container = self.get(container_id)
        return await self._sandbox.require_guest().containers.stats(container.guest_id)

    async def resize(self, container_id: str, exec_id: str, *, columns: int, rows: int) -> None:
        container = self.get(container_id)
        process = container.process(exec_id)
        if not process.record.terminal:
            raise IllegalMove(f"{_named(container, exec_id)} has no terminal")
        await self._sandbox.require_guest().resize_terminal(process.process_id, columns=columns, rows=rows)

    def close_input(self, container_id: str, exec_id: str) -> None:
        self.get(container_id).process(exec_id).close_input()


def _resolve(process: ContainerProcess) -> None:
    """One that was never started and is deleted: whoever waits for it hears so, and containerd nothing."""
    if not process.exited:
        process.record.exit_code = 0
        process.exit.set_result(Exit(0, time.time_ns()))


def _json(name: str, data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Rejected(f"{name}: it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Rejected(f"{name}: it is no JSON object")
    return found


def _named(container: LiveContainer, exec_id: str) -> str:
    where = f"container {container.container_id}"
    return f"exec session {exec_id!r} of {where}" if exec_id else where
