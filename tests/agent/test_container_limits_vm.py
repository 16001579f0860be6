"""What holds containers in a real guest: limits, freezing, seccomp, memory that runs out; and a move to another VM."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.errors import NotFound, Rejected
from sandshift.guest.client import Guest
from tests.agent.container_rig import ROOT_LUN, Ward, disk, needs_busybox, sh, until_said, ward_of
from tests.agent.house import Sink
from tests.image import rig as rigs
from tests.image.rig import Rig
from tests.image.test_guest_vm import move
from tests.vmm.machine_suite import LICENCE

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    needs_busybox,
    *rigs.needs_vm,
]


@pytest.fixture(scope="module")
def rig():
    with tempfile.TemporaryDirectory(prefix="sandshift-limits-") as folder:
        yield Rig(rigs.image(), Path(folder))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(rig) -> AsyncIterator[Ward]:
    async with ward_of(rig, "limits") as (_, made):
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def ward(shared) -> AsyncIterator[Ward]:
    yield shared
    await shared.clear()


def limited(script: str, **resources):
    return sh(script, linux__resources=resources)


async def test_limits_are_in_force_are_counted_and_can_be_changed(ward):
    made = limited(
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; sleep 100",
        memory={"limit": 32 << 20, "swap": 32 << 20},
        cpu={"quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0-7"},
        pids={"limit": 20},
    )
    made["mounts"].append(
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}
    )
    await ward.run("c", made)
    assert (await until_said(ward, "c:", "20")).split() == ["33554432", "50000", "100000", "20"]
    told = await ward.guest.containers.stats("c")
    assert (told.memory_limit_bytes, told.pids_limit) == (32 << 20, 20)
    assert told.pids_current in (1, 2)
    assert told.cpu_usage_us > 0
    assert 0 < told.memory_usage_bytes <= told.memory_peak_bytes <= 32 << 20
    wanted = {
        "memory": {"limit": 48 << 20},
        "cpu": {"quota": 80_000, "period": 100_000},
        "pids": {"limit": 30},
    }
    await ward.guest.containers.update("c", json.dumps(wanted).encode())
    told = await ward.guest.containers.stats("c")
    assert (told.memory_limit_bytes, told.pids_limit) == (48 << 20, 30)
    session = await ward.exec("c", "e", "cat", "/sys/fs/cgroup/cpu.max")
    assert await ward.output(session) == "80000 100000\n"
    with pytest.raises(Rejected, match="resources is no JSON"):
        await ward.guest.containers.update("c", b"{")
    await ward.guest.signal_process("c:", 9)
    assert await ward.end("c") == 137
    with pytest.raises(NotFound, match="container c is not in the guest"):
        await ward.guest.containers.stats("c")


async def test_processes_beyond_the_limit_are_not_made(ward):
    script = "(for i in 1 2 3 4 5 6 7 8; do sleep 100 & done) 2>&1; exit 0"
    assert "can't fork" in await ward.said("c", limited(script, pids={"limit": 4}))


async def test_memory_that_runs_out_kills_is_told_and_counted(ward):
    seen = []

    async def listen() -> None:
        async for event in ward.guest.containers.events():
            seen.append(event)
            if len(seen) == 2:
                return

    listening = asyncio.create_task(listen())
    hungry = "exec tail /dev/zero"
    for name in ("one", "two"):
        await ward.run(name, limited(hungry, memory={"limit": 8 << 20}))
        assert (await ward.guest.wait_process(f"{name}:")).code == 137
        assert (await ward.guest.containers.stats(name)).oom_kills == 1
        await ward.remove(name)
    async with asyncio.timeout(30):
        await listening
    assert [(one.container_id, one.kind) for one in seen] == [("one", "oom"), ("two", "oom")]
    again = ward.guest.containers.events(seen[1].number)
    assert await anext(again) == seen[1]
    await again.aclose()


async def test_a_paused_container_stands_still_and_goes_on(ward):
    await ward.run("c", sh("i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"))
    sink = Sink()
    following = asyncio.create_task(ward.guest.follow_output("c:", 1, sink.delivered, sink.take))
    for _ in range(2):
        await grows(sink)
        await ward.guest.containers.pause("c")
        await ward.guest.containers.pause("c")
        before = (await ward.guest.containers.stats("c")).cpu_usage_us
        for _ in range(10):
            await ward.guest.info()
        assert (await ward.guest.containers.stats("c")).cpu_usage_us == before
        await ward.guest.containers.resume("c")
    await grows(sink)
    await ward.guest.containers.pause("c")
    await ward.guest.signal_process("c:", 9)
    assert await ward.end("c") == 137
    await following


async def grows(sink: Sink) -> None:
    before = len(sink.data)
    async with asyncio.timeout(30):
        while len(sink.data) < before + 50:
            await asyncio.sleep(0.01)


async def test_calls_that_seccomp_forbids_fail(ward):
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
        ],
    }
    said = await ward.said(
        "c", sh("mkdir /tmp/x 2>&1 || grep Seccomp: /proc/self/status", linux__seccomp=profile)
    )
    assert "Operation not permitted" in said
    assert said.split()[-1] == "2"


async def test_containers_go_on_after_a_move_with_their_output_terminals_and_exits(rig):
    """As two shims do it, with two QEMUs: sinks frozen, moved, connected before the vCPUs run, on at the offset."""
    async with ward_of(rig, "source") as (source, before):
        counter = "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; read x; echo $x; exit 6"
        await before.run("writes", sh(counter), stdin=True)
        await before.run("idle", sh("sleep 100"))
        session = await before.exec(
            "idle", "e", "sh", "-c", "echo up; read x; echo $x; exit 4", terminal=True
        )
        await until_said(before, session, "up\r\n")
        await before.guest.containers.pause("idle")
        await before.create("waits", sh("echo late"))
        first = Sink()
        following = asyncio.create_task(before.guest.follow_output("writes:", 1, first.delivered, first.take))
        await grows(first)
        first.frozen = True
        shape = source.shape
        spec = rig.spec("destination", shape)
        disks = [disk(lun, path)[1] for lun, path in disks_of(rig.folder, "source", shape)]
        destination = await rig.vmm.start_incoming(replace(spec, disks=(*spec.disks, *disks)))
        try:
            after = Ward(await Guest.connect(destination.agent_socket), ROOT_LUN)
            await move(source, destination)
            following.cancel()
            await before.guest.close()
            await destination.run_vcpus(LICENCE)
            second = Sink(base=first.delivered())
            await after.guest.write_input("writes:", 0, b"moved\n")
            await after.guest.follow_output("writes:", 1, second.delivered, second.take)
            lines = (first.data + second.data).decode().splitlines()
            assert lines == [*(str(number) for number in range(3000)), "moved"]
            assert await after.end("writes") == 6
            await after.guest.containers.resume("idle")
            await after.guest.write_input(session, 0, b"there\n")
            assert (await after.output(session)).split() == ["up", "there", "there"]
            assert (await after.guest.wait_process(session)).code == 4
            assert await after.output(await after.exec("idle", "f", "echo", "again")) == "again\n"
            await after.guest.containers.start("waits")
            assert await after.output("waits:") == "late\n"
            assert await after.end("waits") == 0
            assert await after.said("new", sh("echo new")) == "new\n"
            await after.guest.signal_process("idle:", 15)
            await after.guest.signal_process("idle:", 9)
            assert await after.end("idle") == 137
            await after.guest.close()
        finally:
            await destination.destroy()


def disks_of(folder: Path, name: str, shape) -> list[tuple[int, Path]]:
    """The disks that `ward_of` has plugged in."""
    files = {5: "root.erofs", 6: "folder.erofs", 7: "scratch.ext4", 8: "whole.ext4", 9: "spare.erofs"}
    return [
        (lun, folder / f"{name}-{file}")
        for lun, file in files.items()
        if f"disk{lun}" in {d.id for d in shape.devices}
    ]
