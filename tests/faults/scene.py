"""Two hosts, the traps, the witness, and one guest at a time that counts and checks its own memory."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import inspect
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.cli.demo.guest import workload
from sandshift.cli.demo.lab import Lab, LabHost, open_lab
from sandshift.cli.demo.topology import GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH
from sandshift.errors import SandshiftError
from sandshift.fleet import host as hosts
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host, delete_shim
from sandshift.fleet.launch import Card, Wish, launch, run_process
from sandshift.image.build import build
from sandshift.net.plan import tap_name
from tests.faults import trap, victims, witness
from tests.faults.leftovers import SESSION_FILES
from tests.faults.shim_under_test import write_program

BROADCAST: Final = "10.77.0.255"
MEMORY_MIB: Final = 128
PAGES: Final = 1024
"""4 MiB of pattern."""
PAGES_PER_BEAT: Final = 12
LIMITS: Final = {"stall_s": 10.0, "handover_frame_s": 4.0}
"""Short enough to be waited for, long enough for a machine under load."""
OVERRIDES: Final = {"vm": {"memory_mib": MEMORY_MIB}, "migration.limits": LIMITS}
HEARD_S: Final = 60.0
"""How long a guest may take to be heard: 20 ms on a quiet machine."""
ENOUGH: Final = 20
"""So many datagrams say that it runs."""
SWEEPS: Final = 2
"""So many sweeps on, every page has been checked since."""


@dataclass(slots=True)
class Guest:
    """A guest that runs, and where."""

    sandbox_id: str
    marker: bytes
    on: LabHost


class Scene:
    """Made by `open_scene`."""

    def __init__(self, lab: Lab, traps: trap.Traps, eyes: witness.Witness, program: Path) -> None:
        self.lab = lab
        self.traps = traps
        self.eyes = eyes
        self.program = program
        self.guest: Guest | None = None
        self._count = 0

    @property
    def hosts(self) -> tuple[LabHost, LabHost]:
        return self.lab.host_a, self.lab.host_b

    def other(self, host: LabHost) -> LabHost:
        a, b = self.hosts
        return b if host is a else a

    async def running_guest(self) -> Guest:
        """The guest of the last case, if it came through well; else a new one."""
        if self.guest is None:
            self.guest = await self._new_guest()
        else:
            self.eyes.forget()
        return self.guest

    async def _new_guest(self) -> Guest:
        self._count += 1
        on = self.hosts[self._count % 2]
        guest = Guest(f"guest-{self._count}", secrets.token_bytes(8), on)
        self.eyes.watch(guest.marker, tap_name(NAMESPACE_DEFAULT, guest.sandbox_id, 0))
        card = Card((f"{GUEST_ADDRESS}/{PREFIX_LENGTH}",), mac=GUEST_MAC)
        shim = await launch(Host.load(on.config_path), Wish(guest.sandbox_id, card=card))
        try:
            arguments = (BROADCAST, str(witness.PORT), guest.marker.hex(), str(PAGES), str(PAGES_PER_BEAT))
            await run_process(shim, ("python3", "-c", beacon_source(), *arguments))
        finally:
            await shim.close()
        async with asyncio.timeout(HEARD_S):
            await self.eyes.wait_for(ENOUGH, host=on.names.letter, since_ns=0)
        return guest

    async def remove_everything(self) -> None:
        """Whatever a case left, by force: the next one begins anew."""
        self.guest = None
        for lab_host in self.hosts:
            host = Host.load(lab_host.config_path)
            run_dir = Path(host.config.places.run_dir)
            state_dir = Path(host.config.places.state_dir) / "sandboxes"
            places = {path.relative_to(base) for base in (run_dir, state_dir) for path in base.glob("*/*")}
            for place in places:
                namespace, sandbox_id = place.parts
                for name in SESSION_FILES:
                    (host.config.sandbox_state_dir(namespace, sandbox_id) / name).unlink(missing_ok=True)
                for record in (victims.shim_pid_file, victims.vm_pid_file):
                    if (pid := victims.pid_in(record(host, namespace, sandbox_id))) is not None:
                        await victims.kill(pid)
                with contextlib.suppress(SandshiftError):
                    await delete_shim(host, namespace, sandbox_id)


def beacon_source() -> str:
    """The guest's program: the demo's own pattern of memory, and the beacon over it."""
    head = (
        "import mmap, struct",
        f"PAGE = {workload.PAGE}",
        f"RECORD = struct.Struct({workload.RECORD.format!r})",
        f"REPEATS = {workload.REPEATS}",
    )
    beacon = (importlib.resources.files("tests.faults") / "guest" / "beacon.py").read_text()
    return "\n".join(
        (*head, inspect.getsource(workload.page), inspect.getsource(workload.WorkingSet), beacon)
    )


@contextlib.contextmanager
def shims_with_hooks() -> Iterator[Path]:
    """Whoever starts a shim in this process meanwhile starts one with hooks; gives its program."""
    installed = hosts.shim_program
    with tempfile.TemporaryDirectory(prefix="sandshift-faults-") as folder:
        program = write_program(Path(folder))
        hosts.shim_program = lambda: str(program)
        try:
            yield program
        finally:
            hosts.shim_program = installed


@contextlib.asynccontextmanager
async def open_scene(program: Path) -> AsyncIterator[Scene]:
    """Two hosts for the time of the `async with`, within `shims_with_hooks`. Needs root."""
    async with open_lab(overrides=OVERRIDES) as lab, trap.listening(lab.folder) as traps:
        namespaces = {host.names.letter: host.namespace for host in (lab.host_a, lab.host_b)}
        async with witness.watching(namespaces) as eyes:
            await asyncio.to_thread(build, Path(lab.host_a.config.places.cache_dir))
            scene = Scene(lab, traps, eyes, program)
            try:
                yield scene
            finally:
                await scene.remove_everything()
