from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandshift.errors import IllegalMove, Rejected, Unavailable
from sandshift.vmm.command import drive
from sandshift.vmm.machine import DiskSource, Machine, MachineSpec, TransferSettings
from sandshift.vmm.qemu import QemuVmm
from sandshift.vmm.standard import with_disk
from tests.vmm import guest
from tests.vmm.guest import Talk
from tests.vmm.machine_suite import LICENCE, SECRET, MachineSuite, Pair, channel, extra_disk, until
from tests.vmm.specs import fresh_spec

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing()),
]


class QemuRig:
    dirty_words = "dirty 20"
    slow = TransferSettings(bandwidth_bytes_per_s=2 << 20, downtime_limit_ms=1)

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        self.vmm = QemuVmm()
        self.template = template
        self.files = guest.build()

    def another_vmm(self) -> QemuVmm:
        return QemuVmm()

    def spec(self, name: str, like: MachineSpec | None = None) -> MachineSpec:
        files = self.files
        return fresh_spec(self.folder / name, name, files.kernel, files.initramfs, like=like, disk=files.disk)

    async def kill(self, machine: Machine) -> None:
        os.kill(machine.pid, signal.SIGKILL)

    def freeze(self, machine: Machine) -> None:
        os.kill(machine.pid, signal.SIGSTOP)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sandshift-vmm-") as path:
        yield Path(path)


@pytest.fixture
async def rig(folder: Path, tmp_path: Path) -> QemuRig:
    """The template is booted once for all tests of this file."""
    template = folder / "template"
    rig = QemuRig(tmp_path, template)
    if not template.exists():
        machine = await rig.vmm.start(rig.spec("first"))
        try:
            talk = await Talk.open(machine.agent_socket)
            await machine.run_vcpus(LICENCE)
            assert await talk.ask("ping") == "pong 1"
            await talk.close()
            await machine.save(template)
        finally:
            await machine.destroy()
    return rig


