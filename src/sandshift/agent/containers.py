"""The containers of the guest: made, started, changed and removed with runc, each call repeatable.

runc is run where it alone knows how: to make a container and to start a process in one. What is a file or two in the kernel
(letting the init go, freezing, killing, counting, removing) is done here: each start of runc costs tenths of a second of an
emulated CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sandshift.agent import bundle, runc
from sandshift.agent.adopted import AdoptedProcess
from sandshift.agent.cgroup import Group
from sandshift.agent.gate import open_gate
from sandshift.agent.incidents import Incidents
from sandshift.agent.pod import FOLDER, Pod
from sandshift.agent.process import Process, ProcessPlan
from sandshift.agent.rootfs import RootFiles
from sandshift.agent.table import Table
from sandshift.wire.sandshift import agent_pb2 as pb
from ttrpc import Code, StatusError

CONTAINERS_MAX: Final = 256
VOLUME_MODE: Final = 0o777
_ID_CHARS_MAX: Final = 128


@dataclass(slots=True)
class Container:
    container_id: str
    order: bytes
    """What it was asked for with: equal orders are one container."""
    files: RootFiles
    group: Group
    init: AdoptedProcess | None = None
    """None: it is still being made."""
    is_started: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Containers:
    def __init__(self, table: Table, pod: Pod, incidents: Incidents) -> None:
        self._table = table
        self._pod = pod
        self._incidents = incidents
        self._by_id: dict[str, Container] = {}
        self._making: dict[str, asyncio.Task[Process]] = {}
        """By process id: inits and exec sessions that runc is starting."""
        self._folders = 0

    def get(self, container_id: str) -> Container:
        """Raises StatusError: NOT_FOUND."""
        container = self._by_id.get(container_id)
        if container is None or container.init is None:
            raise StatusError(Code.NOT_FOUND, f"container {container_id} is not in the guest")
        return container

    async def create(self, request: pb.CreateContainerRequest) -> Process:
        """Make a container, its init waiting. The same order again: the one that is there or is being made.

        What is being made is made to the end, also if nobody waits for it any more. After a failure nothing is left.

        Raises:
            StatusError: the order is wrong, cannot be carried out, or is another's.
        """
        order = request.SerializeToString(deterministic=True)
        known = self._by_id.get(request.container_id)
        if known is None:
            known = self._register(request, order)
        elif known.order != order:
            raise StatusError(
                Code.ALREADY_EXISTS, f"container {request.container_id} is another one: choose a new id"
            )
        if known.init is not None:
            return known.init
        return await self._once(f"{known.container_id}:", self._create(known, request))

    async def start(self, container_id: str) -> None:
        """Let the init go.

        Raises:
            StatusError: FAILED_PRECONDITION: it has ended before; DEADLINE_EXCEEDED.
        """
        container = self.get(container_id)
        async with container.changing:
            if container.is_started:
                return
            assert container.init is not None
            await open_gate(runc.STATE / container_id, container.init)
            container.is_started = True

    async def exec(self, request: pb.StartProcessRequest) -> Process:
        """Start a process in a container. The same again: the one that is there.

        Raises:
            StatusError: NOT_FOUND, FAILED_PRECONDITION (the container does not run), INVALID_ARGUMENT, ...
        """
        container = self.get(request.container_id)
        process = self._parsed(bundle.process_of, request.process_spec, terminal=request.terminal)
        plan = _plan(process, request.container_id, request.process_spec, request)
        if (known := self._table.known(request.process_id, plan)) is not None:
            return known
        assert container.init is not None
        if container.init.exit is not None:
            raise StatusError(
                Code.FAILED_PRECONDITION,
                f"process {request.process_id}: container {request.container_id} has ended",
            )
        return await self._once(request.process_id, self._exec(container, request.process_id, plan, process))

    async def delete(self, container_id: str) -> None:
        """Remove a container that has ended or never started, and let go of its disks. One that is being made is made first.

        Raises:
            StatusError: FAILED_PRECONDITION: it runs.
        """
        if (making := self._making.get(f"{container_id}:")) is not None:
            await asyncio.wait({making})
        container = self._by_id.get(container_id)
        if container is None:
            return
        async with container.changing:
            is_running = container.init is not None and container.init.exit is None
            if is_running and container.is_started:
                raise StatusError(
                    Code.FAILED_PRECONDITION, f"container {container_id} is still running: end it first"
                )
            await self._remove(container)

    async def update(self, container_id: str, resources: bytes) -> None:
        container = self.get(container_id)
        wanted = self._parsed(bundle.parse, resources, "resources")
        path = container.files.folder / "resources.json"
        async with container.changing:
            path.write_text(json.dumps(wanted))
            await runc.run(
                self._table,
                f"container {container_id} cannot be changed",
                ["update", "--resources", str(path), container_id],
                log=container.files.folder / "update.log",
            )

    def pids(self, container_id: str) -> list[tuple[int, str]]:
        """Its processes, with the ids of those that are known."""
        prefix = f"{container_id}:"
        named = {
            process.pid: process_id
            for process_id, process in self._table.items()
            if process_id.startswith(prefix) and process.exit is None
        }
        return [(pid, named.get(pid, "")) for pid in self.get(container_id).group.pids()]

    def _register(self, request: pb.CreateContainerRequest, order: bytes) -> Container:
        container_id = request.container_id
        if not container_id or len(container_id) > _ID_CHARS_MAX or set(container_id) & set("/:\0\n "):
            raise StatusError(Code.INVALID_ARGUMENT, f"{container_id!r:.80} is no id of a container")
        if container_id.startswith("."):
            raise StatusError(Code.INVALID_ARGUMENT, f"{container_id!r} is no id of a container")
        if len(self._by_id) >= CONTAINERS_MAX:
            raise StatusError(Code.RESOURCE_EXHAUSTED, f"{CONTAINERS_MAX} containers are there: delete some")
        if any(process_id.startswith(f"{container_id}:") for process_id, _ in self._table.items()):
            raise StatusError(
                Code.ALREADY_EXISTS,
                f"processes of a container {container_id} that was deleted are still known: forget them first",
            )
        self._folders += 1
        files = RootFiles(FOLDER / str(self._folders))
        container = Container(container_id, order, files, Group(container_id))
        self._by_id[container_id] = container
        return container

    async def _once(self, process_id: str, making: Any) -> Process:
        """Run `making`, or join in if it is being run. A caller that goes away does not end it."""
        task = self._making.get(process_id)
        if task is None:
            task = asyncio.create_task(making, name=f"make {process_id}")
            self._making[process_id] = task
            task.add_done_callback(lambda done: self._made(process_id, done))
        else:
            making.close()
        return await asyncio.shield(task)

    def _made(self, process_id: str, task: asyncio.Task[Process]) -> None:
        del self._making[process_id]
        if not task.cancelled():
            task.exception()  # told to whoever still waits

    async def _create(self, container: Container, request: pb.CreateContainerRequest) -> Process:
        try:
            with _room_for(f"container {container.container_id} cannot be made"):
                self._pod.ensure()
                await container.files.mount(request.rootfs, request.mounts)
                spec = self._composed(container, request)
                init = await self._run_create(container, request, spec)
        except BaseException:
            await self._undo(container)
            raise
        self._incidents.watch(container.container_id, container.group)
        container.init = init
        return init

    def _composed(self, container: Container, request: pb.CreateContainerRequest) -> dict[str, Any]:
        """The spec for runc; what it needs of the pod is made."""
        given = self._parsed(bundle.parse, request.spec, "the spec")
        known = bundle.Known(
            container_id=container.container_id,
            root=str(container.files.root),
            terminal=request.terminal,
            sources=container.files.sources,
            read_only=frozenset(os.path.normpath(one.destination) for one in request.mounts if one.read_only),
        )
        spec: dict[str, Any] = self._parsed(bundle.compose, given, known)
        self._pod.set_sysctls(self._parsed(bundle.sysctls_of, given))
        for folder in bundle.volumes_of(spec):
            _make_volume(folder)
        if (namespace := bundle.pid_namespace_of(spec)) is not None:
            namespace["path"] = self._pid_namespace(namespace["path"])
        return spec

    def _pid_namespace(self, path: str) -> str:
        if path == bundle.POD_PID_NAMESPACE:
            return self._pod.pid_namespace()
        inits = [one.init.pid for one in self._by_id.values() if one.init is not None and not one.init.exit]
        if path not in {f"/proc/{pid}/ns/pid" for pid in inits}:
            raise StatusError(
                Code.INVALID_ARGUMENT, f"{path} is the process namespace of no container that runs"
            )
        return path

    async def _run_create(
        self, container: Container, request: pb.CreateContainerRequest, spec: dict[str, Any]
    ) -> AdoptedProcess:
        container_id, folder = container.container_id, container.files.folder
        (folder / "config.json").write_text(json.dumps(spec))
        plan = _plan(spec["process"], container_id, b"", request)
        init = AdoptedProcess(plan, self._table, container.group, lambda: self._init_has_ended(container))
        subject = f"container {container_id} cannot be made"
        await self._start(container, f"{container_id}:", init, subject, ["create", "--bundle", str(folder)])
        return init

    async def _exec(
        self, container: Container, process_id: str, plan: ProcessPlan, process: dict[str, Any]
    ) -> Process:
        session = AdoptedProcess(plan, self._table, None, lambda: None)
        path = container.files.folder / f"exec-{id(session):x}.json"
        subject = f"process {process_id} cannot be started"
        command = ["exec", "--detach", "--process", str(path)]
        try:
            with _room_for(subject):
                path.write_text(json.dumps(process))
                await self._start(container, process_id, session, subject, command)
        finally:
            path.unlink(missing_ok=True)
        return session

    async def _start(
        self, container: Container, process_id: str, process: AdoptedProcess, subject: str, command: list[str]
    ) -> None:
        """Have runc start `process` by `command`, and make it ours under its id."""
        folder = container.files.folder
        pid_file = folder / f"pid-{id(process):x}"
        try:
            with self._table.adopting():
                with process.stdio(folder) as (options, stdio):
                    await runc.run(
                        self._table,
                        subject,
                        [*command, *options, "--pid-file", str(pid_file), container.container_id],
                        log=folder / f"log-{id(process):x}",
                        stdio=stdio,
                    )
                process.adopt(int(pid_file.read_text()))
                self._table.add(process_id, process)
        except BaseException:
            process.close()
            raise
        finally:
            pid_file.unlink(missing_ok=True)

    def _init_has_ended(self, container: Container) -> None:
        """Its other processes end with it, also where they share the pod's process namespace."""
        self._incidents.look(container.container_id)
        container.group.kill()

    async def _remove(self, container: Container) -> None:
        await container.group.remove()
        if container.init is not None and container.init.pid:
            await container.init.wait()
        shutil.rmtree(runc.STATE / container.container_id, ignore_errors=True)
        container.files.release()
        self._incidents.drop(container.container_id)
        self._by_id.pop(container.container_id, None)

    async def _undo(self, container: Container) -> None:
        """Its making has failed: runc has removed its own, as far as it came."""
        with contextlib.suppress(StatusError):
            await container.group.remove()
        shutil.rmtree(runc.STATE / container.container_id, ignore_errors=True)
        container.files.release()
        self._by_id.pop(container.container_id, None)

    @staticmethod
    def _parsed(parse: Any, *args: Any, **named: Any) -> Any:
        try:
            return parse(*args, **named)
        except bundle.BadSpec as error:
            raise StatusError(Code.INVALID_ARGUMENT, str(error)) from error


@contextlib.contextmanager
def _room_for(subject: str) -> Iterator[None]:
    """What the kernel refuses the agent itself, as the caller is told it."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise StatusError(Code.RESOURCE_EXHAUSTED, f"{subject}: {place}{error.strerror}") from error


def _plan(
    process: dict[str, Any],
    container_id: str,
    spec: bytes,
    request: pb.CreateContainerRequest | pb.StartProcessRequest,
) -> ProcessPlan:
    args = tuple(str(word) for word in process["args"])
    return ProcessPlan(
        args, terminal=request.terminal, stdin=request.stdin, container_id=container_id, spec=spec
    )


def _make_volume(folder: str) -> None:
    path = Path(folder)
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(VOLUME_MODE)
