"""containerd's Task service as the suite speaks it, in both its versions, and the bundles that it hands over."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import ttrpc
from sandshift.conformance.answers import Answer, ask
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd import task_ttrpc

V2: Final = "containerd.task.v2.Task"
V3: Final = "containerd.task.v3.Task"
SOURCE_CONTAINER: Final = "io.microsoft.migration.source-container-id"
SIGKILL: Final = 9
RUNNING: Final = 2
STOPPED: Final = 3
"""Of containerd's Status."""


class Tasks:
    """Calls of the Task service over a connection to a shim; `version` is the service's name."""

    def __init__(self, connection: ttrpc.Client, version: str = V3) -> None:
        self._connection = connection
        self._version = version

    async def _call(self, method: ttrpc.Method[Any, Any], request: Any, within_s: float = 20.0) -> Answer:
        named = ttrpc.Method(
            self._version, method.name, method.shape, method.request_type, method.response_type
        )
        return await ask(self._connection.unary(named, request), within_s)

    async def create(self, bundle: Path, container_id: str, **stdio: Any) -> Answer:
        request = pb.CreateTaskRequest(id=container_id, bundle=str(bundle), **stdio)
        return await self._call(task_ttrpc.TASK_CREATE, request)

    async def start(self, container_id: str, exec_id: str = "") -> Answer:
        return await self._call(task_ttrpc.TASK_START, pb.StartRequest(id=container_id, exec_id=exec_id))

    async def state(self, container_id: str) -> Answer:
        return await self._call(task_ttrpc.TASK_STATE, pb.StateRequest(id=container_id))

    async def connect(self, container_id: str) -> Answer:
        return await self._call(task_ttrpc.TASK_CONNECT, pb.ConnectRequest(id=container_id))

    async def pids(self, container_id: str) -> Answer:
        return await self._call(task_ttrpc.TASK_PIDS, pb.PidsRequest(id=container_id))

    async def wait(self, container_id: str, within_s: float = 20.0) -> Answer:
        return await self._call(task_ttrpc.TASK_WAIT, pb.WaitRequest(id=container_id), within_s)

    async def delete(self, container_id: str) -> Answer:
        return await self._call(task_ttrpc.TASK_DELETE, pb.DeleteRequest(id=container_id))

    async def kill(self, container_id: str, signal: int = SIGKILL) -> Answer:
        return await self._call(task_ttrpc.TASK_KILL, pb.KillRequest(id=container_id, signal=signal))

    async def changes(self, container_id: str) -> dict[str, Answer]:
        """Every call that would change a sandbox, Create apart (contract 4.13); what each was answered."""
        spec: dict[str, Any] = {"args": ["true"], "cwd": "/"}
        add = pb.ExecProcessRequest(id=container_id, exec_id="e")
        add.spec.value = json.dumps(spec).encode()
        update = pb.UpdateTaskRequest(id=container_id)
        update.resources.value = b"{}"
        requests: dict[ttrpc.Method[Any, Any], Any] = {
            task_ttrpc.TASK_EXEC: add,
            task_ttrpc.TASK_UPDATE: update,
            task_ttrpc.TASK_DELETE: pb.DeleteRequest(id=container_id),
            task_ttrpc.TASK_PAUSE: pb.PauseRequest(id=container_id),
            task_ttrpc.TASK_RESUME: pb.ResumeRequest(id=container_id),
            task_ttrpc.TASK_CLOSE_IO: pb.CloseIORequest(id=container_id, stdin=True),
            task_ttrpc.TASK_RESIZE_PTY: pb.ResizePtyRequest(id=container_id, width=80, height=25),
        }
        return {method.name: await self._call(method, request) for method, request in requests.items()}


class Bundles:
    """Folders with a config.json, as containerd makes one for each container. Blocks, briefly."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-bundles-")
        self._count = 0

    def make(self, annotations: dict[str, str]) -> Path:
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        config = {
            "ociVersion": "1.1.0",
            "process": {"args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": annotations,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def patch_of(self, source_id: str) -> Path:
        """For a Task.Create that patches a container of the source."""
        return self.make({SOURCE_CONTAINER: source_id})

    def close(self) -> None:
        self._folder.cleanup()
