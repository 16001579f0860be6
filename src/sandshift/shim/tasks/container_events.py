"""What containerd is told of containers, in its own words. Each is published when it is true, in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.wire.containerd import mount_pb2
from sandshift.wire.containerd import task_events_pb2 as pb
from sandshift.wire.sandshift import events_pb2 as own

if TYPE_CHECKING:
    from sandshift.shim.tasks.container_process import ContainerProcess
    from sandshift.shim.tasks.events import Publisher
    from sandshift.shim.tasks.live_container import LiveContainer


def stamp(at_ns: int) -> Timestamp:
    made = Timestamp()
    made.FromNanoseconds(at_ns)
    return made


def created(to: Publisher, container: LiveContainer) -> None:
    record, stdio = container.record, container.record.init.stdio
    event = pb.TaskCreate(
        container_id=record.container_id,
        bundle=record.bundle,
        rootfs=[
            mount_pb2.Mount(type=one.type, source=one.source, target=one.target, options=one.options)
            for one in record.rootfs
        ],
        io=pb.TaskIO(stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal),
        pid=container.pid,
    )
    to.publish("/tasks/create", event)


def started(to: Publisher, container: LiveContainer, process: ContainerProcess) -> None:
    pid = process.record.pid
    if not process.exec_id:
        to.publish("/tasks/start", pb.TaskStart(container_id=container.container_id, pid=pid))
        return
    event = pb.TaskExecStarted(container_id=container.container_id, exec_id=process.exec_id, pid=pid)
    to.publish("/tasks/exec-started", event)


def exec_added(to: Publisher, container: LiveContainer, exec_id: str) -> None:
    event = pb.TaskExecAdded(container_id=container.container_id, exec_id=exec_id)
    to.publish("/tasks/exec-added", event)


def exited(to: Publisher, container: LiveContainer, process: ContainerProcess) -> None:
    end = process.exit.result()
    event = pb.TaskExit(
        container_id=container.container_id,
        id=process.exec_id or container.container_id,
        pid=process.record.pid,
        exit_status=end.code,
        exited_at=stamp(end.exited_at_ns),
    )
    to.publish("/tasks/exit", event)


def deleted(to: Publisher, container: LiveContainer) -> None:
    """Of a container; containerd tells nobody of a deleted exec session."""
    end = container.init.exit.result()
    event = pb.TaskDelete(
        container_id=container.container_id,
        pid=container.pid,
        exit_status=end.code,
        exited_at=stamp(end.exited_at_ns),
    )
    to.publish("/tasks/delete", event)


def paused(to: Publisher, container: LiveContainer) -> None:
    to.publish("/tasks/paused", pb.TaskPaused(container_id=container.container_id))


def resumed(to: Publisher, container: LiveContainer) -> None:
    to.publish("/tasks/resumed", pb.TaskResumed(container_id=container.container_id))


def out_of_memory(to: Publisher, container_id: str) -> None:
    to.publish("/tasks/oom", pb.TaskOOM(container_id=container_id))


def migrated(to: Publisher, sandbox_id: str, session_id: str, destination: str) -> None:
    event = own.Migrated(sandbox_id=sandbox_id, session_id=session_id, destination=destination)
    to.publish("/sandshift/migrated", event)
