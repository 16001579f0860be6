"""What every Machine must do. QEMU and the fake are both put through it, so the fake can be believed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from sandshift.errors import AlreadyThere, Damaged, IllegalMove, NotSupported, Rejected, Unavailable
from sandshift.sandbox.shape import Device
from sandshift.session.right_licence import licence_of
from sandshift.vmm.machine import (
    ChannelSecurity,
    DiskSource,
    Machine,
    MachineEvent,
    MachineSpec,
    MigrationStatus,
    RunState,
    TransferSettings,
    Vmm,
)
from sandshift.vmm.standard import DiskPlan, disk_device, with_disk
from tests.vmm.guest import Talk

LICENCE = licence_of(None)
FAST = TransferSettings(bandwidth_bytes_per_s=0, downtime_limit_ms=50)
CLEAR = ChannelSecurity()
SECRET = ChannelSecurity(psk=bytes(range(32)))
STEP_S = 30.0
"""Bound of each single wait: far above what any takes, so that a hang ends with the name of what was awaited."""


class Rig(Protocol):
    """What a backend gives the suite."""

    vmm: Vmm
    template: Path
    dirty_words: str
    """Makes the guest rewrite so much memory that a slow transfer cannot end."""
    slow: TransferSettings
    """So slow that an idle guest takes many seconds."""

    def another_vmm(self) -> Vmm:
        """As a new shim would make it."""
        ...

    def spec(self, name: str, like: MachineSpec | None = None) -> MachineSpec:
        """A spec with its own run directory: of a new sandbox, or of the same as `like`."""
        ...

    async def kill(self, machine: Machine) -> None:
        """End the VM process from outside."""
        ...

    def freeze(self, machine: Machine) -> None:
        """Make the VM process take nothing in any more."""
        ...


def channel() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


async def until(events: AsyncIterator[MachineEvent], name: str, status: str = "") -> list[MachineEvent]:
    """Read events up to the named one; all that were read, that one included."""
    seen: list[MachineEvent] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STEP_S):
            async for event in events:
                seen.append(event)
                if event.name == name and (not status or event.data.get("status") == status):
                    return seen
    raise AssertionError(f"no {name} {status}; heard {[(event.name, dict(event.data)) for event in seen]}")


def names(events: list[MachineEvent]) -> list[str]:
    return [str(event.data["status"]) if event.name == "MIGRATION" else event.name for event in events]


def extra_disk(folder: Path) -> tuple[Device, DiskSource]:
    path = folder / "extra"
    path.write_bytes(b"extra".ljust(1 << 20, b"\0"))
    return replace(disk_device(9, DiskPlan(1 << 20)), id="disk9"), DiskSource("disk9", path)


async def resumed(machine: Machine) -> None:
    """A source resumes by itself, some before and some after they say that the transfer failed."""
    async with asyncio.timeout(STEP_S):
        while await machine.run_state() is RunState.FINISH_MIGRATE:
            pass
    assert await machine.run_state() is RunState.RUNNING


class Pair:
    """A running guest, a VM that waits for it, and the channel between them."""

    def __init__(self, source: Machine, destination: Machine, talk: Talk | None, spec: MachineSpec) -> None:
        self.source = source
        self.destination = destination
        self.talk = talk
        self.spec = spec
        self.source_end, self.destination_end = channel()
        self.said = source.events()
        self.heard = destination.events()

    async def begin(
        self,
        settings: TransferSettings = FAST,
        security: ChannelSecurity = SECRET,
        other: ChannelSecurity | None = None,
    ) -> None:
        await self.destination.migrate_in(self.destination_end.fileno(), other or security)
        await self.source.migrate_out(self.source_end.fileno(), security, settings)

    async def to_pre_switchover(self, security: ChannelSecurity = SECRET) -> None:
        await self.begin(security=security)
        await until(self.said, "MIGRATION", "pre-switchover")

    async def complete(self) -> None:
        await self.to_pre_switchover()
        await self.source.switch_over()
        await until(self.said, "MIGRATION", "completed")
        await until(self.heard, "MIGRATION", "completed")

    def close(self) -> None:
        self.source_end.close()
        self.destination_end.close()


class MachineSuite:
    """Subclasses give the `rig` fixture."""

    @pytest.fixture
    async def ended(self, rig: Rig) -> AsyncIterator[list[Machine]]:
        """Machines put here are destroyed at the end."""
        machines: list[Machine] = []
        yield machines
        for machine in machines:
            await machine.destroy()

    @pytest.fixture
    def shared_memory(self) -> bool:
        """Whether memory can be hashed; tests that do so say True. It costs."""
        return False

    @pytest.fixture
    async def running(
        self, rig: Rig, ended: list[Machine], shared_memory: bool
    ) -> AsyncIterator[tuple[Machine, Talk, MachineSpec]]:
        spec = rig.spec("source")
        spec = replace(spec, shape=replace(spec.shape, shared_memory=shared_memory))
        machine = await rig.vmm.start_from_template(spec, rig.template)
        ended.append(machine)
        talk = await Talk.open(machine.agent_socket)
        await machine.run_vcpus(LICENCE)
        yield machine, talk, spec
        await talk.close()

    @pytest.fixture
    async def pair(
        self, rig: Rig, ended: list[Machine], running: tuple[Machine, Talk, MachineSpec]
    ) -> AsyncIterator[Pair]:
        source, talk, spec = running
        destination = await rig.vmm.start_incoming(rig.spec("destination", like=spec))
        ended.append(destination)
        pair = Pair(source, destination, talk, spec)
        yield pair
        pair.close()

    # --- start and end

    async def test_a_new_machine_waits_for_its_licence(self, rig: Rig, ended: list[Machine]) -> None:
        machine = await rig.vmm.start(rig.spec("cold"))
        ended.append(machine)
        assert machine.alive
        assert await machine.run_state() is RunState.PRELAUNCH
        with pytest.raises(TypeError, match="start with a Licence"):
            await machine.run_vcpus(object())
        assert await machine.run_state() is RunState.PRELAUNCH

    async def test_vcpus_run_stop_and_run_again(self, running: tuple[Machine, Talk, MachineSpec]) -> None:
        machine, talk, _ = running
        events = machine.events()
        before = await talk.ask("ping")
        await machine.stop_vcpus()
        assert await machine.run_state() is RunState.PAUSED
        talk.tell("ping")
        await machine.run_vcpus(LICENCE)
        assert await machine.run_state() is RunState.RUNNING
        after = await talk.ask("ping")
        assert int(after.split()[1]) > int(before.split()[1])
        assert names(await until(events, "RESUME")) == ["STOP", "RESUME"]

    async def test_to_run_a_running_machine_is_no_error(
        self, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, _, _ = running
        await machine.run_vcpus(LICENCE)
        assert await machine.run_state() is RunState.RUNNING

    async def test_two_clones_of_a_template_go_their_own_ways(
        self, rig: Rig, ended: list[Machine], running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        _, talk, spec = running
        clone = await rig.vmm.start_from_template(rig.spec("clone"), rig.template)
        ended.append(clone)
        assert clone.shape.uuid != spec.shape.uuid
        assert await clone.run_state() is RunState.PAUSED
        other = await Talk.open(clone.agent_socket)
        await clone.run_vcpus(LICENCE)
        first = await other.ask("ping")
        await talk.ask("ping")
        second = await other.ask("ping")
        assert int(second.split()[1]) == int(first.split()[1]) + 1
        await other.close()

    async def test_a_file_that_is_no_template_is_refused_and_leaves_no_process(
        self, rig: Rig, tmp_path: Path
    ) -> None:
        (tmp_path / "rubbish").write_bytes(b"not a guest")
        spec = rig.spec("clone")
        with pytest.raises(Damaged, match=r"sandbox clone could not be loaded from .*rubbish"):
            await rig.vmm.start_from_template(spec, tmp_path / "rubbish")
        assert await rig.vmm.reattach(spec) is None

    async def test_destroy_can_be_repeated_and_ends_everything(self, rig: Rig) -> None:
        spec = rig.spec("short")
        machine = await rig.vmm.start(spec)
        events = machine.events()
        await machine.destroy()
        await machine.destroy()
        assert not machine.alive
        assert await machine.run_state() is RunState.DEAD
        assert names([event async for event in events]) == ["DEAD"]
        assert names([event async for event in machine.events()]) == ["DEAD"]
        with pytest.raises(Unavailable, match="sandbox short: QEMU is gone or hung up during stop"):
            await machine.stop_vcpus()

    async def test_every_listener_hears_everything_and_death_last(
        self, rig: Rig, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, _, _ = running
        one, other = machine.events(), machine.events()
        await machine.stop_vcpus()
        await rig.kill(machine)
        heard = [[event async for event in events] for events in (one, other)]
        assert [names(events) for events in heard] == [["STOP", "DEAD"]] * 2
        assert heard[0][-1].data["returncode"] == -9
        assert not machine.alive

    async def test_a_guest_that_powers_off_ends_its_process(
        self, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, talk, _ = running
        events = machine.events()
        talk.tell("off")
        heard = await until(events, "DEAD")
        assert "SHUTDOWN" in names(heard)
        assert heard[-1].data["returncode"] == 0

    async def test_a_run_directory_holds_one_machine(
        self, rig: Rig, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, _, spec = running
        with pytest.raises(AlreadyThere, match=f"VM process {machine.pid} runs in .* already"):
            await rig.vmm.start(spec)
        assert machine.alive

    # --- moving

    @pytest.mark.parametrize("shared_memory", [True])
    async def test_a_guest_moves_and_waits_to_be_started(self, pair: Pair, shared_memory: bool) -> None:
        before = await pair.talk.ask("ping")
        boot_id = await pair.talk.ask("id")
        await pair.to_pre_switchover()
        assert await pair.source.run_state() is RunState.FINISH_MIGRATE
        assert (await pair.source.migration_info()).status is MigrationStatus.PRE_SWITCHOVER
        await pair.source.switch_over()
        told = names(await until(pair.said, "MIGRATION", "completed"))
        assert told[0] == "device"
        assert set(names(await until(pair.heard, "MIGRATION", "completed"))) <= {
            "setup",
            "active",
            "completed",
        }
        assert await pair.source.run_state() is RunState.POSTMIGRATE
        assert await pair.destination.run_state() is RunState.PAUSED
        assert await pair.source.memory_digest() == await pair.destination.memory_digest()
        talk = await Talk.open(pair.destination.agent_socket)
        await pair.destination.run_vcpus(LICENCE)
        assert int((await talk.ask("ping")).split()[1]) == int(before.split()[1]) + 1
        assert await talk.ask("id") == boot_id
        await talk.close()

    async def test_the_source_counts_what_it_sent(self, pair: Pair) -> None:
        await pair.complete()
        info = await pair.source.migration_info()
        assert info.status is MigrationStatus.COMPLETED
        assert info.total_ms > 0
        assert info.passes >= 2
        assert info.ram_transferred_bytes > 0
        assert info.ram_total_bytes >= pair.source.shape.memory_bytes
        assert info.ram_remaining_bytes == 0

    @pytest.mark.parametrize("shared_memory", [True])
    async def test_memory_is_whole_though_the_guest_writes_all_the_time(
        self, rig: Rig, pair: Pair, shared_memory: bool
    ) -> None:
        assert await pair.talk.ask(rig.dirty_words) == "dirtying"
        await pair.begin(replace(FAST, downtime_limit_ms=500))
        await until(pair.said, "MIGRATION", "pre-switchover")
        before = await pair.source.memory_digest()
        await pair.source.switch_over()
        await until(pair.said, "MIGRATION", "completed")
        await until(pair.heard, "MIGRATION", "completed")
        assert await pair.destination.memory_digest() == before
        assert await pair.source.memory_digest() == before

    async def test_a_move_in_the_clear_works_too(self, pair: Pair) -> None:
        await pair.to_pre_switchover(security=CLEAR)
        await pair.source.switch_over()
        await until(pair.heard, "MIGRATION", "completed")

    async def test_a_guest_that_has_not_arrived_is_not_started(self, pair: Pair) -> None:
        with pytest.raises(IllegalMove, match="sandbox destination: its memory has not arrived"):
            await pair.destination.run_vcpus(LICENCE)
        await pair.complete()
        assert await pair.destination.run_state() is RunState.PAUSED

    async def test_a_guest_that_is_being_sent_is_not_started(self, pair: Pair) -> None:
        await pair.to_pre_switchover()
        with pytest.raises(IllegalMove, match="sandbox source: it is being sent away"):
            await pair.source.run_vcpus(LICENCE)
        assert await pair.source.run_state() is RunState.FINISH_MIGRATE

    async def test_a_stopped_guest_moves_and_one_that_stays_stays_stopped(self, pair: Pair) -> None:
        await pair.source.stop_vcpus()
        await pair.to_pre_switchover()
        await pair.source.cancel_transfer()
        assert await pair.source.run_state() is RunState.PAUSED

    async def test_after_the_move_the_channel_is_the_callers_again(self, pair: Pair) -> None:
        await pair.complete()
        for end in (pair.source_end, pair.destination_end):
            end.settimeout(STEP_S)
        await asyncio.to_thread(pair.source_end.sendall, b"do you have it?")
        assert await asyncio.to_thread(pair.destination_end.recv, 100) == b"do you have it?"
        await asyncio.to_thread(pair.destination_end.sendall, b"I do")
        assert await asyncio.to_thread(pair.source_end.recv, 100) == b"I do"

    async def test_a_slow_transfer_is_tuned_to_its_end(self, rig: Rig, pair: Pair) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        assert (await pair.source.migration_info()).status is MigrationStatus.ACTIVE
        await pair.source.tune(replace(FAST, throttle_percent=40))
        await until(pair.said, "MIGRATION", "pre-switchover")

    async def test_settings_out_of_range_are_refused_by_name(self, pair: Pair) -> None:
        with pytest.raises(Rejected, match="downtime limit of 0 ms: it must be 1 to 2000000"):
            await pair.source.migrate_out(pair.source_end.fileno(), CLEAR, replace(FAST, downtime_limit_ms=0))
        with pytest.raises(Rejected, match="throttle of 120 percent"):
            await pair.source.tune(replace(FAST, throttle_percent=120))
        with pytest.raises(Rejected, match="in a transfer that may not throttle"):
            await pair.source.tune(replace(FAST, throttle_percent=10, throttling=False))

    async def test_memory_that_is_not_shared_is_not_hashed(
        self, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, _, _ = running
        await machine.stop_vcpus()
        with pytest.raises(NotSupported, match="sandbox source: its memory is not shared"):
            await machine.memory_digest()

    @pytest.mark.parametrize("shared_memory", [True])
    async def test_memory_of_a_running_guest_is_not_hashed(
        self, running: tuple[Machine, Talk, MachineSpec], shared_memory: bool
    ) -> None:
        machine, _, _ = running
        with pytest.raises(IllegalMove, match="sandbox source: it is running"):
            await machine.memory_digest()

    # --- disks

    async def test_a_disk_is_plugged_in_moves_along_and_is_taken_out(
        self, rig: Rig, ended: list[Machine], running: tuple[Machine, Talk, MachineSpec], tmp_path: Path
    ) -> None:
        source, talk, spec = running
        device, disk = extra_disk(tmp_path)
        await source.attach_disk(device, disk)
        assert source.shape.devices[-1] == device
        with pytest.raises(AlreadyThere, match="sandbox source: it has a device disk9 already"):
            await source.attach_disk(device, disk)
        there = with_disk(rig.spec("destination", like=spec), device, disk)
        destination = await rig.vmm.start_incoming(there)
        ended.append(destination)
        pair = Pair(source, destination, talk, spec)
        await pair.complete()
        await destination.run_vcpus(LICENCE)
        await destination.detach_disk("disk9")
        await destination.detach_disk("disk9")
        assert destination.shape == spec.shape
        pair.close()

    async def test_a_destination_without_the_disk_is_refused(self, pair: Pair, tmp_path: Path) -> None:
        await pair.source.attach_disk(*extra_disk(tmp_path))
        await pair.begin()
        async with asyncio.timeout(STEP_S):
            async for event in pair.said:
                if event.data.get("status") == "pre-switchover":
                    # QEMU looks at devices last, in the blackout: shapes are to be compared long before.
                    await pair.source.switch_over()
                if event.data.get("status") == "failed":
                    break
        await until(pair.heard, "MIGRATION", "failed")
        await resumed(pair.source)

    async def test_no_disk_is_plugged_in_during_a_transfer(
        self, rig: Rig, pair: Pair, tmp_path: Path
    ) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        with pytest.raises(IllegalMove, match="sandbox source: QEMU refused"):
            await pair.source.attach_disk(*extra_disk(tmp_path))
        assert pair.source.shape == pair.spec.shape

    # --- what goes wrong

    async def test_a_transfer_under_way_is_cancelled_and_the_next_succeeds(
        self, rig: Rig, ended: list[Machine], pair: Pair
    ) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        await pair.source.cancel_transfer()
        assert (await pair.source.migration_info()).status is MigrationStatus.CANCELLED
        assert await pair.source.run_state() is RunState.RUNNING
        assert (await pair.talk.ask("ping")).startswith("pong")
        await until(pair.heard, "MIGRATION", "failed")
        assert await pair.destination.run_state() is RunState.INMIGRATE
        again = await rig.vmm.start_incoming(rig.spec("again", like=pair.spec))
        ended.append(again)
        second = Pair(pair.source, again, pair.talk, pair.spec)
        await second.complete()
        assert await again.run_state() is RunState.PAUSED
        second.close()

    async def test_cancelled_before_the_switchover_the_source_runs_on(self, pair: Pair) -> None:
        await pair.to_pre_switchover()
        await pair.source.cancel_transfer()
        assert await pair.source.run_state() is RunState.RUNNING
        assert (await pair.source.migration_info()).status is MigrationStatus.CANCELLED
        assert (await pair.talk.ask("ping")).startswith("pong")
        await until(pair.heard, "MIGRATION", "failed")

    async def test_to_cancel_what_is_complete_changes_nothing(self, pair: Pair) -> None:
        await pair.complete()
        await pair.source.cancel_transfer()
        await pair.destination.cancel_transfer()
        assert await pair.source.run_state() is RunState.POSTMIGRATE
        assert await pair.destination.run_state() is RunState.PAUSED
        assert (await pair.source.migration_info()).status is MigrationStatus.COMPLETED

    async def test_to_cancel_nothing_changes_nothing(self, pair: Pair) -> None:
        await pair.source.cancel_transfer()
        await pair.destination.cancel_transfer()
        assert await pair.source.run_state() is RunState.RUNNING
        assert await pair.destination.run_state() is RunState.INMIGRATE

    async def test_the_destination_dies_while_memory_flows(self, rig: Rig, pair: Pair) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        await rig.kill(pair.destination)
        await until(pair.said, "MIGRATION", "failed")
        assert (await pair.source.migration_info()).error
        await resumed(pair.source)
        assert (await pair.talk.ask("ping")).startswith("pong")

    async def test_the_destination_dies_before_the_switchover(self, rig: Rig, pair: Pair) -> None:
        await pair.to_pre_switchover()
        await rig.kill(pair.destination)
        await pair.source.switch_over()
        await until(pair.said, "MIGRATION", "failed")
        await resumed(pair.source)
        assert (await pair.talk.ask("ping")).startswith("pong")

    async def test_the_source_dies_while_memory_flows(self, rig: Rig, pair: Pair) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        await rig.kill(pair.source)
        await until(pair.heard, "MIGRATION", "failed")
        assert await pair.destination.run_state() is RunState.INMIGRATE
        assert (await pair.destination.migration_info()).error
        with pytest.raises(IllegalMove):
            await pair.destination.run_vcpus(LICENCE)

    async def test_the_channel_is_cut(self, rig: Rig, pair: Pair) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        pair.source_end.shutdown(socket.SHUT_RDWR)
        await until(pair.said, "MIGRATION", "failed")
        await until(pair.heard, "MIGRATION", "failed")
        await resumed(pair.source)

    async def test_a_destination_that_takes_nothing_in_is_cancelled(self, rig: Rig, pair: Pair) -> None:
        await pair.begin(rig.slow)
        await until(pair.said, "MIGRATION", "active")
        rig.freeze(pair.destination)
        await pair.source.tune(FAST)
        await pair.source.cancel_transfer()
        assert await pair.source.run_state() is RunState.RUNNING
        assert (await pair.source.migration_info()).status is MigrationStatus.CANCELLED

    async def test_another_key_is_refused_on_both_sides(self, pair: Pair) -> None:
        await pair.begin(security=SECRET, other=ChannelSecurity(psk=bytes(32)))
        await until(pair.heard, "MIGRATION", "failed")
        await until(pair.said, "MIGRATION", "failed")
        await resumed(pair.source)
        assert await pair.destination.run_state() is RunState.INMIGRATE

    async def test_noise_is_refused_though_copies_of_the_channel_are_kept(self, pair: Pair) -> None:
        """The VM process does not let go of its copies, so their absence is not what tells."""
        await pair.destination.keep_channel(pair.destination_end.fileno())
        await pair.destination.migrate_in(pair.destination_end.fileno(), SECRET)
        pair.source_end.sendall(b"no stream of a guest's memory" * 1000)
        await until(pair.heard, "MIGRATION", "failed")
        assert await pair.destination.run_state() is RunState.INMIGRATE

    async def test_another_machine_is_refused(self, rig: Rig, ended: list[Machine], pair: Pair) -> None:
        stranger = await rig.vmm.start_incoming(rig.spec("stranger"))
        ended.append(stranger)
        wrong = Pair(pair.source, stranger, pair.talk, pair.spec)
        await wrong.begin()
        await until(wrong.heard, "MIGRATION", "failed")
        await until(wrong.said, "MIGRATION", "failed")
        assert pair.spec.shape.uuid in (await stranger.migration_info()).error
        assert await pair.source.run_state() is RunState.RUNNING
        wrong.close()

    async def test_after_completion_the_source_can_be_the_one_that_goes_on(self, pair: Pair) -> None:
        before = await pair.talk.ask("ping")
        await pair.complete()
        await pair.destination.destroy()
        await pair.source.run_vcpus(LICENCE)
        assert await pair.source.run_state() is RunState.RUNNING
        assert int((await pair.talk.ask("ping")).split()[1]) == int(before.split()[1]) + 1

    # --- a shim goes and another comes

    async def test_a_new_shim_finds_the_machine_as_it_is(
        self, rig: Rig, ended: list[Machine], running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, talk, spec = running
        events = machine.events()
        await machine.detach()
        await machine.detach()
        assert [event async for event in events] == []
        found = await rig.another_vmm().reattach(spec)
        assert found is not None
        ended.append(found)
        assert found.pid == machine.pid
        assert await found.run_state() is RunState.RUNNING
        said = found.events()
        await found.stop_vcpus()
        assert names(await until(said, "STOP")) == ["STOP"]
        await found.run_vcpus(LICENCE)
        assert (await talk.ask("ping")).startswith("pong")
        await found.destroy()
        assert await rig.another_vmm().reattach(spec) is None

    async def test_a_new_shim_on_the_source_ends_the_move(
        self, rig: Rig, ended: list[Machine], pair: Pair
    ) -> None:
        await pair.to_pre_switchover()
        await pair.source.detach()
        found = await rig.another_vmm().reattach(pair.spec)
        assert found is not None
        ended.append(found)
        assert await found.run_state() is RunState.FINISH_MIGRATE
        await found.cancel_transfer()
        assert await found.run_state() is RunState.RUNNING

    async def test_a_new_shim_on_the_destination_can_start_what_arrived(
        self, rig: Rig, ended: list[Machine], pair: Pair
    ) -> None:
        await pair.complete()
        await pair.destination.detach()
        found = await rig.another_vmm().reattach(rig.spec("destination", like=pair.spec))
        assert found is not None
        ended.append(found)
        assert (await found.migration_info()).status is MigrationStatus.COMPLETED
        await found.run_vcpus(LICENCE)
        assert await found.run_state() is RunState.RUNNING

    async def test_where_nothing_ran_nothing_is_found(self, rig: Rig) -> None:
        assert await rig.vmm.reattach(rig.spec("nobody")) is None

    async def test_a_kept_channel_stays_open_until_it_is_dropped(
        self, running: tuple[Machine, Talk, MachineSpec]
    ) -> None:
        machine, _, _ = running
        ours, theirs = channel()
        theirs.settimeout(STEP_S)
        await machine.keep_channel(ours.fileno())
        await machine.keep_channel(ours.fileno())
        ours.close()
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        theirs.settimeout(STEP_S)
        await machine.drop_channel()
        await machine.drop_channel()
        assert await asyncio.to_thread(theirs.recv, 1) == b""
        theirs.close()

    async def test_the_callers_own_descriptor_is_left_to_it(self, pair: Pair) -> None:
        await pair.complete()
        assert os.fstat(pair.source_end.fileno())
        assert os.fstat(pair.destination_end.fileno())
