"""What containerd does around a shim's Task service, for tests: bundles, fifos that are read and written, events taken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from google.protobuf.empty_pb2 import Empty

import ttrpc
from sandshift.wire.containerd import envelope_pb2, events_pb2, mount_pb2, task_events_pb2
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd.events_ttrpc import EventsService
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.sandshift import events_pb2 as own_events

WAIT_S = 60
"""Emulated guests are slow on a busy machine."""
LAYER = mount_pb2.Mount(type="erofs", source="/layers/busybox.erofs", options=["ro"])
EVENT_TYPES = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        task_events_pb2.TaskCreate,
        task_events_pb2.TaskStart,
        task_events_pb2.TaskExit,
        task_events_pb2.TaskDelete,
        task_events_pb2.TaskExecAdded,
        task_events_pb2.TaskExecStarted,
        task_events_pb2.TaskPaused,
        task_events_pb2.TaskResumed,
        task_events_pb2.TaskOOM,
        own_events.Migrated,
    )
}


class Containerd(EventsService):
    """The end of containerd that takes events; it can be away."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.taken: list[envelope_pb2.Envelope] = []
        self._came = asyncio.Condition()
        self._server: ttrpc.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def forward(self, request: events_pb2.ForwardRequest, context: ttrpc.CallContext):
        self.taken.append(request.envelope)
        async with self._came:
            self._came.notify_all()
        return Empty()

    async def start(self) -> None:
        self._server = ttrpc.Server()
        self._server.register(self)
        self._task = asyncio.create_task(self._server.serve(ttrpc.listen(self.address)))

    async def stop(self) -> None:
        if self._server is None:
            return
        await self._server.shutdown(grace_s=0.1)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._server = None
        Path(self.address).unlink(missing_ok=True)

    def events(self) -> list[tuple[str, object]]:
        found = []
        for envelope in self.taken:
            event = EVENT_TYPES[envelope.event.type_url].FromString(envelope.event.value)
            found.append((envelope.topic, event))
        return found

    @property
    def topics(self) -> list[str]:
        return [envelope.topic for envelope in self.taken]

    async def until(self, topic: str, count: int = 1) -> None:
        """Until that many of a topic came."""
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(lambda: self.topics.count(topic) >= count)


class Reader:
    """The reading end of an output fifo, read as it comes."""

    def __init__(self, path: Path, *, reads: bool = True) -> None:
        self.path = str(path)
        self.data = bytearray()
        self._ended = asyncio.Event()
        self._came = asyncio.Event()
        self._held = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if reads:
            self.read()

    def read(self) -> None:
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._ended.set()
        self.data += data
        self._came.set()

    async def until(self, count: int) -> bytes:
        """At least so many bytes, all that came."""
        async with asyncio.timeout(WAIT_S):
            while len(self.data) < count:
                self._came.clear()
                await self._came.wait()
        return bytes(self.data)

    async def all(self) -> bytes:
        """Everything, once the writer has closed it."""
        async with asyncio.timeout(WAIT_S):
            await self._ended.wait()
        return bytes(self.data)

    def hold(self) -> None:
        """Keep the fifo open for writing too: a shim that is killed is no end for this reader."""
        self._held = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)

    def let_go(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def close(self) -> None:
        self.let_go()
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Bundle:
    """A container as containerd prepares it on one host."""

    def __init__(
        self,
        folder: Path,
        container_id: str,
        args: Sequence[str],
        *,
        stdin: bool = False,
        terminal: bool = False,
        annotations: dict[str, str] | None = None,
        reads: bool = True,
        rootfs: Sequence[mount_pb2.Mount] = (LAYER,),
        spec: Mapping[str, object] | None = None,
    ) -> None:
        """`spec`: what is to be otherwise in the OCI spec."""
        self.rootfs = rootfs
        self.container_id = container_id
        self.folder = folder / container_id
        self.folder.mkdir(parents=True, exist_ok=True)
        self.terminal = terminal
        document = {
            "ociVersion": "1.1.0",
            "process": {"args": list(args), "cwd": "/", "terminal": terminal},
            "root": {"path": "rootfs"},
            "hostname": container_id,
            "annotations": annotations or {},
            **(spec or {}),
        }
        (self.folder / "config.json").write_text(json.dumps(document))
        self.paths = {name: self.folder / name for name in ("stdin", "stdout", "stderr")}
        for path in self.paths.values():
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path)
        self.stdin = str(self.paths["stdin"]) if stdin else ""
        self.stdout = Reader(self.paths["stdout"], reads=reads)
        self.stderr = Reader(self.paths["stderr"], reads=reads)

    def create_request(self) -> pb.CreateTaskRequest:
        return pb.CreateTaskRequest(
            id=self.container_id,
            bundle=str(self.folder),
            rootfs=self.rootfs,
            terminal=self.terminal,
            stdin=self.stdin,
            stdout=str(self.paths["stdout"]),
            stderr="" if self.terminal else str(self.paths["stderr"]),
        )

    def close(self) -> None:
        self.stdout.close()
        self.stderr.close()


@contextlib.asynccontextmanager
async def bundles(folder: Path) -> AsyncIterator[type[Bundle]]:
    """Makes bundles, and closes their fifos at the end."""
    made: list[Bundle] = []

    def make(container_id: str, args: Sequence[str], **how: object) -> Bundle:
        made.append(Bundle(folder, container_id, args, **how))
        return made[-1]

    try:
        yield make
    finally:
        for bundle in made:
            bundle.close()


async def run(task: TaskClient, bundle: Bundle) -> int:
    """Create and start; the pid."""
    pid = (await task.create(bundle.create_request(), timeout_s=10)).pid
    await task.start(pb.StartRequest(id=bundle.container_id), timeout_s=10)
    return pid


def exec_request(bundle: Bundle, exec_id: str, args: Sequence[str], **stdio: str) -> pb.ExecProcessRequest:
    request = pb.ExecProcessRequest(id=bundle.container_id, exec_id=exec_id, **stdio)
    request.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process"
    request.spec.value = json.dumps({"args": list(args), "cwd": "/"}).encode()
    return request


def lines(data: bytes, step: int = 1) -> list[int]:
    """The numbers of whole lines, which must follow one another."""
    numbers = [int(line) for line in data[: len(data) // 9 * 9].split()]
    assert numbers == list(range(0, len(numbers) * step, step)), numbers[:5]
    return numbers
