"""QEMU as the Vmm: starts VM processes, and finds those that an earlier shim started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import AlreadyThere, NoRoom, Rejected, SandshiftError, Unavailable
from sandshift.network_namespace import run_in_file
from sandshift.vmm.command import Sockets, command_line
from sandshift.vmm.machine import MachineSpec
from sandshift.vmm.process import VmProcess, adopt, listen_unix, spawn
from sandshift.vmm.psk import remove_keys
from sandshift.vmm.qemu_machine import AGENT_SOCKET, QMP_SOCKET, QemuMachine
from sandshift.vmm.qemu_transfer import KEYS_FOLDER
from sandshift.vmm.qmp import COMMAND_S

GREETING_S: Final = 30.0
"""From the start of QEMU to its QMP greeting: it maps memory and reads the kernel in between."""

END_S: Final = 1.0
"""Between QEMU's hanging up and its end."""


@dataclass(frozen=True, slots=True)
class QemuVmm:
    """See `sandshift.vmm.machine.Vmm`."""

    binary: str = "qemu-system-x86_64"
    data_dirs: Sequence[str] = ()
    """Extra -L folders, for a QEMU that is unpacked and not installed."""
    command_s: float = COMMAND_S
    """Bound of each QMP command."""

    async def start(self, spec: MachineSpec) -> QemuMachine:
        return await self._start(spec, incoming=False)

    async def start_incoming(self, spec: MachineSpec) -> QemuMachine:
        return await self._start(spec, incoming=True)

    async def start_from_template(self, spec: MachineSpec, template: Path) -> QemuMachine:
        """As the interface says. What a card's driver took over from the template's guest it keeps, its MAC among it.

        Raises:
            Damaged: the file is not a guest of this shape.
        """
        machine = await self._start(spec, incoming=True)
        try:
            await machine.load(template)
        except BaseException:
            await machine.destroy()
            raise
        return machine

    async def reattach(self, spec: MachineSpec) -> QemuMachine | None:
        process = adopt(spec.run_dir, spec.run_dir / QMP_SOCKET)
        if process is None:
            return None
        try:
            machine = await self._open(spec, process)
        except BaseException as error:
            alive = process.alive
            process.detach()
            if isinstance(error, Unavailable) and not alive:
                return None
            raise
        if not machine.alive:
            await machine.detach()
            return None
        return machine

    async def _start(self, spec: MachineSpec, *, incoming: bool) -> QemuMachine:
        _check_places(spec)
        if (running := adopt(spec.run_dir, spec.run_dir / QMP_SOCKET)) is not None:
            running.detach()
            raise AlreadyThere(
                f"sandbox {spec.name}: VM process {running.pid} runs in {spec.run_dir} already"
            )
        remove_keys(spec.run_dir / KEYS_FOLDER)
        process = self._spawn(spec, incoming=incoming)
        try:
            return await self._open(spec, process)
        except Unavailable as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_S):
                    await process.ended.wait()
            ended_by_itself = not process.alive
            await _end(process)
            raise _start_failed(spec, process, ended_by_itself=ended_by_itself) from error
        except BaseException:
            await _end(process)
            raise

    def _spawn(self, spec: MachineSpec, *, incoming: bool) -> VmProcess:
        with (
            listen_unix(spec.run_dir / QMP_SOCKET) as qmp,
            listen_unix(spec.run_dir / AGENT_SOCKET) as agent,
        ):
            arguments = command_line(
                spec,
                binary=self.binary,
                data_dirs=self.data_dirs,
                sockets=Sockets(qmp_fd=qmp.fileno(), agent_fd=agent.fileno()),
                incoming=incoming,
            )
            inherited = (qmp.fileno(), agent.fileno())
            return spawn(
                arguments, spec.run_dir, inherited_fds=inherited, network_namespace=spec.network_namespace
            )

    async def _open(self, spec: MachineSpec, process: VmProcess) -> QemuMachine:
        return await QemuMachine.open(spec, process, greeting_s=GREETING_S, command_s=self.command_s)


async def _end(process: VmProcess) -> None:
    with contextlib.suppress(SandshiftError):
        await process.kill()


def _check_places(spec: MachineSpec) -> None:
    """What QEMU would say less well, or would take without a word.

    Raises:
        Rejected: names the first thing that is missing.
    """
    for what, path in (("kernel", spec.kernel), ("initramfs", spec.initramfs)):
        if not os.access(path, os.R_OK):
            raise Rejected(f"sandbox {spec.name}: {what} {path} cannot be read: build the guest image first")
    for source in spec.disks:
        if not os.access(source.path, os.R_OK):
            raise Rejected(f"sandbox {spec.name}: disk {source.device_id}: {source.path} cannot be read")
    for card, tap in spec.taps.items():
        # QEMU would make a tap that is not there, connected to nothing.
        if tap and not run_in_file(spec.network_namespace, lambda: _interface_exists(tap)):  # noqa: B023
            where = spec.network_namespace or "this network namespace"
            raise Rejected(f"sandbox {spec.name}: card {card}: there is no tap {tap} in {where}")


def _interface_exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _start_failed(spec: MachineSpec, process: VmProcess, *, ended_by_itself: bool) -> SandshiftError:
    words = process.stderr_tail()
    if not ended_by_itself:
        return Unavailable(
            f"sandbox {spec.name}: QEMU did not come up within {GREETING_S:g} s and was ended. {words}"
        )
    if "Cannot allocate memory" in words:
        return NoRoom(
            f"sandbox {spec.name}: no memory on this host for a VM of {spec.shape.memory_bytes >> 20} MiB"
        )
    return Rejected(f"sandbox {spec.name}: QEMU does not start: {words or f'status {process.returncode}'}")
