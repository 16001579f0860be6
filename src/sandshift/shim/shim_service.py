"""sandshift.v1.Shim: what our own tools ask of a shim, beyond containerd's services and Migration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from sandshift.errors import NotFound, Rejected, SandshiftError
from sandshift.identifiers import shown
from sandshift.sandbox import codec
from sandshift.session.ids import container_id
from sandshift.session.statement import Cell
from sandshift.shim.output import STREAMS
from sandshift.shim.sandbox import Life, LiveSandbox
from sandshift.shim.sandbox_service import stamp_ns
from sandshift.vmm.machine import RunState
from sandshift.wire.sandshift import shim_pb2, shim_ttrpc

if TYPE_CHECKING:
    import ttrpc
    from sandshift.shim.migration.desk import Desk

ARGS_BYTES_MAX: Final = 128 << 10


class ShimService(shim_ttrpc.ShimService):
    def __init__(self, sandbox: LiveSandbox, desk: Desk, pid: int) -> None:
        self._sandbox = sandbox
        self._desk = desk
        self._pid = pid

    async def status(
        self, request: shim_pb2.StatusRequest, context: ttrpc.CallContext
    ) -> shim_pb2.StatusResponse:
        sandbox = self._sandbox
        response = shim_pb2.StatusResponse(
            sandbox_id=sandbox.sandbox_id,
            vm_state=await self._vm_state(),
            shim_pid=self._pid,
            boot_id=sandbox.boot_id,
            network_cards=[codec.card_to_proto(card) for card in sandbox.model.network_cards],
            processes=self._processes(),
            started_from=sandbox.started_from,
            moved_to=sandbox.moved_to,
            life=sandbox.life.value,
        )
        if sandbox.created_at_ns:
            response.created_at.CopyFrom(stamp_ns(sandbox.created_at_ns))
        if sandbox.machine is not None:
            response.qemu_pid = sandbox.machine.pid
        if sandbox.spec is not None:
            shape = sandbox.spec.shape
            response.qemu_version = shape.qemu_version
            response.accelerator = shape.accelerator
            response.memory_bytes = shape.memory_bytes
        from sandshift.shim.migration.views import session_status  # noqa: PLC0415 - see Desk._opening

        session = await session_status(self._desk, request.session_id)
        if session is not None:
            response.session.CopyFrom(session)
        return response

    async def _vm_state(self) -> str:
        """In shim.proto's words. A VM that does not answer must not hide its session."""
        machine = self._sandbox.machine
        if machine is None:
            return "stopped" if self._sandbox.life is Life.STOPPED else "absent"
        try:
            state = await machine.run_state()
        except SandshiftError:
            return "no answer" if machine.alive else RunState.DEAD.value
        return "incoming" if state is RunState.INMIGRATE else state.value

    def _processes(self) -> list[shim_pb2.ProcessStatus]:
        return [
            shim_pb2.ProcessStatus(
                process_id=process.process_id,
                pid=process.pid,
                args=process.args,
                exited=process.exited,
                exit_code=process.exit.result().code if process.exited else 0,
            )
            for process in self._sandbox.processes.all()
        ]

    async def preflight(
        self, request: shim_pb2.PreflightRequest, context: ttrpc.CallContext
    ) -> shim_pb2.PreflightResponse:
        from sandshift.shim.migration.checks import preflight_destination, preflight_source  # noqa: PLC0415

        if request.description:
            return await preflight_destination(self._sandbox, request)
        return await preflight_source(self._sandbox, request)

    async def run_process(
        self, request: shim_pb2.RunProcessRequest, context: ttrpc.CallContext
    ) -> shim_pb2.RunProcessResponse:
        process_id = container_id(request.process_id)
        if not request.args:
            raise Rejected("args is empty: give the program and its arguments")
        if sum(len(arg) + 1 for arg in request.args) > ARGS_BYTES_MAX:
            raise Rejected(
                f"args has more than {ARGS_BYTES_MAX} bytes: put what is long into a file or into env"
            )
        self._desk.require_no_session("RunProcess")
        self._sandbox.require_guest()
        args, env, cwd = list(request.args), dict(request.env), request.cwd or "/"
        process = await self._desk.change(
            "RunProcess", lambda: self._sandbox.processes.run(process_id, args, env, cwd)
        )
        return shim_pb2.RunProcessResponse(pid=process.pid)

    async def logs(
        self, request: shim_pb2.LogsRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[shim_pb2.LogsResponse]:
        if request.stream not in (0, *STREAMS):
            raise Rejected(f"stream = {request.stream}: 0 is both, 1 stdout, 2 stderr")
        process = self._sandbox.processes.get(request.process_id)
        async for stream, offset, data in self._sandbox.processes.logs(
            request.process_id, request.stream, follow=request.follow
        ):
            yield shim_pb2.LogsResponse(stream=stream, offset=offset, data=data)
        if request.follow or process.exited:
            exit_ = await asyncio.shield(process.exit)
            yield shim_pb2.LogsResponse(exited=True, exit_code=exit_.code)

    async def report(
        self, request: shim_pb2.ReportRequest, context: ttrpc.CallContext
    ) -> shim_pb2.ReportResponse:
        from sandshift.shim.migration.views import session_report  # noqa: PLC0415

        report = await session_report(self._desk, request.session_id)
        if report is None:
            raise NotFound(f"there is no report of session {shown(request.session_id)} on this host")
        return shim_pb2.ReportResponse(report=report)

    async def force_resume(
        self, request: shim_pb2.ForceResumeRequest, context: ttrpc.CallContext
    ) -> shim_pb2.ForceResumeResponse:
        if request.confirm != request.session_id:
            raise Rejected(
                "confirm does not repeat session_id: force-resume can make two running copies of the guest"
            )
        try:
            expected = Cell(request.expected_cell)
        except ValueError:
            raise Rejected(
                f"expected_cell = {request.expected_cell}: give the cell that you saw, see 'sandshift session show'"
            ) from None
        await self._desk.force_resume(request.session_id, expected)
        return shim_pb2.ForceResumeResponse()
