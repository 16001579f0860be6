"""As many disks as a pod may have, in a real VM."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from string import ascii_lowercase

import pytest

from sandshift.errors import NoRoom
from sandshift.rootfs.plan import DiskFile
from sandshift.vmm.qemu import QemuVmm
from tests.shim.test_disks import Owner
from tests.vmm import guest
from tests.vmm.guest import Talk
from tests.vmm.machine_suite import LICENCE
from tests.vmm.specs import fresh_spec

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing()),
]


def layer(folder: Path, number: int) -> DiskFile:
    path = folder / f"layer-{number}"
    path.write_bytes(hashlib.shake_128(str(number).encode()).digest(4096))
    return DiskFile(
        path, "erofs", 4096, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}", read_only=True
    )


def name(number: int) -> str:
    """What Linux calls the disk that it found as this one, from 0."""
    first, second = divmod(number, len(ascii_lowercase))
    return f"sd{ascii_lowercase[first - 1] if first else ''}{ascii_lowercase[second]}"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[tuple[Owner, Talk]]:
    files = await asyncio.to_thread(guest.build)
    spec = fresh_spec(tmp_path / "vm", "disks", files.kernel, files.initramfs)
    machine = await QemuVmm().start(spec)
    try:
        talk = await Talk.open(machine.agent_socket)
        await machine.run_vcpus(LICENCE)
        assert await talk.ask("ping") == "pong 1"
        yield Owner(machine, spec), talk  # type: ignore[arg-type]
        await talk.close()
    finally:
        await machine.destroy()


async def seen(talk: Talk, number: int, file: DiskFile) -> None:
    async with asyncio.timeout(30):
        while f"sha256:{await talk.ask(f'disk {name(number)}')}" != file.digest:
            pass


async def test_the_guest_reads_each_disk_right_and_not_the_one_that_was_taken_out(
    running: tuple[Owner, Talk], tmp_path: Path
) -> None:
    owner, talk = running
    for number in range(3):
        file = layer(tmp_path, number)
        assert (await owner.disks.attach(f"c{number}", file)).lun == number + 1
        await seen(talk, number, file)
    await owner.disks.release("c1")
    assert owner.in_the_vm() == ["disk1", "disk3"]
    other = layer(tmp_path, 7)
    assert (await owner.disks.attach("c7", other)).lun == 2
    await seen(talk, 1, other)


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_a_pod_has_room_for_128_disks_and_each_is_there_soon(
    running: tuple[Owner, Talk], tmp_path: Path
) -> None:
    owner, talk = running
    took_ms, there_ms = [], []
    for number in range(128):
        file = layer(tmp_path, number)
        began = time.monotonic()
        await owner.disks.attach(f"c{number % 7}", file)
        took_ms.append((time.monotonic() - began) * 1000)
        await seen(talk, number, file)
        there_ms.append((time.monotonic() - began) * 1000)
    print(
        f"plugged in: {median(took_ms):.1f} ms, read by the guest: {median(there_ms):.1f} ms "
        f"(of the first 32 {median(there_ms[:32]):.1f}, of the last {median(there_ms[-32:]):.1f}); medians"
    )
    assert median(took_ms) < 200
    with pytest.raises(NoRoom, match="has 128 disks: at most that many are allowed"):
        await owner.disks.attach("c0", layer(tmp_path, 128))
    for number in range(128):
        await seen(talk, number, layer(tmp_path, number))
    for holder in range(7):
        await owner.disks.release(f"c{holder}")
    assert owner.in_the_vm() == []
