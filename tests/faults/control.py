"""The control: two runners made by hand, which the witness must see. A witness that is never wrong proves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.fleet.calls import Calls
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host
from sandshift.fleet.request import Migration
from tests.faults import client, victims, witness
from tests.faults.scene import ENOUGH, HEARD_S, Scene

SESSION: Final = "control"


@dataclass(frozen=True, slots=True)
class Control:
    found: bool
    words: str


async def play_control(scene: Scene) -> Control:
    """Move a guest without its right to run, kill both shims, and continue both QEMUs through QMP."""
    guest = await scene.running_guest()
    here, there = guest.on, scene.other(guest.on)
    hosts = (Host.load(here.config_path), Host.load(there.config_path))
    calls = Calls(migration := Migration(*hosts, guest.sandbox_id, SESSION))
    try:
        await client.transfer(migration, calls)
    finally:
        await calls.close()
    for host in hosts:
        pid = victims.pid_in(victims.shim_pid_file(host, NAMESPACE_DEFAULT, guest.sandbox_id))
        assert pid is not None
        await victims.kill(pid)
    for host in hosts:
        await _continue(host.config.sandbox_run_dir(NAMESPACE_DEFAULT, guest.sandbox_id) / "vm" / "qmp")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEARD_S):
            for host in (here, there):
                await scene.eyes.wait_for(ENOUGH, host=host.names.letter, since_ns=0)
    seen = scene.eyes.seen
    found = witness.clashes(seen)
    await scene.remove_everything()
    if not found or {each.host for each in seen} != {"a", "b"}:
        return Control(False, "two runners, made by hand, were NOT seen")
    return Control(True, f"two runners, made by hand, were seen: {found[0]}")


async def _continue(qmp: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(qmp))
    try:
        await reader.readline()  # the greeting
        for command in ("qmp_capabilities", "cont"):
            writer.write(json.dumps({"execute": command}).encode() + b"\n")
            while "return" not in (answer := json.loads(await reader.readline())):
                if "error" in answer:
                    raise RuntimeError(f"QMP {command}: {answer['error']}")
    finally:
        writer.close()
