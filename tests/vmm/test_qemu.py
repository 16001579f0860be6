from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandshift.vmm.machine import Machine, MachineSpec, TransferSettings
from sandshift.vmm.qemu import QemuVmm
from tests.vmm import guest
from tests.vmm.guest import Talk
from tests.vmm.machine_suite import LICENCE, MachineSuite
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
