"""QMP with the sandbox's name in its errors: what a QemuMachine and its transfers say to one QEMU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sandshift.errors import IllegalMove, Unavailable
from sandshift.vmm.machine import RunState
from sandshift.vmm.qmp import Qmp, QmpRefused

_STATES: Final[Mapping[str, RunState]] = {
    **{state.value: state for state in RunState if state is not RunState.DEAD},
    "restore-vm": RunState.INMIGRATE,
    "save-vm": RunState.PAUSED,
}

_NOT_THERE: Final = re.compile(r"Device '[^']*' not found|Failed to find node with node-name=")
"""QEMU's words. Source: system/qdev-monitor.c, blockdev.c."""


@dataclass(frozen=True, slots=True)
class Control:
    name: str
    """The sandbox's."""
    qmp: Qmp
    alive: Callable[[], bool]

    @property
    def version(self) -> tuple[int, int, int]:
        return self.qmp.version

    async def ask(self, command: str) -> object:
        """A question that is never refused."""
        return await self.qmp.execute(command)

    async def do(self, doing: str, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Run a command whose refusal means: not in this state.

        Raises:
            IllegalMove: QEMU refused, with its words.
            Unavailable: no answer in time, or the conversation ended.
        """
        try:
            await self.qmp.execute(command, arguments)
        except QmpRefused as error:
            raise IllegalMove(f"sandbox {self.name}: QEMU refused to {doing}: {error.reason}") from error

    async def do_if_there(self, doing: str, command: str, arguments: Mapping[str, object]) -> bool:
        """As `do`, of a thing that may be gone already: False if QEMU has no such device or node."""
        try:
            await self.qmp.execute(command, arguments)
        except QmpRefused as error:
            if _NOT_THERE.search(error.reason):
                return False
            raise IllegalMove(f"sandbox {self.name}: QEMU refused to {doing}: {error.reason}") from error
        return True

    async def give_fd(self, name: str, fd: int) -> None:
        """Let QEMU have a duplicate of `fd` under `name`, in place of what it has there."""
        try:
            await self.qmp.pass_fd(name, fd)
        except QmpRefused as error:
            raise IllegalMove(f"sandbox {self.name}: QEMU refused a descriptor: {error.reason}") from error

    async def close_fd(self, name: str) -> None:
        """Let QEMU close what it has under `name`; nothing there is no error."""
        with contextlib.suppress(QmpRefused):
            await self.qmp.execute("closefd", {"fdname": name})

    async def run_state(self) -> RunState:
        try:
            answer = await self.ask("query-status")
        except Unavailable:
            if not self.alive():
                return RunState.DEAD
            raise
        status = str(answer.get("status")) if isinstance(answer, Mapping) else ""
        return _STATES.get(status, RunState.INTERNAL_ERROR)
