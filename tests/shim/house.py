"""Two hosts in one process: real shims, real sockets, a real channel; only the VMs and what is in them are fake.

The fakes of the VM pass tests/vmm/machine_suite.py. Used by the tests of the shim, the conformance mutants and the
simulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import ttrpc
from sandshift.config import Config, Limits, Migration, Places
from sandshift.config import Host as HostConfig
from sandshift.rootfs.plan import EROFS, DiskFile, RootfsPlan
from sandshift.sandbox.model import NetworkCard, Sandbox
from sandshift.sandbox.patching import Mount
from sandshift.sandbox.preflight import DestinationFacts, DiskFacts
from sandshift.sandbox.shape import MachineShape
from sandshift.shim.parts import BootFiles, Parts, Wish
from sandshift.shim.places import Places as ShimPlaces
from sandshift.shim.serve import ShimServer
from sandshift.shim.tasks.events import Publisher
from sandshift.vmm.fake import FakeVmm, FakeWorld
from sandshift.vmm.fake_process import FakeProcess
from sandshift.vmm.standard import DiskPlan, standard_shape
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd.sandbox_ttrpc import SandboxClient
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration.service_ttrpc import MigrationClient
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient
from tests.shim.fake_agent import FakeGuest

NAMESPACE = "test"
SANDBOX = "box"
MEMORY_BYTES = 64 << 20
DIGEST = "sha256:" + "0" * 64
SO_COOKIE = 57
TOLD_S = 20.0
"""How long a test waits for what is to be told; a loaded machine is slow."""


class FakePacker:
    """Packs nothing: what is mounted from one place has one content, on every host, and a folder with the same names too."""

    async def plan(
        self, mounts: Sequence[Mount], bundle: Path, *, scratch_file: Path | None = None
    ) -> RootfsPlan:
        if not mounts:
            return RootfsPlan(layers=_root_of(bundle))
        return RootfsPlan(layers=tuple([await self.pack_folder(Path(mount.source)) for mount in mounts]))

    async def pack_folder(self, path: Path) -> DiskFile:
        digest = "sha256:" + hashlib.sha256(path.name.encode()).hexdigest()
        return DiskFile(path, EROFS, 4096, digest, read_only=True)


def _root_of(bundle: Path) -> tuple[DiskFile, ...]:
    """The folder that a bundle names, if it is there."""
    root = bundle / json.loads((bundle / "config.json").read_text())["root"]["path"]
    if not root.is_dir():
        return ()
    names = "/".join(sorted(path.name for path in root.iterdir()))
    digest = "sha256:" + hashlib.sha256(names.encode()).hexdigest()
    return (DiskFile(root, EROFS, 4096, digest, read_only=True),)


class FakeTaps:
    def __init__(self) -> None:
        self.made: list[str] = []
        self.pods: dict[str, tuple[NetworkCard, ...]] = {}
        """File of a pod's network namespace -> what its interfaces give."""

    async def pod_cards(self, sandbox_id: str, network_namespace: str) -> tuple[NetworkCard, ...]:
        return self.pods.get(network_namespace, ())

    async def attach(
        self, sandbox_id: str, cards: tuple[NetworkCard, ...], network_namespace: str = ""
    ) -> dict[str, str]:
        taps = {f"net{index}": f"tap-{sandbox_id}-{index}" for index in range(len(cards))}
        self.made += taps.values()
        return taps

    async def detach(self, taps: list[str], network_namespace: str = "") -> None:
        self.made = [tap for tap in self.made if tap not in taps]


@dataclass
class FakeMachines:
    """A host that can do what its `facts` say."""

    folder: Path
    shared_memory: bool = True
    change_facts: Callable[[DestinationFacts], DestinationFacts] = field(default=lambda facts: facts)

    def files(self) -> BootFiles:
        return BootFiles(self.folder / "kernel", self.folder / "initramfs", self.folder / "root", None)  # type: ignore[arg-type]

    async def shape_for(self, wish: Wish, model: Sandbox) -> tuple[MachineShape, BootFiles]:
        shape = standard_shape(
            machine_type="pc-q35-10.0",
            accelerator="tcg",
            cpu_model="max",
            cpu_features=("aes", "sse4.2"),
            qemu_version="10.0.2",
            memory_bytes=wish.memory_bytes or MEMORY_BYTES,
            vcpus=wish.vcpus or 1,
            kernel_command_line="quiet",
            kernel_sha256="1" * 64,
            initramfs_sha256="2" * 64,
            uuid=str(uuid.uuid4()),
            generation_id=str(uuid.uuid4()),
            disks=(DiskPlan(4096, DIGEST),),
            macs=[card.mac for card in model.network_cards],
            shared_memory=self.shared_memory,
        )
        return shape, self.files()

    async def files_for(self, shape: MachineShape) -> BootFiles:
        return self.files()

    async def template_for(self, shape: MachineShape, files: BootFiles) -> Path:
        raise AssertionError("the configuration says: no templates")

    def template_is_bad(self, shape: MachineShape, files: BootFiles) -> None:
        raise AssertionError("the configuration says: no templates")

    async def facts(self, shape: MachineShape) -> DestinationFacts:
        return self.change_facts(
            DestinationFacts(
                qemu_version="10.0.2",
                accelerator="tcg",
                machine_types=frozenset({"pc-q35-10.0", "pc-q35-9.2"}),
                cpu_models=frozenset({"max", "qemu64"}),
                cpu_features=frozenset({"aes", "sse4.2", "avx"}),
                memory_free_bytes=8 << 30,
                disks={"disk0": DiskFacts(4096, DIGEST)},
            )
        )


