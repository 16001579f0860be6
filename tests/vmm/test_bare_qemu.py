"""The bench's peer really moves a guest, and says what it took."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import _bare_qemu
from sandshift.vmm.machine import RunState
from sandshift.vmm.qemu import QemuVmm
from tests.vmm import guest
from tests.vmm.guest import Talk
from tests.vmm.machine_suite import LICENCE, channel
from tests.vmm.specs import fresh_spec

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing()),
]


async def test_a_bare_move_takes_the_guest_along(tmp_path: Path) -> None:
    psk = bytes(range(32))
    files, vmm = guest.build(), QemuVmm()
    spec = fresh_spec(tmp_path / "source", "source", files.kernel, files.initramfs)
    source = await vmm.start(spec)
    there = fresh_spec(tmp_path / "destination", "destination", files.kernel, files.initramfs, like=spec)
    destination = await vmm.start_incoming(there)
    ends = channel()
    try:
        talk = await Talk.open(source.agent_socket)
        await source.run_vcpus(LICENCE)
        assert await talk.ask("ping") == "pong 1"
        boot_id = await talk.ask("id")
        await source.detach()
        await destination.detach()
        moved = await _bare_qemu.move(spec.run_dir, there.run_dir, ends, psk=psk, downtime_limit_ms=50)
        assert 0 < moved.blackout_ms < moved.total_ms
        assert moved.passes >= 2
        assert moved.bytes_transferred > 1 << 20
        talk = await Talk.open(there.run_dir / "agent")
        assert await talk.ask("ping") == "pong 2"
        assert await talk.ask("id") == boot_id
        await talk.close()
    finally:
        for end in ends:
            end.close()
        for each in (spec, there):
            machine = await vmm.reattach(each)
            assert machine is not None
            state = await machine.run_state()
            await machine.destroy()
            assert state in (RunState.RUNNING, RunState.POSTMIGRATE)
