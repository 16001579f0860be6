from __future__ import annotations

from pathlib import Path

import pytest

from sandshift.vmm.fake import FakeMachine, FakeVmm
from sandshift.vmm.machine import Machine, MachineSpec, TransferSettings
from tests.vmm.machine_suite import LICENCE, MachineSuite
from tests.vmm.specs import fresh_spec


class FakeRig:
    dirty_words = "dirty 200"
    slow = TransferSettings(bandwidth_bytes_per_s=32 << 10, downtime_limit_ms=1)

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


@pytest.fixture
async def rig(tmp_path: Path) -> FakeRig:
    rig = FakeRig(tmp_path)
    first = await rig.vmm.start(rig.spec("first"))
    await first.run_vcpus(LICENCE)
    for page in range(64):
        first.process.guest.write(page, page.to_bytes(16, "big"))
    await first.save(rig.template)
    await first.destroy()
    return rig


class TestFakeMachine(MachineSuite):
    """The same as QEMU."""
