from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from pathlib import Path

import pytest

from sandshift.errors import IllegalMove, Unavailable
from sandshift.vmm.fake import FakeMachine, FakeVmm
from sandshift.vmm.machine import Machine, MachineSpec, MigrationStatus, RunState, TransferSettings
from tests.vmm.machine_suite import LICENCE, MachineSuite, Pair, until
from tests.vmm.specs import fresh_spec


class FakeRig:
    dirty_words = "dirty 200"
    slow = TransferSettings(bandwidth_bytes_per_s=128 << 10, downtime_limit_ms=1)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vmm = FakeVmm()
        self.template = folder / "template"

    def another_vmm(self) -> FakeVmm:
        return FakeVmm(self.vmm.world)

    def spec(self, name: str, like: MachineSpec | None = None) -> MachineSpec:
        return fresh_spec(self.folder / name, name, Path("kernel"), Path("initramfs"), like=like)

    async def kill(self, machine: Machine) -> None:
        assert isinstance(machine, FakeMachine)
        machine.process.die()

    def freeze(self, machine: Machine) -> None:
        assert isinstance(machine, FakeMachine)
        machine.faults.stall = True


async def made(folder: Path) -> FakeRig:
    """With a template of a guest that has 64 pages."""
    rig = FakeRig(folder)
    first = await rig.vmm.start(rig.spec("first"))
    await first.run_vcpus(LICENCE)
    for page in range(64):
        first.process.guest.write(page, page.to_bytes(16, "big"))
    await first.save(rig.template)
    await first.destroy()
    return rig


@pytest.fixture
async def rig(tmp_path: Path) -> FakeRig:
    return await made(tmp_path)


class TestFakeMachine(MachineSuite):
    """The same as QEMU."""


class JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: where the loop would wait for a timer, time jumps there."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now_s += timeout
        return ready if ready or timeout is not None else super().select(None)


def in_virtual_time(main: Coroutine[object, object, float]) -> float:
    selector = JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def test_its_time_is_the_loops_so_that_a_long_transfer_is_simulated_in_no_time(tmp_path: Path) -> None:
    async def move() -> float:
        rig = await made(tmp_path)
        spec = rig.spec("source")
        source = await rig.vmm.start_from_template(spec, rig.template)
        destination = await rig.vmm.start_incoming(rig.spec("destination", like=spec))
        await source.run_vcpus(LICENCE)
        pair = Pair(source, destination, None, spec)
        began_s = asyncio.get_running_loop().time()
        await pair.begin(TransferSettings(bandwidth_bytes_per_s=1 << 10, downtime_limit_ms=1))
        async for event in pair.said:
            if event.data.get("status") == "pre-switchover":
                await source.switch_over()
            if event.data.get("status") == "completed":
                break
        pair.close()
        return asyncio.get_running_loop().time() - began_s

    began_s = time.monotonic()
    assert in_virtual_time(move()) == pytest.approx(64 * 4096 / 1024, abs=1.0)
    assert time.monotonic() - began_s < 10


async def started(rig: FakeRig, name: str) -> FakeMachine:
    machine = await rig.vmm.start_from_template(rig.spec(name), rig.template)
    await machine.run_vcpus(LICENCE)
    return machine


async def test_the_log_counts_who_ran(rig: FakeRig) -> None:
    machine = await started(rig, "one")
    uuid, log = machine.shape.uuid, rig.vmm.world.log
    assert log.runners(uuid) == {"one"}
    twin = await rig.vmm.start(rig.spec("two", like=machine.process.spec))
    await twin.run_vcpus(LICENCE)
    assert log.runners(uuid) == {"one", "two"}
    machine.process.die()
    assert log.runners(uuid) == {"two"}
    assert log.most_at_once(uuid) == 2


async def test_a_start_that_is_refused_has_not_run(rig: FakeRig) -> None:
    machine = await rig.vmm.start_from_template(rig.spec("one"), rig.template)
    machine.faults.refuse_start = 'Failed to get "write" lock'
    with pytest.raises(IllegalMove, match='sandbox one: QEMU refused to start: Failed to get "write" lock'):
        await machine.run_vcpus(LICENCE)
    assert rig.vmm.world.log.runners(machine.shape.uuid) == frozenset()
    machine.faults.refuse_start = ""
    await machine.run_vcpus(LICENCE)
    assert rig.vmm.world.log.runners(machine.shape.uuid) == {"one"}


def test_a_machine_that_hangs_answers_nothing_and_lives(tmp_path: Path) -> None:
    async def hang() -> float:
        machine = await started(await made(tmp_path), "one")
        machine.faults.hang = True
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="sandbox one: QEMU did not answer stop within 10 s"):
            await machine.stop_vcpus()
        assert machine.alive
        return asyncio.get_running_loop().time() - began_s

    assert in_virtual_time(hang()) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("side", "words"), [("fail_out", "no more"), ("fail_in", "no room"), ("refuse_out", "busy")]
)
async def test_transfers_fail_on_demand_and_the_source_runs_on(rig: FakeRig, side: str, words: str) -> None:
    source = await started(rig, "source")
    destination = await rig.vmm.start_incoming(rig.spec("destination", like=source.process.spec))
    setattr(destination.faults if side == "fail_in" else source.faults, side, words)
    pair = Pair(source, destination, None, source.process.spec)
    if side == "refuse_out":
        with pytest.raises(IllegalMove, match="QEMU refused to send the guest: busy"):
            await pair.begin()
        pair.close()
        return
    await pair.begin()
    async for event in pair.said:
        if event.data.get("status") == "pre-switchover":
            await source.switch_over()
        if event.data.get("status") == "failed":
            break
    assert words in (await source.migration_info()).error
    assert await source.run_state() is RunState.RUNNING
    assert await destination.run_state() is RunState.INMIGRATE
    pair.close()


async def test_a_stalled_transfer_goes_on_when_it_may(rig: FakeRig) -> None:
    source = await started(rig, "source")
    destination = await rig.vmm.start_incoming(rig.spec("destination", like=source.process.spec))
    source.faults.stall = True
    pair = Pair(source, destination, None, source.process.spec)
    await pair.begin()
    await until(pair.said, "MIGRATION", "active")
    assert (await source.migration_info()).ram_transferred_bytes == 0
    source.faults.stall = False
    await until(pair.said, "MIGRATION", "pre-switchover")
    assert (await source.migration_info()).ram_transferred_bytes >= 64 * 4096
    pair.close()


async def test_a_guest_that_writes_faster_than_the_channel_never_ends(rig: FakeRig) -> None:
    source = await started(rig, "source")
    destination = await rig.vmm.start_incoming(rig.spec("destination", like=source.process.spec))
    source.process.look().pages_per_s = 10_000.0
    pair = Pair(source, destination, None, source.process.spec)
    await pair.begin(TransferSettings(bandwidth_bytes_per_s=8 << 20, downtime_limit_ms=1))
    for _ in range(5):
        await until(pair.said, "MIGRATION_PASS")
    assert (await source.migration_info()).status is MigrationStatus.ACTIVE
    assert (await source.migration_info()).dirty_bytes_per_s == 10_000 * 4096
    await source.tune(TransferSettings(bandwidth_bytes_per_s=8 << 20, downtime_limit_ms=1000))
    await until(pair.said, "MIGRATION", "pre-switchover")
    pair.close()