class TestQemuMachine(MachineSuite):
    """The same as the fake."""

    async def test_the_guest_reads_a_disk_that_was_plugged_in(self, rig: QemuRig, tmp_path: Path) -> None:
        device, source = extra_disk(tmp_path)
        machine = await rig.vmm.start_from_template(rig.spec("plugged"), rig.template)
        try:
            talk = await Talk.open(machine.agent_socket)
            await machine.run_vcpus(LICENCE)
            wanted = rig.files.sha256(rig.files.disk)
            assert await talk.ask("disk sda") == wanted
            await machine.attach_disk(device, source)
            wanted = rig.files.sha256(source.path)
            async with asyncio.timeout(20):
                while await talk.ask("disk sdb") != wanted:
                    pass
            await talk.close()
        finally:
            await machine.destroy()

    async def test_a_disk_that_cannot_be_opened_leaves_nothing_behind(
        self, rig: QemuRig, tmp_path: Path
    ) -> None:
        device, source = extra_disk(tmp_path)
        machine = await rig.vmm.start(rig.spec("plugged"))
        try:
            with pytest.raises(IllegalMove, match=r"refused to open disk disk9: Could not open '.*/missing'"):
                await machine.attach_disk(device, DiskSource("disk9", tmp_path / "missing"))
            with pytest.raises(IllegalMove, match="refused to plug in disk disk9"):
                await machine.attach_disk(replace(device, bus="nowhere.0"), source)
            await machine.attach_disk(device, source)
        finally:
            await machine.destroy()

    async def test_a_disk_that_never_came_to_be_plugged_in_is_taken_out_without_a_word(
        self, rig: QemuRig, tmp_path: Path
    ) -> None:
        """A shim that was killed between its books and QEMU's answer: the next one knows a disk that QEMU has half, or not."""
        device, source = extra_disk(tmp_path)
        half = replace(device, id="disk8", address="0:0:8")
        machine = await rig.vmm.start(rig.spec("plugged"))

        async def nodes() -> set[str]:
            found = await machine._control.qmp.execute("query-named-block-nodes", {"flat": True})
            return {node["node-name"] for node in found}

        try:
            before = await nodes()
            await machine._control.do("open", "blockdev-add", drive(half, source.path))
            assert await nodes() > before
            for one in (device, half):
                machine._spec = with_disk(machine._spec, one, DiskSource(one.id, source.path))
                await machine.detach_disk(one.id)
                assert f"{one.id}-node" not in await nodes()
                await machine.attach_disk(one, DiskSource(one.id, source.path))
                assert f"{one.id}-node" in await nodes()
                await machine.detach_disk(one.id)
            assert await nodes() == before
        finally:
            await machine.destroy()

    async def test_what_qemu_says_against_a_start_is_told(self, rig: QemuRig, tmp_path: Path) -> None:
        spec = rig.spec("wrong")
        with pytest.raises(Rejected, match=r"sandbox wrong: QEMU does not start: .*unsupported machine type"):
            await rig.vmm.start(replace(spec, shape=replace(spec.shape, machine_type="pc-q35-99.0")))
        with pytest.raises(Rejected, match=r"kernel .*/missing cannot be read: build the guest image first"):
            await rig.vmm.start(replace(spec, kernel=tmp_path / "missing"))
        with pytest.raises(Rejected, match="there is no tap nosuchtap in this network namespace"):
            await rig.vmm.start(replace(spec, taps={"net0": "nosuchtap"}))
        assert await rig.vmm.reattach(spec) is None

    async def test_keys_do_not_stay_on_disk(self, rig: QemuRig) -> None:
        spec = rig.spec("keys")
        machine = await rig.vmm.start_incoming(spec)
        try:
            ours, theirs = channel()
            await machine.migrate_in(ours.fileno(), SECRET)
            assert (spec.run_dir / "keys/keys.psk").exists()
            events = machine.events()
            theirs.close()
            await until(events, "MIGRATION", "failed")
            assert not (spec.run_dir / "keys").exists()
            ours.close()
        finally:
            await machine.destroy()

    async def test_a_hung_qemu_is_unavailable_and_named(self, rig: QemuRig) -> None:
        spec = rig.spec("hung")
        machine = await QemuVmm(command_s=0.3).start(spec)
        try:
            rig.freeze(machine)
            with pytest.raises(
                Unavailable, match=r"sandbox hung: QEMU did not answer query-status within 0\.3 s"
            ):
                await machine.run_state()
            assert machine.alive
        finally:
            await machine.destroy()
        assert not machine.alive

    async def test_a_guest_that_panics_ends_its_process_too(self, rig: QemuRig) -> None:
        machine = await rig.vmm.start_from_template(rig.spec("panic"), rig.template)
        try:
            talk = await Talk.open(machine.agent_socket)
            await machine.run_vcpus(LICENCE)
            events = machine.events()
            talk.tell("crash")
            heard = await until(events, "DEAD")
            assert [event.data["reason"] for event in heard if event.name == "SHUTDOWN"] == ["guest-reset"]
        finally:
            await machine.destroy()

    async def test_a_throttle_comes_into_force_while_memory_flows(self, rig: QemuRig) -> None:
        spec = rig.spec("busy")
        source = await rig.vmm.start_from_template(spec, rig.template)
        destination = await rig.vmm.start_incoming(rig.spec("there", like=spec))
        talk = await Talk.open(source.agent_socket)
        pair = Pair(source, destination, talk, spec)
        try:
            await source.run_vcpus(LICENCE)
            assert await talk.ask("dirty 30") == "dirtying"
            slow = TransferSettings(bandwidth_bytes_per_s=40 << 20, downtime_limit_ms=1)
            await pair.begin(slow)
            await until(pair.said, "MIGRATION_PASS")
            await source.tune(replace(slow, throttle_percent=70))
            async with asyncio.timeout(40):
                while (info := await source.migration_info()).throttle_percent != 70:
                    assert info.throttle_percent in (0, 1)
                    await until(pair.said, "MIGRATION_PASS")
            await source.cancel_transfer()
            assert (await talk.ask("ping")).startswith("pong")
        finally:
            await source.destroy()
            await destination.destroy()
            pair.close()
