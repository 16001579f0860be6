"""A process that runc has started for us: runc ends, and the process is our child as process 1's orphan."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sandshift.agent.cgroup import Group
from sandshift.agent.process import STDOUT, Process, ProcessPlan
from sandshift.agent.streams import InputStream, OutputStream
from sandshift.agent.table import Table
from ttrpc import Code, StatusError

_NAME_BYTES: Final = 4096
"""Of the terminal's name, which comes with its descriptor."""


class AdoptedProcess(Process):
    """The init of a container or one of its exec sessions."""

    def __init__(
        self, plan: ProcessPlan, table: Table, group: Group | None, on_end: Callable[[], None]
    ) -> None:
        """`group`: signals to "all" go to everybody in it; None: to the process's own group."""
        super().__init__(plan, table.room)
        self._table = table
        self._group = group
        self._on_end = on_end

    @contextlib.contextmanager
    def stdio(self, folder: Path) -> Iterator[tuple[list[str], tuple[int, int, int]]]:
        """What runc is called with: options, and its stdin, stdout and stderr. Its streams are ours afterwards.

        The terminal comes over a socket in `folder`. If runc fails, `close` the process.
        """
        with contextlib.ExitStack() as ends:
            if not self.plan.terminal:
                yield [], self._open_pipes(ends)
                return
            path = folder / f"terminal-{id(self):x}"
            ends.callback(path.unlink, missing_ok=True)
            listening = ends.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen(1)
            listening.settimeout(0)
            yield ["--console-socket", str(path)], (subprocess.DEVNULL,) * 3
            self._take_terminal(listening)

    def adopt(self, pid: int) -> None:
        """It is `pid`, a child of ours by now. Within `Table.adopting`, since before runc was called."""
        if (status := self._table.take_orphan(pid)) is not None:
            self.pid = pid
            self._end(status)
        else:
            self._watch(pid)
            self.reap()

    def signal(self, number: int, *, whole_group: bool) -> None:
        if whole_group and self._group is not None and 0 < number < signal.NSIG:
            self._group.signal(number)
        else:
            super().signal(number, whole_group=whole_group)

    def _poll(self) -> int | None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return 0  # cannot be: only `reap` takes it
        return os.waitstatus_to_exitcode(status) if pid else None

    def _end(self, status: int) -> None:
        self._on_end()
        super()._end(status)

    def _take_terminal(self, listening: socket.socket) -> None:
        """runc has sent it before it ended."""
        try:
            connection, _ = listening.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, _NAME_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise StatusError(Code.INTERNAL, f"runc has sent no terminal: {error.strerror}") from error
        if not descriptors:
            raise StatusError(Code.INTERNAL, "runc has sent no terminal")
        self.input = InputStream(os.dup(descriptors[0]), terminal=True)
        self.outputs[STDOUT] = OutputStream(descriptors[0], self._room)