class FakeHost:
    """One host: a shim that can be killed and started again on what it left, and its fake VM processes."""

    def __init__(self, folder: Path, name: str, limits: Limits | None = None) -> None:
        self.name = name
        self.config = Config(
            host=HostConfig(name=name),
            places=Places(
                run_dir=str(folder / name / "run"),
                state_dir=str(folder / name / "state"),
                cache_dir=str(folder / "cache"),
            ),
            migration=Migration(limits=limits or Limits()),
        )
        self.config = msgspec.structs.replace(
            self.config, vm=msgspec.structs.replace(self.config.vm, template=False)
        )
        self.world = FakeWorld()
        self.vmm = FakeVmm(self.world)
        self.taps = FakeTaps()
        self.machines = FakeMachines(folder)
        self.socket_path = str(folder / f"{name}.sock")
        self.places = ShimPlaces.of(self.config, NAMESPACE, SANDBOX)
        self.events_path = ""
        """Where the shim sends its events; empty: nowhere."""
        self.server: ShimServer | None = None
        self._task: asyncio.Task[None] | None = None

    def clock_us(self) -> int:
        """The wall clock of this host, as its fake VMs stamp events by it."""
        return int(asyncio.get_running_loop().time() * 1_000_000) + self.world.clock_ahead_us

    async def _connect_guest(self, path: Path, reply_s: float) -> FakeGuest:
        return FakeGuest(self.world.processes[path.parent], reply_s)

    async def start(self) -> None:
        """Start the shim, on what an earlier one left if there was one."""
        parts = Parts(
            self.vmm,
            self.taps,
            self.machines,
            self._connect_guest,
            self.clock_us,
            arrival_pause_s=0.0,
            packer=FakePacker(),
        )  # type: ignore[arg-type]
        self.places.run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            Path(self.socket_path).unlink()
        events = Publisher(self.events_path, NAMESPACE)
        self.server = ShimServer(self.config, self.places, parts, NAMESPACE, SANDBOX, events)
        await self.server.restore()
        self._task = asyncio.create_task(self.server.server.serve(ttrpc.listen(self.socket_path)))

    async def stop(self, *, push_s: float | None = None) -> None:
        """The shim lets go; its VM goes on. `push_s`: how long it waits for events that nobody takes."""
        assert self.server is not None
        await self.server.server.shutdown(grace_s=0.2)
        if push_s is not None:
            await self.server.sandbox.events.close(push_s)
        await self.server.let_go()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.server = None

    async def client(self) -> HostClient:
        return HostClient(await ttrpc.connect(self.socket_path), self._newest_id)

    def _newest_id(self) -> int:
        """Of what the session's record holds; 0: nothing."""
        assert self.server is not None
        return self.server.desk.require_active().session.record.last_id

    @property
    def process(self) -> FakeProcess:
        """The VM process of the sandbox."""
        return self.world.processes[self.places.vm_dir]


class HostClient:
    """Everything a caller can ask of one shim."""

    def __init__(self, client: ttrpc.Client, newest_id: Callable[[], int] = lambda: 0) -> None:
        self.connection = client
        self._newest_id = newest_id
        self.migration = MigrationClient(client)
        self.sandbox = SandboxClient(client)
        self.shim = ShimClient(client)
        self.task = TaskClient(client)

    async def status(self) -> shim_pb2.StatusResponse:
        return await self.shim.status(shim_pb2.StatusRequest(), timeout_s=10)

    async def start_sandbox(self) -> None:
        await self.sandbox.create_sandbox(sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX))
        await self.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))

    async def await_sandbox(self) -> None:
        request = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX)
        request.annotations["io.sandshift.migration.destination"] = "true"
        await self.sandbox.create_sandbox(request)

    async def finalize(self, session_id: str, action: int, receipt: bytes = b"") -> None:
        request = m.FinalizeSandboxRequest(session_id=session_id, action=action, peer_receipt=receipt)  # type: ignore[arg-type]
        await self.migration.finalize_sandbox(request, timeout_s=20)

    async def give_socket(self, session_id: str, end: socket.socket) -> None:
        request = m.CreateDuplicateSocketRequest(session_id=session_id, protocol_info=descriptor_of(end))
        await self.migration.create_duplicate_socket(request, timeout_s=10)

    async def phases(self, session_id: str, until: tuple[str, str]) -> list[tuple[str, str]]:
        """What has been told, progress left out: up to `until`, which is awaited, and all that the record holds by then."""
        told: list[tuple[str, str]] = []
        stream = self.migration.notifications(m.NotificationsRequest(session_id=session_id))
        try:
            async with asyncio.timeout(TOLD_S):
                async for response in stream:
                    if not response.notification.HasField("progress"):
                        told.append(words(response))
                    if until in told and response.message_id >= self._newest_id():
                        break
        except TimeoutError:
            raise AssertionError(f"no {until} within {TOLD_S:g} s: {told}") from None
        finally:
            stream.cancel()
        return told


