"""What is looked at on this host before anything moves; what it means is decided in `sandbox/preflight.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandshift.errors import Blocker
from sandshift.shim.sandbox import Life
from sandshift.vmm.machine import RunState

if TYPE_CHECKING:
    from sandshift.shim.migration.destination import Destination
    from sandshift.shim.sandbox import LiveSandbox


async def source_blockers(sandbox: LiveSandbox) -> list[Blocker]:
    if sandbox.life is not Life.READY or sandbox.machine is None or not sandbox.machine.alive:
        return [
            Blocker(
                "sandbox.state", f"it is {sandbox.life.value}", "start it first: only a running sandbox moves"
            )
        ]
    state = await sandbox.machine.run_state()
    if state is not RunState.RUNNING:
        return [
            Blocker(
                "sandbox.state", f"its VM is {state.value}", "resume it first: only a running sandbox moves"
            )
        ]
    if sandbox.model.may_migrate is False:
        return [
            Blocker(
                "sandbox.annotations",
                "io.microsoft.migration.support-enabled is false",
                "create it without, or with true",
            )
        ]
    return []


async def destination_blockers(
    sandbox: LiveSandbox, destination: Destination
) -> tuple[list[Blocker], list[str]]:
    return [], []
