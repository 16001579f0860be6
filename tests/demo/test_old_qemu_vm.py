"""QEMU 7.2 under TCG really loses writes, and the workload's own check really finds it; 10.0 under the same hands does not.

Our shim refuses such a QEMU, so this moves the guest with the VM room alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sandshift.cli.demo.proof import MemoryCheck, figures
from sandshift.cli.demo.scenario import memory_of
from sandshift.cli.demo.workload import Workload
from sandshift.config import Places
from sandshift.errors import SandshiftError
from sandshift.guest.client import Guest
from sandshift.image import build
from sandshift.session.right_licence import licence_of
from sandshift.vmm.machine import (
    ChannelSecurity,
    DiskSource,
    MachineSpec,
    TransferSettings,
)
from sandshift.vmm.qemu import QemuVmm
from sandshift.vmm.qemu_machine import QemuMachine
from sandshift.vmm.standard import DiskPlan, standard_shape
from tests.demo.guest_memory import generations
from tests.demo.old_qemu import unpacked_qemu_72
from tests.demo.test_proof import good
from tests.vmm.machine_suite import channel, until

pytestmark = [
    pytest.mark.vm,
    pytest.mark.full,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

MEMORY_BYTES = 256 << 20
GUEST_ANSWERS_S = 30
MOVES_MAX = 40
"""Of the moves with 7.2 one in two to one in eight loses writes."""
WORKLOAD = Workload(working_set_mib=4, dirty_mib_per_s=4096)
SETTINGS = TransferSettings(bandwidth_bytes_per_s=1 << 32, downtime_limit_ms=20)
TICK = "import time\nwhile True: time.sleep(0.4)"
"""What 7.2 forgets is to make TCG's TLB notice writes again after a page was sent. So the harm is the greater the longer
its entries live: a working set that fits, and a process that wakes up now and then, since only flushes let the TLB grow.
"""
ASK = (
    "import socket,sys\n"
    f"c=socket.create_connection(('127.0.0.1',{WORKLOAD.port}))\n"
    "c.sendall(sys.argv[1].encode()+b'\\n')\n"
    "print(c.makefile().readline(),end='')\n"
)


def spec(run_dir: Path, machine_type: str) -> MachineSpec:
    image = build.build(Path(Places().cache_dir))
    shape = standard_shape(
        machine_type=machine_type,
        accelerator="tcg",
        cpu_model="max",
        qemu_version="",
        memory_bytes=MEMORY_BYTES,
        vcpus=1,
        kernel_command_line=image.kernel_command_line,
        kernel_sha256="",
        initramfs_sha256="",
        uuid=str(uuid.uuid4()),
        generation_id=str(uuid.uuid4()),
        disks=(DiskPlan(image.description.root_bytes, image.root_digest),),
    )
    run_dir.mkdir(mode=0o700)
    return MachineSpec(
        name=run_dir.name,
        shape=shape,
        run_dir=run_dir,
        kernel=image.kernel,
        initramfs=image.initramfs,
        disks=(DiskSource("disk0", image.root),),
    )


async def said_by(guest: Guest, process_id: str, *, lines: int) -> list[dict]:
    """The first `lines` lines of a process's output, as JSON."""
    heard = bytearray()

    def take(offset: int, data: bytes) -> int:
        heard[offset:] = data
        return offset + len(data)

    following = asyncio.create_task(guest.follow_output(process_id, 1, lambda: len(heard), take))
    async with asyncio.timeout(120):
        while heard.count(b"\n") < lines:
            await asyncio.sleep(0.05)
    following.cancel()
    await asyncio.wait([following])
    return [json.loads(line) for line in heard.splitlines()[:lines]]


async def ask(guest: Guest, command: str) -> dict:
    process_id = f"ask-{uuid.uuid4().hex[:6]}"
    await guest.start_process(process_id, ["python3", "-c", ASK, command])
    return (await said_by(guest, process_id, lines=1))[0]


async def until_it_writes(guest: Guest) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(json.JSONDecodeError, TimeoutError):
                async with asyncio.timeout(5):
                    if (await ask(guest, "STATUS"))["generation"] >= 1:
                        return


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a guest arrived."""

    pages: int
    """Of the pattern that are whole on both sides, while both stand still."""
    stale: int
    """Of these, how many are older on the destination than on the source."""
    memory: MemoryCheck
    """The writer's own report afterwards; nothing in it: the guest does not answer any more."""


