"""The fake guest's containers, by the suite that the real agent passes (test_containers_vm.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandshift.sandbox.disks import DiskLayer, GuestRootfs
from sandshift.vmm.fake_containers import FakeContainers
from tests.guest.container_suite import *  # noqa: F403
from tests.shim.fake_agent import FakeGuest
from tests.shim.house import FakeHost


@pytest.fixture
def rootfs() -> GuestRootfs:
    return GuestRootfs(layers=(DiskLayer(1, "erofs"),))


@pytest.fixture
def program():
    return lambda *args: {"process": {"args": list(args), "cwd": "/"}}


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[FakeGuest]:
    host = FakeHost(tmp_path, "host")
    await host.start()
    client = await host.client()
    await client.start_sandbox()
    yield host.server.sandbox.guest
    await client.connection.close()
    await host.stop()
    host.process.die()


async def test_a_state_that_moves_is_whole(guest, rootfs, program):
    inside = await guest.inside()
    inside.create("c", b'{"process": {"args": ["count", "10"]}}', rootfs, terminal=False, stdin=False)
    inside.start("c")
    inside.advance(5.0, 5.0)
    inside.acknowledge("c:", 1, 90)
    moved = FakeContainers()
    moved.take_state(inside.state())
    assert moved.state() == inside.state()
    for one in (inside, moved):
        one.advance(1.0, 6.0)
    assert moved.read("c:", 1, 90) == inside.read("c:", 1, 90)
    assert len(moved.read("c:", 1, 90)[0]) == 9 * 50
