"""The processes of the guest by their ids, and the orphans that process 1 inherits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final, Protocol

from sandshift.agent.process import PlainProcess, Process, ProcessPlan
from sandshift.agent.streams import OutputRoom, OutputStream
from ttrpc import Code, StatusError

ORPHANS_KEPT_MAX: Final = 4096
PROCESSES_MAX: Final = 1024
"""Running and ended ones that are not forgotten."""


class Reapable(Protocol):
    """A child that wants to take its exit status itself."""

    @property
    def pid(self) -> int: ...

    def reap(self) -> None: ...


class Table:
    def __init__(self) -> None:
        self._by_id: dict[str, Process] = {}
        self._tools: dict[int, Reapable] = {}
        self._adopting = 0
        self._orphans: dict[int, int] = {}
        self.room = OutputRoom()

    def start(self, process_id: str, plan: ProcessPlan) -> Process:
        """The process of this id; started if it is not there. Calling twice with the same plan is one call.

        Raises:
            StatusError: INVALID_ARGUMENT, ALREADY_EXISTS (another plan), RESOURCE_EXHAUSTED, NOT_FOUND or
                PERMISSION_DENIED (the program).
        """
        if not process_id or not plan.args:
            raise StatusError(Code.INVALID_ARGUMENT, "a process needs an id and a program")
        if (known := self.known(process_id, plan)) is not None:
            return known
        try:
            process = PlainProcess(plan, self.room)
        except OSError as error:
            raise _start_failed(process_id, plan, error) from error
        self._by_id[process_id] = process
        return process

    def known(self, process_id: str, plan: ProcessPlan) -> Process | None:
        """The process of this id and plan, if it is there.

        Raises:
            StatusError: ALREADY_EXISTS (another plan), RESOURCE_EXHAUSTED (there is no room for one more).
        """
        if (known := self._by_id.get(process_id)) is not None:
            if known.plan != plan:
                raise StatusError(
                    Code.ALREADY_EXISTS, f"process {process_id} is another one: choose a new id"
                )
            return known
        if len(self._by_id) >= PROCESSES_MAX:
            raise StatusError(Code.RESOURCE_EXHAUSTED, f"{PROCESSES_MAX} processes are known: forget some")
        return None

    def add(self, process_id: str, process: Process) -> None:
        self._by_id[process_id] = process

    def get(self, process_id: str) -> Process:
        if (process := self._by_id.get(process_id)) is None:
            raise StatusError(
                Code.NOT_FOUND, f"process {process_id} is not known: it was never started, or is forgotten"
            )
        return process

    def output(self, process_id: str, stream: int) -> OutputStream:
        outputs = self.get(process_id).outputs
        if stream not in outputs:
            raise StatusError(Code.INVALID_ARGUMENT, f"process {process_id} has no stream {stream}")
        return outputs[stream]

    def items(self) -> list[tuple[str, Process]]:
        return list(self._by_id.items())

    def forget(self, process_id: str) -> None:
        """Drop an ended process with its output. An unknown one is forgotten already.

        Raises:
            StatusError: FAILED_PRECONDITION: it is still running.
        """
        process = self._by_id.get(process_id)
        if process is None:
            return
        if process.exit is None:
            raise StatusError(
                Code.FAILED_PRECONDITION, f"process {process_id} is still running: end it first"
            )
        process.close()
        del self._by_id[process_id]

    @contextlib.contextmanager
    def adopting(self) -> Iterator[None]:
        """Meanwhile the status of every orphan that ends is kept, for `take_orphan`: it may be asked for in a moment."""
        self._adopting += 1
        try:
            yield
        finally:
            self._adopting -= 1
            if not self._adopting:
                self._orphans.clear()

    def take_orphan(self, pid: int) -> int | None:
        """The status of a child that nobody had asked for when it ended; None: it has not ended. Only while `adopting`."""
        return self._orphans.pop(pid, None)

    @contextlib.contextmanager
    def tool(self, child: Reapable) -> Iterator[None]:
        """Meanwhile `child` is told when there may be something to reap."""
        self._tools[child.pid] = child
        try:
            yield
        finally:
            del self._tools[child.pid]

    def reap_all(self) -> None:
        """Reap whatever has ended: ours with their status kept, orphans for good. For process 1, on SIGCHLD."""
        ours: dict[int, Reapable] = dict(self._tools)
        ours |= {process.pid: process for process in self._by_id.values() if process.exit is None}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if (child := ours.pop(ended.si_pid, None)) is not None:
                    child.reap()
                else:
                    self._reap_orphan(ended.si_pid)

    def _reap_orphan(self, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(pid, os.WNOHANG)
            if self._adopting and len(self._orphans) < ORPHANS_KEPT_MAX:
                self._orphans[pid] = os.waitstatus_to_exitcode(status)


def _start_failed(process_id: str, plan: ProcessPlan, error: OSError) -> StatusError:
    code = Code.INVALID_ARGUMENT
    if isinstance(error, FileNotFoundError):
        code = Code.NOT_FOUND
    elif isinstance(error, PermissionError):
        code = Code.PERMISSION_DENIED
    return StatusError(
        code, f"process {process_id} cannot be started: {error.filename or plan.args[0]}: {error.strerror}"
    )