def words(response: m.NotificationsResponse) -> tuple[str, str]:
    from sandshift.wire.migration import options_pb2  # noqa: PLC0415

    phase = options_pb2.Phase.Name(response.notification.phase).removeprefix("PHASE_")
    return phase, options_pb2.PhaseState.Name(response.notification.state).removeprefix("PHASE_STATE_")


def descriptor_of(end: socket.socket) -> bytes:
    return m.SocketDescriptor(
        version=1,
        pid=os.getpid(),
        fd=end.fileno(),
        so_cookie=int.from_bytes(end.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little"),
        family=end.family,
        type=socket.SOCK_STREAM,
        protocol=end.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
    ).SerializeToString()


def channel() -> tuple[socket.socket, socket.socket]:
    """The two connected ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = socket.create_connection(server.getsockname())
        destination, _address = server.accept()
    return source, destination


@dataclass
class TwoHosts:
    source: FakeHost
    destination: FakeHost
    s: HostClient
    d: HostClient
    session: str = "session-1"

    async def reconnect(self) -> None:
        await self.s.connection.close()
        await self.d.connection.close()
        self.s, self.d = await self.source.client(), await self.destination.client()

    async def export(self, options: object = None) -> m.PrepareAndExportSandboxResponse:
        request = m.PrepareAndExportSandboxRequest(session_id=self.session)
        if options is not None:
            request.init_options.CopyFrom(options)
        return await self.s.migration.prepare_and_export_sandbox(request, timeout_s=10)

    async def import_config(self, config: object) -> None:
        request = m.ImportSandboxRequest(session_id=self.session, sandbox_id_or_config=SANDBOX.encode())
        request.config.CopyFrom(config)  # type: ignore[arg-type]
        await self.d.migration.import_sandbox(request, timeout_s=10)

    async def prepare(self, options: object = None) -> None:
        """Up to PrepareSandbox, on both sides."""
        await self.import_config((await self.export(options)).config)
        request = m.PrepareSandboxRequest(session_id=self.session)
        if options is not None:
            request.init_options.CopyFrom(options)
        await self.d.migration.prepare_sandbox(request, timeout_s=10)

    async def connect(self) -> None:
        """Hand both sides their ends; ours are closed."""
        source, destination = channel()
        with source, destination:
            await self.give_both(source, destination)

    async def give_both(self, source: socket.socket, destination: socket.socket) -> None:
        await self.d.give_socket(self.session, destination)
        await self.s.give_socket(self.session, source)

    async def transfer(self) -> None:
        request = m.TransferSandboxRequest(session_id=self.session)
        await asyncio.gather(
            self.d.migration.transfer_sandbox(request, timeout_s=30),
            self.s.migration.transfer_sandbox(request, timeout_s=30),
        )

    async def ready(self, options: object = None) -> None:
        """Everything is on the destination, nothing is decided."""
        await self.prepare(options)
        await self.connect()
        await self.transfer()

    async def blackout_ms(self) -> int:
        """What the destination has told of the blackout; it has been told."""
        async with asyncio.timeout(5):
            async for response in self.d.migration.notifications(
                m.NotificationsRequest(session_id=self.session)
            ):
                if response.notification.HasField("blackout_exited"):
                    return response.notification.blackout_exited.blackout_duration_milliseconds
        raise AssertionError("the stream ended without it")

    def runners(self) -> list[str]:
        return [
            host.name
            for host in (self.source, self.destination)
            if any(p.alive and p.runs.is_set() for p in host.world.processes.values())
        ]


@contextlib.asynccontextmanager
async def two_hosts(
    folder: Path,
    limits: Limits | None = None,
    *,
    destination_ahead_s: float = 0.0,
    awaits: bool = True,
    events: Mapping[str, str] | None = None,
) -> AsyncIterator[TwoHosts]:
    """A sandbox that runs on the source, and a destination that awaits one.

    `events`: where each host's shim sends them; not `awaits`: nobody has called CreateSandbox at the destination.
    """
    source, destination = FakeHost(folder, "source", limits), FakeHost(folder, "destination", limits)
    for host in (source, destination):
        host.events_path = (events or {}).get(host.name, "")
    destination.world.clock_ahead_us = int(destination_ahead_s * 1_000_000)
    await source.start()
    await destination.start()
    hosts = TwoHosts(source, destination, await source.client(), await destination.client())
    try:
        await hosts.s.start_sandbox()
        if awaits:
            await hosts.d.await_sandbox()
        yield hosts
    finally:
        for client in (hosts.s, hosts.d):
            await client.connection.close()
        for host in (source, destination):
            if host.server is not None:
                await host.stop()
            for process in list(host.world.processes.values()):
                process.die()