async def arrival(
    vmm: QemuVmm, machine_type: str, folder: Path, *, moves_max: int, enough: int = 1
) -> Arrival:
    """Boot a guest with the writer and move it, up to `moves_max` times, until something is lost; then let it go on.

    A move that lost nothing is undone: the source still has everything and goes on from there.
    """
    source_spec = spec(folder / "source", machine_type)
    source = await vmm.start(source_spec)
    try:
        guest = await Guest.connect(source.agent_socket, reply_s=60)
        await source.run_vcpus(licence_of(None))
        await guest.personalize(entropy=secrets.token_bytes(64), machine_id=uuid.uuid4().hex, hostname="old")
        # Its output goes nowhere: an agent that is idle during the move is spared some of the harm.
        await guest.start_process(
            "main", ["/bin/sh", "-c", 'exec "$0" "$@" >/dev/null', *WORKLOAD.arguments()]
        )
        await guest.start_process("tick", ["python3", "-c", TICK])
        await until_it_writes(guest)
        await guest.close()
        for number in range(1, moves_max + 1):
            run_dir = folder / f"destination-{number}"
            run_dir.mkdir(mode=0o700)
            destination = await vmm.start_incoming(replace(source_spec, name=run_dir.name, run_dir=run_dir))
            try:
                pages, stale = await move_and_compare(source, destination)
                print(f"move {number}: {stale} of {pages} pages are stale")
                if stale or number == moves_max:
                    return Arrival(pages, stale, await own_report(destination))
            finally:
                await destination.destroy()
            await source.run_vcpus(licence_of(None))
            await asyncio.sleep(0.5)  # the writer goes on for a while before the next move
        raise AssertionError("moves_max is at least 1")
    finally:
        await source.destroy()


async def move_and_compare(source: QemuMachine, destination: QemuMachine) -> tuple[int, int]:
    """Whole pages of the pattern on both sides, both standing still after the move, and how many of them are older."""
    ends = channel()
    try:
        said, heard = source.events(), destination.events()
        await destination.migrate_in(ends[1].fileno(), ChannelSecurity())
        await source.migrate_out(ends[0].fileno(), ChannelSecurity(), SETTINGS)
        await until(said, "MIGRATION", "pre-switchover")
        await source.switch_over()
        await until(said, "MIGRATION", "completed")
        await until(heard, "MIGRATION", "completed")
    finally:
        for end in ends:
            end.close()
    sent = await asyncio.to_thread(generations, source.pid, WORKLOAD.marker)
    came = await asyncio.to_thread(generations, destination.pid, WORKLOAD.marker)
    both = sent.keys() & came.keys()
    return len(both), sum(came[number] < sent[number] for number in both)


async def own_report(machine: QemuMachine) -> MemoryCheck:
    """Start the guest and have its writer check every page."""
    guest = await Guest.connect(machine.agent_socket, reply_s=GUEST_ANSWERS_S)
    await machine.run_vcpus(licence_of(None))
    try:
        async with asyncio.timeout(GUEST_ANSWERS_S):
            return memory_of(await ask(guest, "CHECK"), 20 << 20)
    except (SandshiftError, TimeoutError, ValueError):
        return MemoryCheck()
    finally:
        await guest.close()


async def test_qemu_7_2_loses_writes_and_the_proof_says_so(tmp_path):
    """What both VMs hold while they stand still is the evidence: a guest that goes on may not live to tell, or may have
    rewritten the lost pages before it is asked."""
    qemu = unpacked_qemu_72()
    vmm = QemuVmm(binary=str(qemu.binary), data_dirs=qemu.data_dirs)
    arrived = await arrival(vmm, "pc-q35-7.2", tmp_path, moves_max=MOVES_MAX)
    print(arrived)
    assert arrived.pages > 900
    if not arrived.stale:
        pytest.skip(f"optional: QEMU 7.2 happened to lose nothing in {MOVES_MAX} moves")
    seen = MemoryCheck(pages=arrived.pages, pages_checked=arrived.pages, pages_stale=arrived.stale)
    made = figures(replace(good(), memory=seen))
    assert made["ok"] is False
    assert "the guest's memory is not verified" in made["reasons"]


async def test_the_installed_qemu_loses_none_in_the_same_hands(tmp_path):
    arrived = await arrival(QemuVmm(), "pc-q35-10.0", tmp_path, moves_max=4)
    assert arrived.pages > 900
    assert arrived.stale == 0
    assert arrived.memory.pages_stale == 0
    assert arrived.memory.pages_checked >= arrived.memory.pages == WORKLOAD.pages
    assert figures(replace(good(), memory=arrived.memory))["ok"] is True
