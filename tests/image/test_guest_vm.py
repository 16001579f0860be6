"""The built image in real VMs: its agent, its clones, a move in the middle of output. All from one template."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.guest.client import Guest
from sandshift.image.template import TemplateStore, key_of
from sandshift.vmm.machine import ChannelSecurity, MigrationStatus, TransferSettings
from tests.agent.house import Sink
from tests.image import rig as rigs
from tests.image.rig import Rig
from tests.vmm.machine_suite import LICENCE

pytestmark = [pytest.mark.asyncio(loop_scope="module"), *rigs.needs_vm]


@pytest.fixture(scope="module")
def rig():
    with tempfile.TemporaryDirectory(prefix="sandshift-image-") as folder:
        yield Rig(rigs.image(), Path(folder))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def template(rig: Rig) -> Path:
    store = TemplateStore(rigs.CACHE)
    return await store.ensure(key_of(rig.image, rigs.shape(rig.image)), rig.save_template)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(rig: Rig, template: Path) -> AsyncIterator[Guest]:
    async with rig.clone("shared", template) as (_, connected):
        yield connected


async def said(guest: Guest, process_id: str, *args: str) -> str:
    await guest.start_process(process_id, args)
    text = await output_of(guest, process_id)
    await guest.wait_process(process_id)
    await guest.forget_process(process_id)
    return text


async def output_of(guest: Guest, process_id: str, stream: int = 1) -> str:
    sink = Sink()
    await guest.follow_output(process_id, stream, sink.delivered, sink.take)
    return sink.data.decode()


async def test_the_agent_answers_and_knows_where_it_is(rig, guest):
    told = await guest.info()
    assert told.kernel_release == rig.image.description.kernel_release
    assert told.agent_version == rig.image.description.agent_version
    assert told.hostname == "shared"
    assert len(told.machine_id) == 32
    assert rigs.MEMORY_BYTES * 0.8 < told.memory_total_bytes < rigs.MEMORY_BYTES
    assert abs(told.realtime_ns - time.time_ns()) < 2e9
    assert told.boot_id == (await said(guest, "id", "cat", "/proc/sys/kernel/random/boot_id")).strip()


async def test_two_clones_of_one_template_share_no_secret(rig, guest, template):
    async with rig.clone("other", template) as (_, other):
        seen = []
        for one in (guest, other):
            told = await one.info()
            random = await said(
                one, "random", "sh", "-c", "head -c 32 /dev/urandom | sha256sum; mktemp -u; hostname"
            )
            seen.append((told.boot_id, told.machine_id, *random.split()))
        assert not set(seen[0]) & set(seen[1]) - {"-"}


async def test_the_root_is_ours_and_can_be_written_to(guest):
    text = await said(
        guest, "root", "sh", "-c", "echo x > /usr/new && cat /usr/new && ls / | tr '\\n' ' ' && runc -v"
    )
    assert text.startswith("x\n")
    assert "opt proc root run sbin sys tmp usr var" in text
    assert "runc version" in text
    mounts = await said(guest, "mounts", "cat", "/proc/mounts")
    for place in ("/dev/pts devpts", "/dev/shm tmpfs", "/run tmpfs", "/tmp tmpfs", "/sys/fs/cgroup cgroup2"):
        assert place in mounts


async def test_process_1_leaves_no_zombies(guest):
    await said(
        guest, "orphans", "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.0$i &) ; done; (sh -c 'exit 3' &)"
    )
    for _ in range(100):
        processes = await said(guest, "ps", "ps", "-o", "stat,comm")
        zombies = [line for line in processes.splitlines() if line.startswith("Z")]
        if "sleep" not in processes and not zombies:  # Each is one for the moment until it is waited for.
            break
    assert "sleep" not in processes
    assert not zombies


async def test_a_guest_that_stood_still_gets_the_right_time_back(rig, guest, template):
    async with rig.clone("late", template) as (machine, late):
        uptime_ns = (await late.info()).uptime_ns
        await machine.stop_vcpus()
        await asyncio.sleep(1.0)  # the pause itself is what is measured, nothing is waited for
        await machine.run_vcpus(LICENCE)
        behind_ns = -await late.set_clock()
        assert 0.9e9 < behind_ns < 5e9
        assert abs((await late.info()).realtime_ns - time.time_ns()) < 1e9
        assert (await late.info()).uptime_ns > uptime_ns


NOISE = ["sh", "-c", "head -c 12000000 /dev/urandom | tee /tmp/noise; sha256sum /tmp/noise >&2; exit 4"]


async def test_a_move_in_the_middle_of_output_loses_and_repeats_nothing(rig, template):
    """As two shims do it, with two QEMUs: freeze the sink, move, connect before the vCPUs run, go on at the offset."""
    async with rig.clone("source", template) as (source, before):
        told = await before.info()
        await before.start_process("noise", NOISE)
        await before.start_process("cat", ["cat"], stdin=True)
        await before.write_input("cat", 0, b"before ")
        source_sink = Sink()
        following = asyncio.create_task(
            before.follow_output("noise", 1, source_sink.delivered, source_sink.take)
        )
        while len(source_sink.data) < 1_000_000:
            await asyncio.sleep(0.002)
        source_sink.frozen = True
        while await written(before, "noise") < source_sink.delivered() + 1_000_000:
            await asyncio.sleep(0.01)
        destination = await rig.vmm.start_incoming(rig.spec("destination", source.shape))
        try:
            after = await Guest.connect(destination.agent_socket)
            await move(source, destination)
            following.cancel()
            await before.close()
            await destination.run_vcpus(LICENCE)
            sink = Sink(base=source_sink.delivered())
            await after.follow_output("noise", 1, sink.delivered, sink.take)
            assert (await after.wait_process("noise")).code == 4
            digest = await output_of(after, "noise", 2)
            assert hashlib.sha256(source_sink.data + sink.data).hexdigest() == digest.split()[0]
            assert await after.write_input("cat", 0, b"before after", eof=True) == 12
            assert await output_of(after, "cat") == "before after"
            moved = await after.info()
            assert (moved.boot_id, moved.machine_id) == (told.boot_id, told.machine_id)
            assert moved.uptime_ns > told.uptime_ns
            await after.close()
        finally:
            await destination.destroy()


async def written(guest: Guest, process_id: str) -> int:
    return next(one.stdout_offset for one in await guest.list_processes() if one.process_id == process_id)


async def move(source, destination) -> None:
    settings = TransferSettings(bandwidth_bytes_per_s=0, downtime_limit_ms=50)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        events = source.events()
        await destination.migrate_in(theirs.fileno(), ChannelSecurity())
        await source.migrate_out(ours.fileno(), ChannelSecurity(), settings)
        async for event in events:
            if event.name == "MIGRATION" and event.data["status"] == "pre-switchover":
                await source.switch_over()
            if event.name == "MIGRATION" and event.data["status"] in ("completed", "failed"):
                break
        assert (await source.migration_info()).status is MigrationStatus.COMPLETED
        while (await destination.migration_info()).status is not MigrationStatus.COMPLETED:
            await asyncio.sleep(0.005)


async def test_power_off_ends_the_vm(rig, template):
    async with rig.clone("ends", template) as (machine, ending):
        events = machine.events()
        await ending.power_off()
        async for event in events:
            if event.name == "DEAD":
                break
        assert not machine.alive
