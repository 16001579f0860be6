"""containerd's Task service as the suite speaks it, in both its versions, and the bundles that it hands over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import ttrpc
from sandshift.conformance.answers import Answer, Broken, ask
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd import task_ttrpc

V2: Final = "containerd.task.v2.Task"
V3: Final = "containerd.task.v3.Task"
SOURCE_CONTAINER: Final = "io.microsoft.migration.source-container-id"
SIGKILL: Final = 9
RUNNING: Final = 2
STOPPED: Final = 3
"""Of containerd's Status."""
OUTPUT_S: Final = 20.0
PIECE_BYTES: Final = 1 << 16


class Tasks:
    """Calls of the Task service over a connection to a shim; `version` is the service's name."""

    def __init__(self, connection: ttrpc.Client, version: str = V3) -> None:
        self._connection = connection
        self._version = version

    async def _call(self, method: ttrpc.Method[Any, Any], request: Any, within_s: float = 60.0) -> Answer:
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
        self._fifos: list[Fifo] = []

    def make(self, annotations: dict[str, str], model: str = "") -> Path:
        """`model`: a bundle whose config.json and root file system this one has too."""
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        config: dict[str, Any] = {
            "ociVersion": "1.1.0",
            "process": {"args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
        }
        if model:
            config = json.loads((Path(model) / "config.json").read_text())
            config["root"]["path"] = str(Path(model, config["root"]["path"]))
        config["annotations"] = {**config.get("annotations", {}), **annotations}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def make_other(self, model: str, annotations: dict[str, str]) -> Path:
        """As `model`, with another file in its root file system."""
        folder = self.make(annotations, model)
        config = json.loads((folder / "config.json").read_text())
        shutil.copytree(config["root"]["path"], folder / "rootfs", symlinks=True)
        (folder / "rootfs" / "another").write_text("another")
        config["root"]["path"] = str(folder / "rootfs")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def patch_of(self, source_id: str) -> Path:
        """For a Task.Create that patches a container of the source."""
        return self.make({SOURCE_CONTAINER: source_id})

    def fifo(self, bundle: Path) -> Fifo:
        """The stdout of the container of a bundle, which is read from now on."""
        self._fifos.append(Fifo(bundle / "stdout"))
        return self._fifos[-1]

    def close(self) -> None:
        for fifo in self._fifos:
            fifo.close()
        self._folder.cleanup()


class Fifo:
    """Where a container's output goes, and all that came."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.data = bytearray()
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        """For writing too: so it never seems to end when a shim does."""
        self._came = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.data += os.read(self._fd, PIECE_BYTES)
            self._came.set()

    async def until(self, size_bytes: int) -> bytes:
        """All that came, once it is so much. Raises Broken if it does not come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_S):
                while len(self.data) < size_bytes:
                    self._came.clear()
                    await self._came.wait()
                return bytes(self.data)
        raise Broken(f"{len(self.data)} bytes of output came within {OUTPUT_S:g} s, not {size_bytes}")

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
