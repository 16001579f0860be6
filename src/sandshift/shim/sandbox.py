"""The sandbox on this host: its VM, its guest's agent, its taps and its processes, from creation to the end.

What may happen when, during a migration, is not decided here: the session asks (`session/`), this does.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import json
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

from sandshift.config import Config
from sandshift.errors import Damaged, IllegalMove, SandshiftError, Unavailable
from sandshift.sandbox.model import Sandbox
from sandshift.shim.durable import Disk, make_folder, write_atomically
from sandshift.shim.late import REST_AFTER_S, load_rest
from sandshift.shim.parts import Parts, PodShare, Wish
from sandshift.shim.places import Places
from sandshift.shim.stopwatch import Stopwatch
from sandshift.shim.tasks.events import Publisher

if TYPE_CHECKING:
    from sandshift.guest.client import Guest
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.boot import Boot, Booter
    from sandshift.shim.processes import Processes
    from sandshift.shim.tasks.container_spec import Fitter
    from sandshift.shim.tasks.containers import Containers
    from sandshift.shim.tasks.disks import Disks
    from sandshift.vmm.machine import Machine, MachineEvent, MachineSpec

log = logging.getLogger(__name__)

EXIT_MIGRATED: Final = 255
"""Exit code of what ran in a sandbox that has moved away, or was abandoned (contract 4.12)."""
EXIT_KILLED: Final = 137
GUEST_ENDED: Final = frozenset({"SHUTDOWN", "RESET", "GUEST_PANICKED", "POWERDOWN"})
"""QMP's events of a guest that ends or begins anew by itself."""
POWER_OFF_S: Final = 3.0
"""How long a guest may take to power itself off when the sandbox is stopped."""


class Life(enum.Enum):
    """Where a sandbox's life on this host stands."""

    ABSENT = "absent"
    """No CreateSandbox yet."""
    CREATED = "created"
    AWAITING = "awaiting"
    """Made to receive a sandbox: answers READY, has no VM until PrepareSandbox."""
    READY = "ready"
    """The VM is this shim's; whether its vCPUs run is the session's matter."""
    STOPPED = "stopped"

    @property
    def vacant(self) -> bool:
        """A sandbox can come here: made for one, or not made at all, for ImportSandbox needs no CreateSandbox."""
        return self in (Life.ABSENT, Life.AWAITING)


