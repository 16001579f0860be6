"""containerd's Task service on our shim, in its versions 2 and 3: messages in, the sandbox's containers asked, messages out.

What may happen while a migration session is open is asked here (contract 4.13): what changes the sandbox is refused at
once, never held up; Kill is let through on the source until the blackout starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.empty_pb2 import Empty

from sandshift import VERSION
from sandshift.errors import NotSupported, Rejected
from sandshift.identifiers import identifier, shown
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.sandbox.oci import PodShare, guest_spec
from sandshift.sandbox.patching import Mount, Patch
from sandshift.shim.pod import pod_of_spec
from sandshift.shim.sandbox import Life
from sandshift.shim.sandbox_service import LINGER_S, stamp_ns
from sandshift.shim.tasks.container_process import ContainerProcess, Stdio
from sandshift.shim.tasks.container_spec import annotations_of, read_spec
from sandshift.shim.tasks.container_stats import metrics_of
from sandshift.shim.tasks.containers import Order
from sandshift.shim.tasks.live_container import LiveContainer, Standing
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd import task_ttrpc, task_types_pb2

if TYPE_CHECKING:
    import ttrpc
    from sandshift.shim.migration.desk import Desk
    from sandshift.shim.sandbox import LiveSandbox

SIGNALS_MAX: Final = 64
STATUSES: Final = {
    Standing.CREATED: task_types_pb2.CREATED,
    Standing.RUNNING: task_types_pb2.RUNNING,
    Standing.STOPPED: task_types_pb2.STOPPED,
    Standing.PAUSED: task_types_pb2.PAUSED,
}
ENDED_LIVES: Final = (Life.ABSENT, Life.STOPPED)


class TaskService(task_ttrpc.TaskService):
    def __init__(self, sandbox: LiveSandbox, desk: Desk, shut_down: Callable[[], None], pid: int) -> None:
        self._sandbox = sandbox
        self._containers = sandbox.containers
        self._desk = desk
        self._shut_down = shut_down
        self._pid = pid
        self._making_sandbox = asyncio.Lock()

    # Creation

    async def create(
        self, request: pb.CreateTaskRequest, context: ttrpc.CallContext
    ) -> pb.CreateTaskResponse:
        identifier("id", request.id)
        if request.checkpoint or request.parent_checkpoint:
            raise NotSupported(
                f"checkpoint = {shown(request.checkpoint or request.parent_checkpoint)}: a container in a VM cannot be "
                "made from a checkpoint; the whole sandbox can be moved"
            )
        bundle = Path(request.bundle)
        spec = await asyncio.to_thread(read_spec, bundle)
        annotations = annotations_of(spec)
        order = Order(
            container_id=request.id,
            bundle=bundle,
            rootfs=tuple(
                Mount(one.type, one.source, one.target, tuple(one.options)) for one in request.rootfs
            ),
            stdio=Stdio(request.stdin, request.stdout, request.stderr, request.terminal),
        )
        if source_id := annotations.get(SOURCE_CONTAINER_ANNOTATION):
            return pb.CreateTaskResponse(pid=await self._patch(source_id, order))
        return pb.CreateTaskResponse(
            pid=await self._desk.change("Task.Create", lambda: self._create(order, spec, annotations))
        )

    async def _create(self, order: Order, spec: Mapping[str, Any], annotations: dict[str, str]) -> int:
        await self._own_sandbox(spec, annotations)
        return await self._containers.create(order)

    async def _patch(self, source_id: str, order: Order) -> int:
        """A container of the source gets its places here (contract 4.4); its saved pid."""
        order.stdio.check()
        patch = Patch(
            source_id=source_id,
            container_id=order.container_id,
            bundle=str(order.bundle),
            stdin=order.stdio.stdin,
            stdout=order.stdio.stdout,
            stderr=order.stdio.stderr,
            terminal=order.stdio.terminal,
            rootfs=order.rootfs,
        )
        pid = await self._desk.create_task(patch)
        if self._sandbox.life is Life.ABSENT:
            self._containers.own_sandbox = True  # Nobody has made it: it goes with its last container.
            await self._containers.save()
        return pid

    async def _own_sandbox(self, spec: Mapping[str, Any], annotations: dict[str, str]) -> None:
        """Without containerd's Sandbox API the first container brings its sandbox with it."""
        async with self._making_sandbox:
            sandbox = self._sandbox
            if sandbox.life is not Life.ABSENT and not self._containers.own_sandbox:
                return
            if sandbox.life is Life.ABSENT:
                guest_spec(spec, pod=PodShare())  # What cannot be had in a VM is refused before there is one.
                pod = pod_of_spec(sandbox.sandbox_id, spec, annotations)
                await sandbox.create(pod.model, pod.wish, pod.share, awaiting=False)
                self._containers.own_sandbox = True
                await self._containers.save()
            await sandbox.start()

    async def start(self, request: pb.StartRequest, context: ttrpc.CallContext) -> pb.StartResponse:
        if not request.exec_id and (pid := self._desk.patched_pid(request.id)) is not None:
            return pb.StartResponse(pid=pid)
        pid = await self._desk.change(
            "Task.Start", lambda: self._containers.start(request.id, request.exec_id)
        )
        return pb.StartResponse(pid=pid)

    async def exec(self, request: pb.ExecProcessRequest, context: ttrpc.CallContext) -> Empty:
        identifier("exec_id", request.exec_id)
        if not request.spec.value:
            raise Rejected("spec is empty: give the OCI process as JSON")
        stdio = Stdio(request.stdin, request.stdout, request.stderr, request.terminal)
        spec = request.spec.value
        await self._desk.change(
            "Task.Exec", lambda: self._containers.exec(request.id, request.exec_id, spec, stdio)
        )
        return Empty()

    # The end

    async def kill(self, request: pb.KillRequest, context: ttrpc.CallContext) -> Empty:
        self._desk.require_kill_allowed()
        if request.signal > SIGNALS_MAX:
            raise Rejected(f"signal = {request.signal}: Linux has 1 to {SIGNALS_MAX}")
        await self._containers.kill(request.id, request.exec_id, request.signal, everything=request.all)
        return Empty()

    async def wait(self, request: pb.WaitRequest, context: ttrpc.CallContext) -> pb.WaitResponse:
        end = await self._containers.wait(request.id, request.exec_id)
        return pb.WaitResponse(exit_status=end.code, exited_at=stamp_ns(end.exited_at_ns))

    async def delete(self, request: pb.DeleteRequest, context: ttrpc.CallContext) -> pb.DeleteResponse:
        process = await self._desk.change(
            "Task.Delete", lambda: self._containers.delete(request.id, request.exec_id)
        )
        end = process.exit.result()
        return pb.DeleteResponse(
            pid=process.record.pid, exit_status=end.code, exited_at=stamp_ns(end.exited_at_ns)
        )

    async def shutdown(self, request: pb.ShutdownRequest, context: ttrpc.CallContext) -> Empty:
        """Ends a shim whose sandbox came with its containers, when none is left. A sandbox of containerd's Sandbox API ends by
        ShutdownSandbox: containerd sends this one too, in the middle of its life."""
        sandbox = self._sandbox
        ours = self._containers.own_sandbox or sandbox.life is Life.ABSENT
        if ours and not self._containers.all() and self._desk.active is None:
            await self._desk.change("Task.Shutdown", self._end_all)
        return Empty()

    async def _end_all(self) -> None:
        """The sandbox, if there is one, and then the shim, also when whoever asked has gone meanwhile."""
        if self._sandbox.life not in ENDED_LIVES:
            await self._sandbox.stop(0)
        asyncio.get_running_loop().call_later(LINGER_S, self._shut_down)

    # What stands

    async def state(self, request: pb.StateRequest, context: ttrpc.CallContext) -> pb.StateResponse:
        container = self._containers.get(request.id)
        process = container.process(request.exec_id)
        stdio = process.record.stdio
        response = pb.StateResponse(
            id=request.id,
            bundle=container.record.bundle,
            pid=process.record.pid,
            status=_status(container, process),
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            terminal=process.record.terminal,
            exec_id=request.exec_id,
        )
        if process.exited:
            end = process.exit.result()
            response.exit_status = end.code
            response.exited_at.CopyFrom(stamp_ns(end.exited_at_ns))
        return response

    async def pids(self, request: pb.PidsRequest, context: ttrpc.CallContext) -> pb.PidsResponse:
        if self._is_sandbox(request.id):
            return pb.PidsResponse(processes=[task_types_pb2.ProcessInfo(pid=self._sandbox_pid())])
        response = pb.PidsResponse()
        for pid, exec_id in await self._containers.pids(request.id):
            info = response.processes.add(pid=pid)
            if exec_id:
                details = task_types_pb2.ProcessDetails(exec_id=exec_id)
                info.info.type_url = details.DESCRIPTOR.full_name
                info.info.value = details.SerializeToString()
        return response

    async def connect(self, request: pb.ConnectRequest, context: ttrpc.CallContext) -> pb.ConnectResponse:
        """Also of the sandbox's own id: a containerd that starts again asks so, and drops the pod if it is not found."""
        ours = self._is_sandbox(request.id)
        pid = self._sandbox_pid() if ours else self._containers.get(request.id).pid
        return pb.ConnectResponse(shim_pid=self._pid, task_pid=pid, version=VERSION)

    def _is_sandbox(self, named: str) -> bool:
        return named == self._sandbox.sandbox_id and not self._containers.has(named)

    def _sandbox_pid(self) -> int:
        """Never 0: containerd takes that for a task that is lost."""
        machine = self._sandbox.machine
        return machine.pid if machine is not None else self._pid

    async def stats(self, request: pb.StatsRequest, context: ttrpc.CallContext) -> pb.StatsResponse:
        self._desk.require_guest_here("Task.Stats")
        metrics = metrics_of(await self._containers.stats(request.id))
        response = pb.StatsResponse()
        response.stats.type_url = metrics.DESCRIPTOR.full_name
        response.stats.value = metrics.SerializeToString()
        return response

    # Changes

    async def pause(self, request: pb.PauseRequest, context: ttrpc.CallContext) -> Empty:
        await self._desk.change("Task.Pause", lambda: self._containers.pause(request.id))
        return Empty()

    async def resume(self, request: pb.ResumeRequest, context: ttrpc.CallContext) -> Empty:
        await self._desk.change("Task.Resume", lambda: self._containers.resume(request.id))
        return Empty()

    async def update(self, request: pb.UpdateTaskRequest, context: ttrpc.CallContext) -> Empty:
        resources = request.resources.value
        await self._desk.change("Task.Update", lambda: self._containers.update(request.id, resources))
        return Empty()

    async def resize_pty(self, request: pb.ResizePtyRequest, context: ttrpc.CallContext) -> Empty:
        await self._desk.change("Task.ResizePty", lambda: self._resize(request))
        return Empty()

    async def _resize(self, request: pb.ResizePtyRequest) -> None:
        await self._containers.resize(request.id, request.exec_id, columns=request.width, rows=request.height)

    async def close_io(self, request: pb.CloseIORequest, context: ttrpc.CallContext) -> Empty:
        self._desk.require_no_session("Task.CloseIO")
        if request.stdin:
            self._containers.close_input(request.id, request.exec_id)
        return Empty()

    async def checkpoint(self, request: pb.CheckpointTaskRequest, context: ttrpc.CallContext) -> Empty:
        raise NotSupported(
            f"container {shown(request.id)} runs in a VM, which this shim does not save to a file: move the whole sandbox "
            "with sandshift migrate, or keep the container's data outside it"
        )


def _status(container: LiveContainer, process: ContainerProcess) -> task_types_pb2.Status.ValueType:
    return STATUSES[container.standing(process)]
