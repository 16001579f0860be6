"""A shim that begins on what an earlier one left: its sandbox, its VM, its processes. Sessions: migration/restoring.py."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Final

from sandshift.errors import Damaged, SandshiftError, Unavailable
from sandshift.sandbox import codec
from sandshift.sandbox.model import is_of_container
from sandshift.shim.parts import PodShare, Wish
from sandshift.shim.sandbox import EXIT_KILLED, Life, LiveSandbox
from sandshift.vmm.machine import RunState
from sandshift.wire.sandshift import state_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandshift.guest.client import GuestProcess
    from sandshift.vmm.machine import Machine

log = logging.getLogger(__name__)

DYING_S: Final = 2.0
"""How long a QEMU that does not answer any more may take to be gone; one that ends closes its sockets first."""
DYING_LOOK_S: Final = 0.02


async def ends(machine: Machine) -> bool:
    """Whether this QEMU is gone, or about to go."""
    deadline_s = time.monotonic() + DYING_S
    while machine.alive and time.monotonic() < deadline_s:  # noqa: ASYNC110 - a process, which tells nobody
        await asyncio.sleep(DYING_LOOK_S)
    return not machine.alive


async def runs(machine: Machine) -> bool:
    """Whether the guest runs; no, if QEMU ends as it is asked."""
    try:
        return await machine.run_state() is RunState.RUNNING
    except Unavailable:
        if not await ends(machine):
            raise
        return False


async def restore_sandbox(sandbox: LiveSandbox) -> bool:
    """Find what an earlier shim of this sandbox left; False if there is nothing.

    Raises:
        Damaged: what is on disk cannot be believed. Nothing is overwritten, the VM is left as it is.
    """
    try:
        data = sandbox.places.sandbox_file.read_bytes()
    except FileNotFoundError:
        return False
    try:
        _take_description(sandbox, json.loads(data))
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{sandbox.places.sandbox_file} cannot be read: {error}; the VM is left as it is"
        ) from error
    sandbox.containers.restore()
    await sandbox.end_what_is_left()
    if sandbox.shape is not None:
        await _find_machine(sandbox)
    return True


def _take_description(sandbox: LiveSandbox, document: Mapping[str, object]) -> None:
    sandbox.model = codec.sandbox_from_proto(
        state_pb2.Sandbox.FromString(bytes.fromhex(str(document["sandbox"])))
    )
    shape = bytes.fromhex(str(document["shape"]))
    sandbox.shape = codec.shape_from_proto(state_pb2.MachineShape.FromString(shape)) if shape else None
    sandbox.life = Life(document["life"])
    sandbox.created_at_ns = int(str(document["created_at_ns"]))
    sandbox.started_from = str(document["started_from"])
    sandbox.boot_id = str(document["boot_id"])
    sandbox.exit_code = int(str(document.get("exit_code", 0)))
    sandbox.exited_at_ns = int(str(document.get("exited_at_ns", 0)))
    sandbox.moved_to = str(document.get("moved_to", ""))
    if sandbox.life is Life.STOPPED:
        sandbox.ended.set()
    sandbox.disks.restore(document.get("disks", ()))  # type: ignore[arg-type]
    wish = document["wish"]
    assert isinstance(wish, dict)
    sandbox.wish = Wish(**{**wish, "nameservers": tuple(wish["nameservers"])})
    if (share := document.get("pod_share")) is not None:
        assert isinstance(share, dict)
        sandbox.pod_share = PodShare.from_document(share)


async def _find_machine(sandbox: LiveSandbox) -> None:
    assert sandbox.shape is not None
    spec = await sandbox.booter.find(
        sandbox.model,
        sandbox.shape,
        sandbox.disks.sources(),
        network_namespace=sandbox.wish.network_namespace,
    )
    in_session = sandbox.places.unfinished_session()
    machine = await sandbox.parts.vmm.reattach(spec)
    sandbox.spec = spec
    if machine is None:
        log.warning("the VM of sandbox %s has ended while no shim was there", sandbox.sandbox_id)
        if not in_session:
            await sandbox.end(EXIT_KILLED)
        return
    sandbox.machine = machine
    if in_session:
        sandbox.on_vm_death = _left_to_the_session
    sandbox.watch()
    try:
        sandbox.guest = await sandbox.parts.connect_guest(
            machine.agent_socket, sandbox.config.migration.limits.agent_reply_s
        )
    except Unavailable:
        if not await ends(machine):
            raise
        return  # Whoever is told of its end knows what it means.
    log.info("sandbox %s: found its VM, process %d", sandbox.sandbox_id, machine.pid)


async def _left_to_the_session() -> None:
    """What the end of a VM means that ends before its session has been found: that session looks at it."""


async def without_session(sandbox: LiveSandbox) -> None:
    """There was no session after all: the end of the VM is the sandbox's."""
    sandbox.on_vm_death = None
    if sandbox.machine is not None and not sandbox.machine.alive:
        await sandbox.end(EXIT_KILLED)


async def follow_again(sandbox: LiveSandbox) -> None:
    """Take up the processes where the files end. The guest must run, or come to run: its agent is asked."""
    assert sandbox.guest is not None
    sandbox.containers.follow(sandbox.guest)
    bases = sandbox.processes.bases_on_disk()
    try:
        processes: list[GuestProcess] = await sandbox.guest.list_processes()
    except SandshiftError as error:
        log.warning("the agent of sandbox %s does not answer: %s", sandbox.sandbox_id, error)
        return
    for process in processes:
        if is_of_container(process.process_id):
            continue
        try:
            sandbox.processes.adopt(
                process.process_id, process.pid, process.args, bases.get(process.process_id, {})
            )
        except SandshiftError as error:
            log.warning("sandbox %s: a process is not followed: %s", sandbox.sandbox_id, error)
    sandbox.processes.follow(sandbox.guest)


async def drop_unused_disks(sandbox: LiveSandbox) -> None:
    """Disks that an earlier shim plugged in for a container that it never wrote down. Before anybody is served."""
    try:
        await sandbox.disks.keep_only([container.guest_id for container in sandbox.containers.all()])
    except SandshiftError as error:
        log.warning("sandbox %s keeps a disk that nobody needs: %s", sandbox.sandbox_id, error)
