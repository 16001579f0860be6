"""Two hosts of a simulation: real shims that can be killed and come back, on fake VMs that outlive them."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import TypeVar

import ttrpc
from sandshift.config import Limits
from sandshift.errors import Rejected
from sandshift.fleet.host import Host
from sandshift.shim.parts import Parts
from sandshift.shim.serve import ShimServer
from sandshift.shim.tasks.events import Publisher
from sandshift.vmm.fake_process import FakeProcess
from tests.shim.house import NAMESPACE, SANDBOX, FakeHost, FakePacker
from tests.sim.loop import OWNER, SimLoop, owned_by

T = TypeVar("T")
TELL = Callable[[str], None]
DISK_S_MAX = 0.003
START_S_MAX = 0.05


class InlineDisk:
    """`shim.durable.Disk` without a thread: each write happens at once and its answer takes a while."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def soon(self, action: Callable[[], object], on_error: Callable[[BaseException], None]) -> None:
        try:
            action()
        except Exception as error:
            on_error(error)

    async def run(self, action: Callable[[], T]) -> T:
        done = action()
        await asyncio.sleep(self._random.uniform(0, DISK_S_MAX))
        return done

    def close(self) -> None:
        return


class SimHost(FakeHost):
    """`start` and `delete` are what the shim's program does; `kill_shim` and `kill_vm` what may happen to it."""

    def __init__(self, folder: Path, name: str, random: Random, tell: TELL) -> None:
        super().__init__(folder, name, Limits())
        self.fleet = Host(self.config)
        self.path = self.config.shim_socket(NAMESPACE, SANDBOX)
        self.socket_path = str(self.path)
        self.owner = ""
        """The living shim; empty if there is none."""
        self.refusals = 0
        """How many more times the program fails to start a shim."""
        self.kills: list[float] = []
        """When a shim was killed here, of the loop's clock."""
        self.problems: list[str] = []
        self._random = random
        self._tell = tell
        self._lives = 0
        self._listener: socket.socket | None = None

    # The shim's program

    async def start_shim(self) -> str:
        await asyncio.sleep(self._random.uniform(0, START_S_MAX))
        if self.refusals:
            self.refusals -= 1
            self._tell(f"{self.name}: a shim does not start")
            raise Rejected(f"host {self.name}: the simulation refuses to start it")
        self._ensure_shim()
        return f"unix://{self.path}"

    def _ensure_shim(self) -> None:
        if self.owner:
            return
        self._lives += 1
        self.owner = f"shim-{self._lives}@{self.name}"
        self.places.run_dir.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._listener = ttrpc.listen(self.socket_path)
        self._tell(f"{self.name}: {self.owner} starts")
        with owned_by(self.owner):
            asyncio.get_running_loop().create_task(self._serve(self.owner, self._listener), name=self.owner)

    async def _serve(self, owner: str, listener: socket.socket) -> None:
        """Task: the shim's process, from its start to its own end."""
        parts = Parts(
            self.vmm, self.taps, self.machines, self._connect_guest, self.clock_us, packer=FakePacker()
        )  # type: ignore[arg-type]
        events = Publisher(self.events_path, NAMESPACE, lambda: self.clock_us() * 1000)
        try:
            self.server = ShimServer(self.config, self.places, parts, NAMESPACE, SANDBOX, events)
            await self.server.run(listener)
            self.path.unlink(missing_ok=True)
            self._tell(f"{self.name}: {owner} has ended")
        except Exception as error:
            self._tell(f"{self.name}: {owner} fell over {error!r}")
            self.problems.append(f"{owner} fell over {error!r}")
        listener.close()
        if self.owner == owner:
            self.owner, self.server = "", None

    async def delete_shim(self) -> None:
        await asyncio.sleep(self._random.uniform(0, START_S_MAX))
        if self.places.unfinished_session():
            self._ensure_shim()
            return
        self._tell(f"{self.name}: what the shim left is deleted")
        self.kill_shim(told=False)
        if self.vm is not None:
            self.vm.die()
        await self.taps.detach(self.places.recorded_taps())
        for folder in (self.places.run_dir, self.places.state_dir):
            shutil.rmtree(folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    # What may happen

    def kill_shim(self, *, told: bool = True) -> None:
        """SIGKILL: its VM lives on."""
        if not self.owner:
            return
        if told:
            self._tell(f"FAULT {self.name}: {self.owner} is killed")
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        loop.kill(self.owner)
        if self._listener is not None:
            self._listener.close()
        active = self.server.desk.active if self.server is not None else None
        if active is not None and active.session.channel is not None:
            active.session.channel.close()  # type: ignore[attr-defined]
        if self.server is not None:
            _close_fifos(self.server)
        if told:
            self.kills.append(loop.time())
        self.owner, self.server = "", None

    def kill_vm(self) -> None:
        if self.vm is not None:
            doing = "which runs the guest" if self.vm.guest.running else f"which is {self.vm.state.value}"
            self._tell(f"FAULT {self.name}: the VM is killed, {doing}")
            self.vm.die()

    # What is there

    @property
    def vm(self) -> FakeProcess | None:
        """The living VM process."""
        process = self.world.processes.get(self.places.vm_dir)
        return process if process is not None and process.alive else None

    @property
    def leftovers(self) -> list[str]:
        """What there still is of the sandbox on this host."""
        left = [f"VM process {self.vm.state.value}"] if self.vm else []
        left += [f"tap {tap}" for tap in self.taps.made]
        if self.owner:
            left.append(f"{self.owner} is alive")
        folders = (self.places.run_dir, self.places.state_dir)
        left += [
            str(path.name) for folder in folders if folder.exists() for path in sorted(folder.rglob("*"))
        ]
        return left

    def end(self) -> None:
        """After a history: nothing of this host goes on."""
        self.kill_shim(told=False)
        for process in self.world.processes.values():
            process.die()


def _close_fifos(server: ShimServer) -> None:
    """What the kernel does with the fifos of a process that was killed."""
    if "containers" not in server.sandbox.__dict__:
        return
    containers = server.sandbox.containers
    for container in (*containers.all(), *containers._making.values()):
        for process in container.processes():
            for sink in process._sinks.values():
                sink.close()
            if process._input is not None:
                process._input._close()


def own_processes(saw: Callable[[FakeProcess, bool], None]) -> dict[str, object]:
    """Replacements for FakeProcess's methods: a VM belongs to no shim, and its virtual CPUs are watched."""

    def note(process: FakeProcess, *, running: bool) -> None:
        saw(process, running)

    def of_its_own(method: Callable[..., None]) -> Callable[..., None]:
        def called(process: FakeProcess, *given: object) -> None:
            with owned_by("world"):
                method(process, *given)

        return called

    async def listen(process: FakeProcess, *_what: object) -> None:
        """Nobody speaks to the agent's port here: `tests.shim.house.FakeGuest` stands for it."""

    return {
        "_note": note,
        "listen": listen,
        "begin_out": of_its_own(FakeProcess.begin_out),
        "begin_in": of_its_own(FakeProcess.begin_in),
    }


async def in_name_of(owner: str, work: Awaitable[T]) -> T:
    """Await `work` in this task, as `owner` from here on."""
    OWNER.set(owner)
    return await work
