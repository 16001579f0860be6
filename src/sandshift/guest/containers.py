"""The containers inside the guest, as the shim asks the agent for them. A part of `Guest`: `guest.containers`.

The init's streams, input, exit and signals are those of the process `agent_id(container_id)`: `Guest` has the calls.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from sandshift.sandbox.disks import DiskLayer, GuestMount, GuestRootfs
from sandshift.wire.sandshift import agent_pb2 as pb
from sandshift.wire.sandshift.agent_ttrpc import AgentClient

Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class ContainerStats:
    """What a container uses, as its control group in the guest counts it; 0: not counted, or for a limit: none is set."""

    cpu_usage_us: int
    cpu_user_us: int
    cpu_system_us: int
    cpu_throttled_periods: int
    cpu_throttled_us: int
    memory_usage_bytes: int
    memory_limit_bytes: int
    memory_anon_bytes: int
    memory_file_bytes: int
    memory_peak_bytes: int
    """0 with kernels before 5.19."""
    oom_kills: int
    pids_current: int
    pids_limit: int
    io_read_bytes: int
    io_write_bytes: int


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something that happened to a container beyond its processes' ends."""

    number: int
    container_id: str
    kind: str
    """"oom"."""
    at_ns: int
    """CLOCK_REALTIME of the guest."""


class ContainerPid(NamedTuple):
    pid: int
    process_id: str
    """Empty: not started over the agent, but a child of one that was."""


class Ask(Protocol):
    """How `Guest` waits for an answer and explains a failure."""

    def __call__(self, name: str, call: Coroutine[Any, Any, Response]) -> Coroutine[Any, Any, Response]: ...


class GuestContainers:
    """Every call may be repeated. What the agent answers comes as errors of `sandshift.errors`."""

    def __init__(self, agent: AgentClient, ask: Ask, reply_s: float) -> None:
        self._agent = agent
        self._ask = ask
        self._reply_s = reply_s

    async def prepare_pod(
        self,
        *,
        hosts: bytes = b"",
        resolv_conf: bytes = b"",
        shm_bytes: int = 0,
        sysctls: Mapping[str, str] | None = None,
    ) -> None:
        """Say what all containers share, before the first one.

        Args:
            hosts, resolv_conf: of every container that brings none of its own; empty: the guest's.
            shm_bytes: of the shared /dev/shm; 0: 64 MiB.
            sysctls: kernel settings of the whole pod, by name: "net.ipv4.ip_forward".

        Raises:
            Rejected: the guest's kernel has no such setting, or refuses the value.
        """
        request = pb.PreparePodRequest(
            hosts=hosts, resolv_conf=resolv_conf, shm_bytes=shm_bytes, sysctls=dict(sysctls or {})
        )
        await self._ask("PreparePod", self._agent.prepare_pod(request, timeout_s=self._reply_s))

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
        """Make a container whose init waits for `start`; the init's pid in the guest.

        Its disks may have been plugged in a moment ago: the agent waits for them. After a failure nothing of it is left,
        and none of its disks is in use. Calling twice with the same arguments is one call.

        Raises:
            Rejected: the spec or a disk is not what it should be.
            NotFound: the program, a disk or a folder is not there.
            AlreadyThere: another container has this id.
        """
        request = pb.CreateContainerRequest(
            container_id=container_id,
            spec=spec,
            rootfs=_rootfs(rootfs),
            mounts=[_mount(one) for one in mounts],
            terminal=terminal,
            stdin=stdin,
        )
        return (
            await self._ask("CreateContainer", self._agent.create_container(request, timeout_s=self._reply_s))
        ).pid

    async def start(self, container_id: str) -> None:
        """Let the init run its program. Of a container that runs already, nothing happens.

        Raises:
            NotFound: there is no such container, or its program is not in it.
            Rejected: its program cannot be run.
        """
        request = pb.StartContainerRequest(container_id=container_id)
        await self._ask("StartContainer", self._agent.start_container(request, timeout_s=self._reply_s))

    async def delete(self, container_id: str) -> None:
        """Remove a container whose init has ended or never started, and let go of its disks. Idempotent.

        Raises:
            IllegalMove: its init runs.
        """
        request = pb.DeleteContainerRequest(container_id=container_id)
        await self._ask("DeleteContainer", self._agent.delete_container(request, timeout_s=self._reply_s))

    async def pause(self, container_id: str) -> None:
        """Freeze all of its processes; returns when they stand still. Idempotent."""
        request = pb.PauseContainerRequest(container_id=container_id)
        await self._ask("PauseContainer", self._agent.pause_container(request, timeout_s=self._reply_s))

    async def resume(self, container_id: str) -> None:
        request = pb.ResumeContainerRequest(container_id=container_id)
        await self._ask("ResumeContainer", self._agent.resume_container(request, timeout_s=self._reply_s))

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change its limits. `resources`: OCI `linux.resources` as JSON; what it does not name stays.

        Raises:
            Rejected: it is not that, or the guest's kernel refuses a value.
        """
        request = pb.UpdateContainerRequest(container_id=container_id, resources=resources)
        await self._ask("UpdateContainer", self._agent.update_container(request, timeout_s=self._reply_s))

    async def stats(self, container_id: str) -> ContainerStats:
        request = pb.ContainerStatsRequest(container_id=container_id)
        told = await self._ask(
            "ContainerStats", self._agent.container_stats(request, timeout_s=self._reply_s)
        )
        return ContainerStats(**{name: getattr(told, name) for name in ContainerStats.__slots__})

    async def pids(self, container_id: str) -> list[ContainerPid]:
        """All of its processes, as pids of the guest, in ascending order."""
        request = pb.ContainerPidsRequest(container_id=container_id)
        told = await self._ask("ContainerPids", self._agent.container_pids(request, timeout_s=self._reply_s))
        return [ContainerPid(one.pid, one.process_id) for one in told.processes]

    async def events(self, from_number: int = 0) -> AsyncGenerator[ContainerEvent, None]:
        """What happened, from a number on and as it comes, until the connection ends or the iteration is closed.

        The agent keeps the latest ones, so a new connection goes on after the last number that was seen.
        """
        request = pb.ContainerEventsRequest(from_number=from_number)
        async with self._agent.container_events(request) as told:
            stream = aiter(told)
            while True:
                try:
                    one = await self._ask("ContainerEvents", _next(stream))
                except StopAsyncIteration:
                    return
                yield ContainerEvent(one.number, one.container_id, one.kind, one.at_ns)


async def _next(stream: AsyncIterator[Response]) -> Response:
    return await anext(stream)


def _layer(layer: DiskLayer | None) -> pb.Layer | None:
    return pb.Layer(lun=layer.lun, file_system=layer.file_system) if layer is not None else None


def _rootfs(rootfs: GuestRootfs) -> pb.Rootfs:
    return pb.Rootfs(
        layers=[pb.Layer(lun=one.lun, file_system=one.file_system) for one in rootfs.layers],
        writable=_layer(rootfs.writable),
        writable_bytes=rootfs.writable_bytes,
        read_only=rootfs.read_only,
    )


def _mount(mount: GuestMount) -> pb.GuestMount:
    return pb.GuestMount(
        destination=mount.destination,
        content=mount.content,
        mode=mount.mode,
        layer=_layer(mount.layer),
        read_only=mount.read_only,
        layer_path=mount.layer_path,
    )
