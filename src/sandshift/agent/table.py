"""The processes of the guest by their ids, and the orphans that process 1 inherits."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from sandshift.agent.process import Process, ProcessPlan
from sandshift.agent.streams import OutputRoom, OutputStream
from ttrpc import Code, StatusError

PROCESSES_MAX: Final = 1024
"""Running and ended ones that are not forgotten."""


class Table:
    def __init__(self) -> None:
        self._by_id: dict[str, Process] = {}
        self._room = OutputRoom()

    def start(self, process_id: str, plan: ProcessPlan) -> Process:
        """The process of this id; started if it is not there. Calling twice with the same plan is one call.

        Raises:
            StatusError: INVALID_ARGUMENT, ALREADY_EXISTS (another plan), RESOURCE_EXHAUSTED, NOT_FOUND or
                PERMISSION_DENIED (the program).
        """
        if not process_id or not plan.args:
            raise StatusError(Code.INVALID_ARGUMENT, "a process needs an id and a program")
        if (known := self._by_id.get(process_id)) is not None:
            if known.plan != plan:
                raise StatusError(
                    Code.ALREADY_EXISTS, f"process {process_id} is another one: choose a new id"
                )
            return known
        if len(self._by_id) >= PROCESSES_MAX:
            raise StatusError(Code.RESOURCE_EXHAUSTED, f"{PROCESSES_MAX} processes are known: forget some")
        try:
            process = Process(plan, self._room)
        except OSError as error:
            raise _start_failed(process_id, plan, error) from error
        self._by_id[process_id] = process
        return process

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

    def reap_all(self) -> None:
        """Reap whatever has ended: ours with their status kept, orphans for good. For process 1, on SIGCHLD."""
        ours = {process.pid: process for process in self._by_id.values() if process.exit is None}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if (process := ours.get(ended.si_pid)) is not None:
                    process.reap()
                else:
                    os.waitpid(ended.si_pid, os.WNOHANG)


def _start_failed(process_id: str, plan: ProcessPlan, error: OSError) -> StatusError:
    code = Code.INVALID_ARGUMENT
    if isinstance(error, FileNotFoundError):
        code = Code.NOT_FOUND
    elif isinstance(error, PermissionError):
        code = Code.PERMISSION_DENIED
    return StatusError(
        code, f"process {process_id} cannot be started: {error.filename or plan.args[0]}: {error.strerror}"
    )