class LiveSandbox:
    """One per shim. Methods raise errors of `sandshift.errors`; a failed start leaves nothing behind."""

    def __init__(
        self,
        config: Config,
        places: Places,
        parts: Parts,
        namespace: str,
        sandbox_id: str,
        events: Publisher | None = None,
    ) -> None:
        self.config = config
        self.places = places
        self.parts = parts
        self.namespace = namespace
        self.sandbox_id = sandbox_id
        self.disk = Disk()
        self.clock_us = parts.clock_us
        self.life = Life.ABSENT
        self.model = Sandbox(sandbox_id=sandbox_id)
        self.wish = Wish()
        self.spec: MachineSpec | None = None
        self.shape: MachineShape | None = None
        """Of the VM that a former shim left, until it is found."""
        self.machine: Machine | None = None
        self.guest: Guest | None = None
        self.events = events or Publisher("", namespace)
        self.started_from = ""
        self.moved_to = ""
        self.boot_id = ""
        self.created_at_ns = 0
        self.exited_at_ns = 0
        self.exit_code = 0
        self.ended = asyncio.Event()
        self.pod_share = PodShare()
        self.guest_ended = ""
        """How the guest ended itself, if it did."""
        self.end_expected = False
        """A session is about to end the VM: its death is no crash."""
        self.on_vm_death: Callable[[], Awaitable[None]] | None = None
        """A session's, while one is open: then the protocol says what a dead VM means."""
        self._task_watch: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._ending = asyncio.Lock()

    # What belongs to a sandbox, loaded when there is one: see late.py

    @functools.cached_property
    def booter(self) -> Booter:
        from sandshift.shim.boot import Booter  # noqa: PLC0415

        return Booter(self.places, self.parts)

    @functools.cached_property
    def processes(self) -> Processes:
        from sandshift.shim.processes import Processes  # noqa: PLC0415

        return Processes(self.places.output_dir)

    @functools.cached_property
    def disks(self) -> Disks:
        from sandshift.shim.tasks.disks import Disks  # noqa: PLC0415

        return Disks(self)

    @functools.cached_property
    def fitter(self) -> Fitter:
        from sandshift.shim.tasks.container_spec import Fitter  # noqa: PLC0415

        return Fitter(self.parts)

    @functools.cached_property
    def containers(self) -> Containers:
        from sandshift.shim.tasks.containers import Containers  # noqa: PLC0415

        return Containers(self)

    # Creation and start

    async def create(self, model: Sandbox, wish: Wish, share: PodShare, *, awaiting: bool) -> None:
        """Take the description. The same again is no error; another is refused."""
        if self.life is not Life.ABSENT:
            if (model.annotations, wish) == (self.model.annotations, self.wish):
                return
            raise IllegalMove(f"sandbox {self.sandbox_id} exists already, made from another description")
        self.model, self.wish, self.pod_share = model, wish, share
        self.life = Life.AWAITING if awaiting else Life.CREATED
        self.created_at_ns = time.time_ns()
        asyncio.get_running_loop().call_later(REST_AFTER_S, load_rest)
        await self.save()

    async def start(self) -> None:
        """Boot the VM (from a template where one fits), make the guest itself, and follow it."""
        if self.life in (Life.AWAITING, Life.READY):
            return
        async with self._starting:
            await self._start()

    async def _start(self) -> None:
        if self.life is Life.READY:
            return  # The same call came twice.
        if self.life is not Life.CREATED:
            raise IllegalMove(
                f"sandbox {self.sandbox_id} is {self.life.value}: create it before it is started"
            )
        from sandshift.session.right_licence import licence_of  # noqa: PLC0415
        from sandshift.shim.pod import hosts_file  # noqa: PLC0415

        watch = Stopwatch()
        if self.wish.network_namespace:
            cards = await self.parts.taps.pod_cards(self.sandbox_id, self.wish.network_namespace)
            self.model = replace(self.model, network_cards=cards)
            hosts = hosts_file(self.model.hostname or self.sandbox_id, cards)
            self.pod_share = replace(self.pod_share, hosts=hosts)
        boot = await self.booter.prepare(self.wish, self.model, template=self.config.vm.template)
        watch.lap("network and template")
        self.spec, self.started_from = boot.spec, "cold" if boot.template is None else "template"
        try:
            self.machine = await self._start_machine(boot)
            watch.lap("vm")
            self.guest = await self.parts.connect_guest(
                self.machine.agent_socket, self.config.migration.limits.agent_reply_s
            )
            await self.machine.run_vcpus(licence_of(None))
            await self._personalize(self.guest)
            watch.lap("agent")
        except BaseException:
            await self._tear_down()
            raise
        self.life = Life.READY
        self.created_at_ns = time.time_ns()
        self.processes.follow(self.guest)
        self.containers.follow(self.guest)
        self.watch()
        await self.save()
        watch.tell(f"sandbox {self.sandbox_id}")

    async def _start_machine(self, boot: Boot) -> Machine:
        """From the template; cold where there is none, or where it does not load after all."""
        if boot.template is not None:
            try:
                return await self.parts.vmm.start_from_template(boot.spec, boot.template)
            except Damaged as error:
                log.warning("template %s is dropped: %s", boot.template, error)
                self.booter.template_is_bad(boot)
                self.started_from = "cold"
        return await self.parts.vmm.start(boot.spec)

    async def _personalize(self, guest: Guest) -> None:
        await guest.personalize(
            entropy=os.urandom(64),
            machine_id=uuid.uuid4().hex,
            hostname=self.model.hostname or self.sandbox_id,
            cards=self.model.network_cards,
            nameservers=self.wish.nameservers,
        )
        self.boot_id = (await guest.info()).boot_id

    # A sandbox that comes from elsewhere

    async def prepare_incoming(self, model: Sandbox, shape: MachineShape) -> Machine:
        """Make the stopped VM that waits for the memory, and be connected to its agent before it runs."""
        await self.disk.run(self.processes.forget_output)
        boot = await self.booter.prepare_incoming(
            model, shape, self.disks.sources(), network_namespace=self.wish.network_namespace
        )
        self.spec = boot.spec
        try:
            self.machine = await self.parts.vmm.start_incoming(boot.spec)
            self.guest = await self.parts.connect_guest(
                self.machine.agent_socket, self.config.migration.limits.agent_reply_s
            )
        except BaseException:
            await self._tear_down(keep_disks=True)
            raise
        self.model = model
        self.watch()
        await self.save()
        return self.machine

    async def arrived(self) -> None:
        """The guest runs here now: step its clock and follow its processes. Not in the blackout; retried by its caller."""
        assert self.guest is not None
        self.life = Life.READY
        self.started_from = "migration"
        await self.save()  # Whatever its agent says: a later shim has a guest that runs.
        self.processes.follow(self.guest)
        self.containers.follow(self.guest)
        self.boot_id = (await self.guest.info()).boot_id
        await self.guest.set_clock(time.time_ns)
        await self.save()

    async def abandon_incoming(self) -> None:
        """The VM that waited here is not needed any more: back to waiting for another."""
        await self._tear_down()
        await self._end_all(EXIT_MIGRATED, time.time_ns())
        self.life = Life.AWAITING
        await self.save()

    # The end

    async def stop(self, timeout_s: float) -> None:
        """Power the guest off, or kill it after `timeout_s`."""
        if self.life is Life.STOPPED:
            return
        self.end_expected = True
        machine = self.machine
        if machine is not None and machine.alive and self.guest is not None and timeout_s > 0:
            with contextlib.suppress(SandshiftError, TimeoutError):
                async with asyncio.timeout(min(timeout_s, POWER_OFF_S)):
                    await self.guest.power_off()
                    await self._machine_ended(machine)
        await self.end(EXIT_KILLED)

    async def end(self, exit_code: int, *, moved_to: str = "") -> None:
        """The sandbox is over on this host; `moved_to` says where it went, if it did. Idempotent."""
        async with self._ending:  # A session may end it in the moment in which its VM dies.
            if self.life is not Life.STOPPED:
                await self._end(exit_code, moved_to)

    async def _end(self, exit_code: int, moved_to: str) -> None:
        self.end_expected = True
        self.moved_to = moved_to
        known = self.life is not Life.ABSENT or self.places.sandbox_file.exists()
        await self._tear_down()
        self.life = Life.STOPPED
        self.exit_code = exit_code
        self.exited_at_ns = time.time_ns()
        await self._end_all(exit_code, self.exited_at_ns, moved_to)
        self.ended.set()
        if known:  # Else there never was a sandbox, and a later shim must not find one that has ended.
            await self._save_end()

    async def _save_end(self) -> None:
        try:
            await self.save()
            await self.containers.save()
        except Unavailable as error:
            log.warning("sandbox %s has ended; a later shim will not know how: %s", self.sandbox_id, error)

    async def end_what_is_left(self) -> None:
        """An earlier shim was killed as it ended this sandbox: containers whose end is not on disk end now, as the rest did."""
        if self.life is Life.STOPPED and self.containers.any_lives:
            await self._end_all(self.exit_code, self.exited_at_ns, self.moved_to)
            await self._save_end()

    async def _end_all(self, exit_code: int, exited_at_ns: int, moved_to: str = "") -> None:
        from sandshift.shim.processes import Exit  # noqa: PLC0415
        from sandshift.shim.tasks import container_events  # noqa: PLC0415

        await self.processes.end_all(Exit(exit_code, exited_at_ns))
        if moved_to:
            session, _, destination = moved_to.removeprefix("session ").partition(", ")
            container_events.migrated(self.events, self.sandbox_id, session, destination)
        await self.containers.end_all(Exit(exit_code, exited_at_ns))

    async def _machine_ended(self, machine: Machine) -> None:
        async for event in machine.events():
            if event.name == "DEAD":
                return

    async def _tear_down(self, *, keep_disks: bool = False) -> None:
        """`keep_disks`: those of containers that were created here for a sandbox that comes stay known: it may come yet."""
        self.end_expected = True
        await self.processes.let_go()
        await self.containers.let_go()
        if self._task_watch is not None and self._task_watch is not asyncio.current_task():
            self._task_watch.cancel()
        if self.guest is not None:
            await self.guest.close()
            self.guest = None
        if self.machine is not None:
            await self.machine.destroy()
            self.machine = None
        if self.spec is not None:
            await self.booter.release(self.spec)
            self.spec = None
        if not keep_disks:
            self.disks.forget()
        self.end_expected = False

    def watch(self) -> None:
        assert self.machine is not None
        self._task_watch = asyncio.create_task(self._watch_machine(self.machine), name="watch the VM")

    async def _watch_machine(self, machine: Machine) -> None:
        """Ends the sandbox when its VM ends by itself. Exceptions end up in the log: there is nobody to tell."""
        async for event in machine.events():
            if event.name in GUEST_ENDED:
                self.note_guest_end(event)
            if event.name == "DEAD" and not self.end_expected:
                log.warning("the VM of sandbox %s has ended: %s", self.sandbox_id, dict(event.data))
                await (self.on_vm_death or self._crashed)()

    def note_guest_end(self, event: MachineEvent) -> None:
        """Remember how the guest ended itself: the VM process ends with it."""
        why = event.data.get("reason") or event.data.get("action") or "no reason given"
        self.guest_ended = f"{event.name.lower()}: {why}"

    async def _crashed(self) -> None:
        await self.end(EXIT_KILLED)

    async def let_go(self) -> None:
        """This shim ends; the VM goes on, for another shim to find."""
        if self.life is not Life.ABSENT:
            await self.processes.let_go()
            await self.containers.close()
        await self.events.close()
        if self._task_watch is not None:
            self._task_watch.cancel()
        if self.guest is not None:
            await self.guest.close()
        if self.machine is not None:
            await self.machine.detach()
        self.disk.close()

    # State

    async def save(self) -> None:
        """Write down what a later shim needs to find this sandbox again."""
        from sandshift.sandbox import codec  # noqa: PLC0415

        document = {
            "sandbox": codec.sandbox_to_proto(self.model).SerializeToString().hex(),
            "shape": codec.shape_to_proto(self.spec.shape).SerializeToString().hex() if self.spec else "",
            "life": self.life.value,
            "created_at_ns": self.created_at_ns,
            "started_from": self.started_from,
            "boot_id": self.boot_id,
            "exit_code": self.exit_code,
            "exited_at_ns": self.exited_at_ns,
            "moved_to": self.moved_to,
            "wish": asdict(self.wish),
            "pod_share": self.pod_share.as_document(),
            "disks": self.disks.as_document(),
        }
        make_folder(self.places.state_dir)
        data = json.dumps(document).encode()
        await self.disk.run(lambda: write_atomically(self.places.sandbox_file, data))

    def frozen_model(self) -> Sandbox:
        """The model with its processes as they are now, for the saved state."""
        return replace(self.model, processes=self.processes.as_model(), containers=self.containers.as_model())

    # Output during a move: of processes and containers

    def freeze_output(self) -> dict[tuple[str, int], int]:
        """From now on nothing more is taken; (process id, stream) -> first byte not delivered.

        A shim that began while the guest stood still has nothing but files: the agent cannot be asked.
        """
        processes = self.processes
        on_disk = {} if processes.followed else processes.offsets_on_disk()
        own = {**on_disk, **processes.freeze()}
        return {**own, **self.containers.freeze()}

    def thaw_output(self) -> None:
        self.processes.thaw()
        self.containers.thaw()

    def require_machine(self) -> Machine:
        if self.machine is None or not self.machine.alive:
            raise Unavailable(f"sandbox {self.sandbox_id} has no living VM")
        return self.machine

    def require_guest(self) -> Guest:
        if self.guest is None:
            raise IllegalMove(f"sandbox {self.sandbox_id} is {self.life.value}: it has no guest to reach")
        return self.guest
