"""containerd's Sandbox service on our shim: messages in, the live sandbox asked, messages out."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.errors import Rejected
from sandshift.identifiers import shown
from sandshift.shim.sandbox import Life, LiveSandbox
from sandshift.wire.containerd import platform_pb2, sandbox_pb2, sandbox_ttrpc

if TYPE_CHECKING:
    from collections.abc import Callable

    import ttrpc
    from sandshift.shim.migration.desk import Desk
    from sandshift.shim.pod import Pod

DESTINATION_ANNOTATION: Final = "io.sandshift.migration.destination"
READY: Final = "SANDBOX_READY"
NOT_READY: Final = "SANDBOX_NOTREADY"
LINGER_S: Final = 1.0
"""After Shutdown the shim stays until its caller has hung up, or this long: an exit at once looks like a crash."""


def stamp_ns(at_ns: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(at_ns)
    return stamp


class SandboxService(sandbox_ttrpc.SandboxService):
    def __init__(self, sandbox: LiveSandbox, desk: Desk, shut_down: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._desk = desk
        self._shut_down = shut_down

    def _check(self, sandbox_id: str) -> None:
        if sandbox_id != self._sandbox.sandbox_id:
            raise Rejected(
                f"sandbox_id {shown(sandbox_id)} is not this shim's sandbox {shown(self._sandbox.sandbox_id)}"
            )

    async def create_sandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.CreateSandboxResponse:
        self._check(request.sandbox_id)
        self._desk.require_no_session("CreateSandbox")
        from sandshift.shim.creation import parse_creation  # noqa: PLC0415 - see late.py

        pod = await asyncio.to_thread(parse_creation, request)
        await self._desk.change("CreateSandbox", lambda: self._create(pod))
        return sandbox_pb2.CreateSandboxResponse()

    async def _create(self, pod: Pod) -> None:
        awaiting = pod.model.annotations.get(DESTINATION_ANNOTATION, "") == "true"
        await self._sandbox.create(pod.model, pod.wish, pod.share, awaiting=awaiting)

    async def start_sandbox(
        self, request: sandbox_pb2.StartSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.StartSandboxResponse:
        self._check(request.sandbox_id)
        await self._desk.change("StartSandbox", self._sandbox.start)
        machine = self._sandbox.machine
        return sandbox_pb2.StartSandboxResponse(
            pid=machine.pid if machine else 0, created_at=stamp_ns(self._sandbox.created_at_ns)
        )

    async def platform(
        self, request: sandbox_pb2.PlatformRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.PlatformResponse:
        self._check(request.sandbox_id)
        return sandbox_pb2.PlatformResponse(platform=platform_pb2.Platform(os="linux", architecture="amd64"))

    async def stop_sandbox(
        self, request: sandbox_pb2.StopSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.StopSandboxResponse:
        self._check(request.sandbox_id)
        timeout_s = float(request.timeout_secs)
        await self._desk.change("StopSandbox", lambda: self._sandbox.stop(timeout_s))
        return sandbox_pb2.StopSandboxResponse()

    async def wait_sandbox(
        self, request: sandbox_pb2.WaitSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.WaitSandboxResponse:
        self._check(request.sandbox_id)
        await self._sandbox.ended.wait()
        return sandbox_pb2.WaitSandboxResponse(
            exit_status=self._sandbox.exit_code, exited_at=stamp_ns(self._sandbox.exited_at_ns)
        )

    async def sandbox_status(
        self, request: sandbox_pb2.SandboxStatusRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.SandboxStatusResponse:
        self._check(request.sandbox_id)
        sandbox = self._sandbox
        ready = sandbox.life in (Life.READY, Life.AWAITING)
        response = sandbox_pb2.SandboxStatusResponse(
            sandbox_id=sandbox.sandbox_id,
            pid=sandbox.machine.pid if sandbox.machine else 0,
            state=READY if ready else NOT_READY,
            info=self._info(),
        )
        if sandbox.created_at_ns:
            response.created_at.CopyFrom(stamp_ns(sandbox.created_at_ns))
        if sandbox.exited_at_ns:
            response.exited_at.CopyFrom(stamp_ns(sandbox.exited_at_ns))
        return response

    def _info(self) -> dict[str, str]:
        standing = self._desk.standing
        info = {"sandshift.life": self._sandbox.life.value, "migration.state": standing.state.value}
        if standing.session_id:
            info["migration.session"] = standing.session_id
        if self._sandbox.moved_to:
            info["migration.moved_to"] = self._sandbox.moved_to
        return info

    async def ping_sandbox(
        self, request: sandbox_pb2.PingRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.PingResponse:
        self._check(request.sandbox_id)
        return sandbox_pb2.PingResponse()

    async def sandbox_metrics(
        self, request: sandbox_pb2.SandboxMetricsRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.SandboxMetricsResponse:
        """What the machine takes on this host, all of its containers in it. Theirs are Task.Stats'."""
        from sandshift.shim.tasks.container_stats import machine_metrics  # noqa: PLC0415 - see late.py
        from sandshift.shim.usage import Usage, usage_of  # noqa: PLC0415
        from sandshift.wire.containerd import metrics_pb2  # noqa: PLC0415

        self._check(request.sandbox_id)
        machine, shape = self._sandbox.machine, self._sandbox.spec.shape if self._sandbox.spec else None
        used = usage_of(machine.pid) if machine is not None else Usage()
        metrics = machine_metrics(used, memory_limit_bytes=shape.memory_bytes if shape else 0)
        data = Any(type_url=metrics.DESCRIPTOR.full_name, value=metrics.SerializeToString())
        return sandbox_pb2.SandboxMetricsResponse(
            metrics=metrics_pb2.Metric(
                timestamp=stamp_ns(time.time_ns()), id=self._sandbox.sandbox_id, data=data
            )
        )

    async def _end_all(self) -> None:
        """The sandbox and then the shim, also when whoever asked has gone meanwhile."""
        await self._sandbox.stop(0)
        asyncio.get_running_loop().call_later(LINGER_S, self._shut_down)

    async def shutdown_sandbox(
        self, request: sandbox_pb2.ShutdownSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.ShutdownSandboxResponse:
        self._check(request.sandbox_id)
        await self._desk.change("ShutdownSandbox", self._end_all)
        return sandbox_pb2.ShutdownSandboxResponse()
