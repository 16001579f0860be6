"""The real agent's containers in a real VM, by the suite that the fake guest passes (test_fake_containers.py)."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from sandshift.guest.client import Guest
from sandshift.sandbox.disks import GuestRootfs
from sandshift.sandbox.oci import PodShare, guest_spec
from tests.agent.container_rig import Ward, needs_busybox, sh, ward_of
from tests.guest.container_suite import *  # noqa: F403
from tests.image import rig as rigs
from tests.image.rig import Rig

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    needs_busybox,
    *rigs.needs_vm,
]
FLOOD = "n=0; while :; do seq -w $n $((n + 9999)); n=$((n + 10000)); done"
SCRIPTS = {"say": "echo {0}", "exit": "exit {0}", "wait": "sleep 1000", "cat": "exec cat", "flood": FLOOD}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def ward() -> AsyncIterator[Ward]:
    with tempfile.TemporaryDirectory(prefix="sandshift-suite-") as folder:
        async with ward_of(Rig(rigs.image(), Path(folder)), "suite") as (_machine, made):
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def guest(ward: Ward) -> AsyncIterator[Guest]:
    yield ward.guest
    await ward.clear()


@pytest.fixture
def rootfs(ward: Ward) -> GuestRootfs:
    return ward.rootfs


@pytest.fixture
def program():
    def made(name: str, *args: str) -> dict:
        return msgspec.json.decode(
            guest_spec(sh(SCRIPTS[name].replace("{0}", "".join(args))), pod=PodShare())
        )

    return made
