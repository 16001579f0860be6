"""The shim's way into the VM: the agent's calls over the link, with bounds, as our own errors and types.

A Guest is connected as soon as QEMU listens, before the guest runs: calls wait until it does. What the agent keeps (processes,
their output and exits) outlives every Guest, so a new one, in a restarted shim or on the destination, goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from sandshift.errors import SandshiftError, Unavailable
from sandshift.guest.containers import GuestContainers
from sandshift.guest.output import OutputReader
from sandshift.link.transport import HostLink
from sandshift.sandbox.model import NetworkCard
from sandshift.status import from_status
from sandshift.wire.sandshift import agent_pb2 as pb
from sandshift.wire.sandshift.agent_ttrpc import AgentClient
from ttrpc import Client, Code, ConnectionClosed, InboxLimits, StatusError

Response = TypeVar("Response")

INBOX_BYTES_MAX: Final = 16 << 20
"""Above what the agent sends of one stream without an acknowledgement, so that no reader is ever cut off for being slow."""
INPUT_BYTES_MAX: Final = 64 << 10
"""Of one WriteInput call."""


@dataclass(frozen=True, slots=True)
class GuestInfo:
    agent_version: str
    boot_id: str
    """Empty until the guest was personalized."""
    kernel_release: str
    uptime_ns: int
    realtime_ns: int
    machine_id: str
    hostname: str
    memory_total_bytes: int
    generation_id: str
    personalized: bool


@dataclass(frozen=True, slots=True)
class GuestProcess:
    process_id: str
    pid: int
    args: tuple[str, ...]
    exited: bool
    exit_code: int
    stdout_offset: int
    """How far the process has written."""
    stderr_offset: int


class GuestExit(NamedTuple):
    code: int
    exited_at_ns: int
    """CLOCK_REALTIME of the guest."""


class Guest:
    """One connection to the agent. Every method may raise Unavailable, naming the bound, and what the agent answers."""

    def __init__(self, link: HostLink, path: Path, reply_s: float) -> None:
        self._link = link
        self._path = path
        self._reply_s = reply_s
        self._client = Client.over(
            link.connection, inbox=InboxLimits(bytes_max=INBOX_BYTES_MAX, patience_s=None)
        )
        self._agent = AgentClient(self._client)
        self.containers = GuestContainers(self._agent, self._call, reply_s)

    @classmethod
    async def connect(cls, socket_path: Path | str, *, reply_s: float = 30.0) -> Guest:
        """Connect to the virtio-serial port's socket, without waiting for the agent: the vCPUs need not run yet.

        Each connect opens a new epoch: the agent drops whoever was connected before.

        Raises:
            Unavailable: nobody listens on the socket.
        """
        path = Path(socket_path)
        try:
            link = HostLink.connect(str(path))
        except OSError as error:
            raise Unavailable(
                f"the agent's socket {path} cannot be connected to: {error.strerror}"
            ) from error
        return cls(link, path, reply_s)

    @property
    def is_open(self) -> bool:
        """Whether the agent has answered on this connection."""
        return self._link.is_open

    async def info(self) -> GuestInfo:
        told = await self._call("Info", self._agent.info(pb.InfoRequest(), timeout_s=self._reply_s))
        return GuestInfo(
            agent_version=told.agent_version,
            boot_id=told.boot_id,
            kernel_release=told.kernel_release,
            uptime_ns=told.uptime_ns,
            realtime_ns=told.realtime_ns,
            machine_id=told.machine_id,
            hostname=told.hostname,
            memory_total_bytes=told.memory_total_bytes,
            generation_id=told.generation_id,
            personalized=told.personalized,
        )

    async def personalize(
        self,
        *,
        entropy: bytes,
        machine_id: str,
        hostname: str,
        cards: Sequence[NetworkCard] = (),
        nameservers: Sequence[str] = (),
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Make the guest itself: randomness, ids, clock, network. After it, and not before, the guest has a boot id.

        Args:
            entropy: at least 32 bytes, of the host's best.
            cards: in the order of their places in the machine.
            clock_ns: the host's CLOCK_REALTIME; looked at as late as possible.
        """
        interfaces = [
            pb.NetworkInterface(
                index=index,
                mac=card.mac,
                addresses=card.addresses,
                gateway=card.gateway,
                mtu=card.mtu,
                routes=[
                    pb.NetworkRoute(
                        destination=way.destination,
                        gateway=way.gateway,
                        source=way.source,
                        on_link=way.on_link,
                    )
                    for way in card.routes
                ],
            )
            for index, card in enumerate(cards)
        ]
        request = pb.PersonalizeRequest(
            entropy=entropy,
            machine_id=machine_id,
            hostname=hostname,
            realtime_ns=clock_ns(),
            interfaces=interfaces,
            nameservers=nameservers,
        )
        await self._call("Personalize", self._agent.personalize(request, timeout_s=self._reply_s))

    async def set_clock(self, clock_ns: Callable[[], int] = time.time_ns) -> int:
        """Step the guest's clock to the host's; how far it was ahead, ns (behind: negative)."""
        request = pb.SetClockRequest(realtime_ns=clock_ns())
        return (
            await self._call("SetClock", self._agent.set_clock(request, timeout_s=self._reply_s))
        ).offset_ns

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
        """Start a process; its pid. Calling twice with the same arguments is one call.

        Args:
            container_id: run it in this container; `process_spec` is then the OCI process as JSON and has all of `args`,
                `env` and `cwd`, which stay empty.

        Raises:
            NotFound: the program or the container is not there.
            Rejected: the program may not be run, or the spec is none.
            IllegalMove: the container does not run.
        """
        request = pb.StartProcessRequest(
            process_id=process_id,
            args=args,
            env=dict(env or {}),
            cwd=cwd,
            terminal=terminal,
            stdin=stdin,
            container_id=container_id,
            process_spec=process_spec,
        )
        return (
            await self._call("StartProcess", self._agent.start_process(request, timeout_s=self._reply_s))
        ).pid

    async def wait_process(self, process_id: str) -> GuestExit:
        """Wait for the end, without a bound. The same answer every time until `forget_process`."""
        told = await self._call(
            "WaitProcess", self._agent.wait_process(pb.WaitProcessRequest(process_id=process_id))
        )
        return GuestExit(told.exit_code, told.exited_at_ns)

    async def signal_process(self, process_id: str, number: int, *, whole_group: bool = False) -> None:
        request = pb.SignalProcessRequest(process_id=process_id, signal=number, all=whole_group)
        await self._call("SignalProcess", self._agent.signal_process(request, timeout_s=self._reply_s))

    async def forget_process(self, process_id: str) -> None:
        """Let the agent drop an ended process, its output and its exit."""
        request = pb.ForgetProcessRequest(process_id=process_id)
        await self._call("ForgetProcess", self._agent.forget_process(request, timeout_s=self._reply_s))

    async def list_processes(self) -> list[GuestProcess]:
        request = pb.ListProcessesRequest()
        told = await self._call("ListProcesses", self._agent.list_processes(request, timeout_s=self._reply_s))
        return [
            GuestProcess(
                process_id=one.process_id,
                pid=one.pid,
                args=tuple(one.args),
                exited=one.exited,
                exit_code=one.exit_code,
                stdout_offset=one.stdout_offset,
                stderr_offset=one.stderr_offset,
            )
            for one in told.processes
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
        """Give a stream's bytes to `take` from `delivered()` on, until the process has closed it. See OutputReader."""
        reader = OutputReader(self._agent, process_id, stream, delivered, take, room)
        await self._call("ReadOutput", reader.run())

    async def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool = False) -> int:
        """Write `data` to stdin, where it begins at `offset`; waits for room; how far stdin is taken in the end.

        What was written before is ignored, so the same call may be made again on another connection.
        """
        end, taken = offset + len(data), offset
        while True:
            piece = data[taken - offset :][:INPUT_BYTES_MAX]
            is_last = taken + len(piece) == end
            request = pb.WriteInputRequest(
                process_id=process_id, offset=taken, data=piece, eof=eof and is_last
            )
            taken = (await self._call("WriteInput", self._agent.write_input(request))).offset
            if taken >= end:
                return taken

    async def resize_terminal(self, process_id: str, *, columns: int, rows: int) -> None:
        """Set the size of a process's terminal. After the process's end nothing happens.

        Raises:
            IllegalMove: it has no terminal.
        """
        request = pb.ResizeTerminalRequest(process_id=process_id, columns=columns, rows=rows)
        await self._call("ResizeTerminal", self._agent.resize_terminal(request, timeout_s=self._reply_s))

    async def power_off(self) -> None:
        """Write everything out and switch the VM off: soon after the answer."""
        await self._call("PowerOff", self._agent.power_off(pb.PowerOffRequest(), timeout_s=self._reply_s))

    async def close(self) -> None:
        """End the connection; nothing in the guest ends with it. Idempotent."""
        await self._client.close()
        self._link.abort()

    async def _call(self, name: str, call: Coroutine[Any, Any, Response]) -> Response:
        try:
            return await call
        except StatusError as error:
            raise self._explained(name, error) from error

    def _explained(self, name: str, error: StatusError) -> SandshiftError:
        if isinstance(error, ConnectionClosed):
            return Unavailable(
                f"the connection to the guest's agent at {self._path} is over ({name}): {error.message}"
            )
        if error.code is Code.DEADLINE_EXCEEDED:
            return Unavailable(
                f"the guest's agent at {self._path} did not answer {name} within {self._reply_s:g} s"
            )
        return from_status(error)
