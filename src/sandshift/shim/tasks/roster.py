"""Which containers a sandbox has: written down for a later shim, followed, frozen for a move, taken over after one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

import ttrpc
from sandshift.errors import Damaged, NotFound, SandshiftError
from sandshift.sandbox.model import Container
from sandshift.sandbox.patching import Patch
from sandshift.shim.durable import write_atomically
from sandshift.shim.processes import Exit
from sandshift.shim.tasks import container_events as tell
from sandshift.shim.tasks.container_process import ContainerProcess
from sandshift.shim.tasks.live_container import ContainerRecord, LiveContainer, record_of

if TYPE_CHECKING:
    from sandshift.guest.client import Guest
    from sandshift.shim.sandbox import LiveSandbox

log = logging.getLogger(__name__)

OOM: Final = "oom"


class Book(msgspec.Struct):
    """The file that a later shim reads."""

    own_sandbox: bool = False
    pod_prepared: bool = False
    events_told: int = 0
    events_since_ns: int = 0
    containers: list[ContainerRecord] = []


class Roster:
    def __init__(self, sandbox: LiveSandbox) -> None:
        self.own_sandbox = False
        """The first Task.Create made the sandbox, which ends with its last container."""
        self._sandbox = sandbox
        self._all: dict[str, LiveContainer] = {}
        self._guest: Guest | None = None
        """Set while processes are followed."""
        self._frozen = False
        """Since the guest stopped for its last pass: a shim that comes to follow only then takes nothing either."""
        self._pod_prepared = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._events_told = 0
        """Number of the last event of the agent's that was told."""
        self._events_since_ns = 0
        """The guest's clock: what was before was told where the sandbox came from."""

    def all(self) -> list[LiveContainer]:
        return list(self._all.values())

    def has(self, container_id: str) -> bool:
        return container_id in self._all

    def get(self, container_id: str) -> LiveContainer:
        try:
            return self._all[container_id]
        except KeyError:
            known = ", ".join(sorted(self._all)) or "none"
            raise NotFound(
                f"container {container_id!r} is not in sandbox {self._sandbox.sandbox_id}; it has: {known}"
            ) from None

    def processes(self) -> list[ContainerProcess]:
        return [process for container in self.all() for process in container.processes()]

    def _live(self, record: ContainerRecord, *, fresh: bool = False) -> LiveContainer:
        """`fresh`: what may be left of another of its name is not its own."""
        return LiveContainer(record, self._sandbox.places.offsets_dir, self._on_exit, fresh=fresh)

    # On disk

    async def save(self) -> None:
        """Write everything down, for a later shim. Raises Unavailable: then nothing of this call is on disk."""
        book = Book(
            self.own_sandbox,
            self._pod_prepared,
            self._events_told,
            self._events_since_ns,
            [one.record for one in self.all()],
        )
        data = msgspec.json.encode(book)
        path = self._sandbox.places.containers_file
        await self._sandbox.disk.run(lambda: write_atomically(path, data))

    def restore(self) -> None:
        """Read what an earlier shim wrote; nothing is followed yet, and a frozen guest is not asked anything. Blocks.

        Raises:
            Damaged: the file cannot be believed.
        """
        path = self._sandbox.places.containers_file
        try:
            book = msgspec.json.decode(path.read_bytes(), type=Book)
        except FileNotFoundError:
            return
        except msgspec.MsgspecError as error:
            raise Damaged(f"{path} cannot be read: {error}; the VM is left as it is") from error
        self.own_sandbox, self._pod_prepared = book.own_sandbox, book.pod_prepared
        self._events_told, self._events_since_ns = book.events_told, book.events_since_ns
        for record in book.containers:
            container = self._all[record.container_id] = self._live(record)
            for process in container.processes():
                if not process.record.pid:
                    process.record.started = False  # Its Start was not answered: it may be said again.
                _reopen(process)

    # Following

    def follow(self, guest: Guest) -> None:
        """Follow every process from where it is, and the containers' other events."""
        self._guest = guest
        for process in self.processes():
            if not self._frozen:
                process.thaw(guest)
            process.follow(guest)
        self._spawn(self._drop_half_made(), "half-made containers")
        self._spawn(self._follow_events(guest), "container events")

    async def _follow_events(self, guest: Guest) -> None:
        """Tells of containers that ran out of memory, each time once: numbers tell which were told before, here or by an
        earlier shim. What happened before a move was told where it happened."""
        async with contextlib.aclosing(guest.containers.events(self._events_told + 1)) as events:
            async for event in events:
                self._events_told = event.number
                here = next((one for one in self.all() if one.guest_id == event.container_id), None)
                if here is not None and event.kind == OOM and event.at_ns >= self._events_since_ns:
                    tell.out_of_memory(self._sandbox.events, here.container_id)
                    await self.save()

    async def _drop_half_made(self) -> None:
        """Containers whose Create an earlier shim did not come to answer: nobody will ever ask for them again."""
        for container in self.all():
            if not container.record.made and not container.lock.locked() and not self.is_creating(container):
                log.warning("container %s was never made: it is dropped", container.container_id)
                self._all.pop(container.container_id, None)
                await self._forget_in_guest(container)
                await container.init.forget()
                await self._sandbox.disks.release(container.guest_id)
        await self.save()

    def is_creating(self, container: LiveContainer) -> bool:
        """Whether a Create of this shim's is at it."""
        raise NotImplementedError

    async def _forget_in_guest(self, container: LiveContainer) -> None:
        if (guest := self._guest) is None:
            return
        with contextlib.suppress(NotFound):
            await guest.containers.delete(container.guest_id)
        for process in container.processes():
            with contextlib.suppress(NotFound):
                await guest.forget_process(process.process_id)

    def _on_exit(self, container: LiveContainer, process: ContainerProcess) -> None:
        if process.record.bound:  # Else nobody here has heard of it: `exec` tells both, in that order.
            tell.exited(self._sandbox.events, container, process)
        self._spawn(self._save_soon(), "save an exit")

    async def _save_soon(self) -> None:
        try:
            await self.save()
        except SandshiftError as error:
            log.warning("an exit is not written down, the guest keeps it: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(self._heard(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _heard(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """What goes wrong is in the log and nowhere else: nobody awaits it."""
        try:
            await work
        except ttrpc.ConnectionClosed as error:
            log.info("%s: the connection to the agent is over: %s", name, error)
        except SandshiftError as error:
            log.warning("%s: %s", name, error)

    # Moving

    def as_model(self) -> tuple[Container, ...]:
        """The containers as they are now, for the saved state."""
        return tuple(container.as_model() for container in self.all())

    def freeze(self) -> dict[tuple[str, int], int]:
        """From now on no output is taken and no input sent; (process id, stream) -> first byte not delivered."""
        self._frozen = True
        return {at: offset for process in self.processes() for at, offset in process.freeze().items()}

    def thaw(self) -> None:
        """The sandbox stays here: go on from where it was frozen."""
        self._frozen = False
        for process in self.processes():
            process.thaw(self._guest)

    async def expect(self, container: Container, patch: Patch) -> int:
        """At the destination, when a Task.Create has patched `container` of the imported model: it is known here from now
        on, under its new id; its saved pid. Nothing runs and nothing is opened before `adopt`. Idempotent."""
        known = self._all.get(patch.container_id)
        if known is not None and known.record.adopted and known.init.exited:
            for process in known.processes():  # Of an earlier session, which was given up.
                await process.forget()
            known = None
        if known is None:
            self._all[patch.container_id] = self._live(record_of(container, patch), fresh=True)
            await self.save()
        return container.pid

    def adopt(
        self,
        containers: Iterable[Container],
        patches: Mapping[str, Patch],
        offsets: Mapping[tuple[str, int], int],
    ) -> list[str]:
        """The sandbox runs here now: its containers' streams go on from `offsets` (process id, stream), into what the
        patches name (by container id here). Followed from the next `follow` on. What cannot be opened is answered, a line
        each: its bytes wait in the guest. Call `save` after."""
        problems = []
        for model in containers:
            patch = patches.get(model.container_id, Patch(model.container_id, model.container_id))
            container = self._all.get(model.container_id)
            if container is None:
                container = self._all[model.container_id] = self._live(record_of(model, patch), fresh=True)
            for process in container.processes():
                process.begin_at(
                    {stream: at for (name, stream), at in offsets.items() if name == process.process_id}
                )
                try:
                    process.open_stdio()
                except SandshiftError as error:
                    problems.append(f"{process.process_id}: {error.message}")
            tell.created(self._sandbox.events, container)
        self._pod_prepared = True
        self._events_since_ns = time.time_ns()
        return problems

    # The end

    async def let_go(self) -> None:
        """Stop following, without an end: somebody else will."""
        for task in list(self._tasks):
            task.cancel()
        self._guest = None
        for process in self.processes():
            await process.let_go()

    @property
    def any_lives(self) -> bool:
        """Whether some process's end is not known."""
        return any(not each.exited for each in self.processes() if each.record.started or not each.exec_id)

    async def end_all(self, exit_: Exit) -> None:
        """The sandbox is gone from here: every process has ended with `exit_`, unless it had before. They stay to be deleted."""
        await self.let_go()
        for process in self.processes():
            if process.record.started or not process.exec_id:
                process.end(exit_)
            process.close_stdio()

    async def close(self) -> None:
        """This shim ends."""
        await self.let_go()
        for process in self.processes():
            await process.close()


def _reopen(process: ContainerProcess) -> None:
    try:
        process.open_stdio()
    except SandshiftError as error:
        log.warning("%s: its output waits in the guest: %s", process.process_id, error)
