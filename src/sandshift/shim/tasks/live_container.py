"""One container as its shim knows it: what is written down of it, its processes, how it stands."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from pathlib import Path

import msgspec

from sandshift.errors import AlreadyThere, NotFound
from sandshift.sandbox.model import Container
from sandshift.sandbox.patching import Mount, Patch
from sandshift.shim.tasks.container_process import ContainerProcess, ProcessRecord, Stdio


class Standing(enum.Enum):
    """How a process stands, in containerd's words. Source: containerd task.Status."""

    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4


class ContainerRecord(msgspec.Struct):
    """A container as it is written down for a later shim."""

    container_id: str
    guest_id: str
    init: ProcessRecord
    bundle: str = ""
    annotations: dict[str, str] = {}
    rootfs: tuple[Mount, ...] = ()
    layers: tuple[str, ...] = ()
    writable: str = ""
    mounts: tuple[str, ...] = ()
    paused: bool = False
    adopted: bool = False
    """It has come from elsewhere: its Start was said there, and is no error here."""
    made: bool = False
    """The agent has answered that it is there."""
    execs: list[ProcessRecord] = []


class LiveContainer:
    def __init__(
        self,
        record: ContainerRecord,
        folder: Path,
        on_exit: Callable[[LiveContainer, ContainerProcess], None],
        *,
        fresh: bool = False,
    ) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        """Held by what changes the container: one such call at a time."""
        self._folder = folder
        self._on_exit = on_exit
        self.init = self._process(record.init, fresh=fresh)
        self.execs = {one.exec_id: self._process(one, fresh=fresh) for one in record.execs}

    def _process(self, record: ProcessRecord, *, fresh: bool) -> ContainerProcess:
        return ContainerProcess(
            self.record.guest_id,
            record,
            self._folder,
            lambda process: self._on_exit(self, process),
            fresh=fresh,
        )

    @property
    def container_id(self) -> str:
        return self.record.container_id

    @property
    def guest_id(self) -> str:
        return self.record.guest_id

    @property
    def pid(self) -> int:
        return self.record.init.pid

    def processes(self) -> list[ContainerProcess]:
        return [self.init, *self.execs.values()]

    def process(self, exec_id: str) -> ContainerProcess:
        """Its init, or an exec session. Raises NotFound."""
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            known = ", ".join(sorted(self.execs)) or "none"
            raise NotFound(
                f"container {self.container_id} has no exec session {exec_id!r}; it has: {known}"
            ) from None

    def standing(self, process: ContainerProcess) -> Standing:
        if process.exited:
            return Standing.STOPPED
        if not process.record.started:
            return Standing.CREATED
        return Standing.PAUSED if self.record.paused else Standing.RUNNING

    def awaits(self, exec_id: str) -> bool:
        """Whether this is an exec session that has come from elsewhere and has no caller here yet."""
        known = self.execs.get(exec_id)
        return known is not None and not known.record.bound

    def add_exec(self, exec_id: str, spec: bytes, stdio: Stdio) -> None:
        """Add an exec session; or bind one that has come from elsewhere to its caller here.

        Raises:
            AlreadyThere: there is one of this id, and it has its caller.
        """
        known = self.execs.get(exec_id)
        if known is None:
            record = ProcessRecord(
                exec_id=exec_id, stdio=stdio, spec=spec, stdin=bool(stdio.stdin), terminal=stdio.terminal
            )
            self.record.execs.append(record)
            self.execs[exec_id] = self._process(record, fresh=True)
        elif known.record.bound:
            raise AlreadyThere(f"container {self.container_id} has an exec session {exec_id!r} already")
        else:
            known.record.bound, known.record.stdio = True, stdio

    def drop_exec(self, exec_id: str) -> None:
        self.execs.pop(exec_id, None)
        self.record.execs = [one for one in self.record.execs if one.exec_id != exec_id]

    def as_model(self) -> Container:
        record = self.record
        return Container(
            guest_id=record.guest_id,
            container_id=record.container_id,
            pid=record.init.pid,
            processes=tuple(process.as_model() for process in self.processes()),
            annotations=record.annotations,
            layers=record.layers,
            writable=record.writable,
            mounts=record.mounts,
            started=record.init.started,
            paused=record.paused,
        )


def record_of(container: Container, patch: Patch) -> ContainerRecord:
    """A container that has come from elsewhere, with what its Task.Create said of its places here."""
    init, *execs = (
        ProcessRecord(
            exec_id=one.exec_id,
            pid=one.pid,
            started=one.started,
            spec=one.spec,
            stdin=one.stdin,
            terminal=one.terminal,
            bound=not one.exec_id,
        )
        for one in container.processes
    )
    init.stdio = Stdio(patch.stdin, patch.stdout, patch.stderr, patch.terminal)
    return ContainerRecord(
        container_id=patch.container_id,
        guest_id=container.guest_id,
        init=init,
        bundle=patch.bundle,
        annotations=dict(container.annotations),
        rootfs=patch.rootfs,
        layers=container.layers,
        writable=container.writable,
        mounts=container.mounts,
        paused=container.paused,
        adopted=True,
        made=True,
        execs=execs,
    )
