"""The demo with real VMs: a whole run is proven, and each kind of harm takes the proof away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sandshift.cli.demo.command import demo
from sandshift.cli.demo.lab import LABS_FOLDER, leftovers
from sandshift.cli.demo.scenario import Demo
from sandshift.cli.demo.settings import Settings
from sandshift.cli.demo.show import Lines
from sandshift.cli.demo.topology import NAMESPACE_PREFIX
from sandshift.fleet import saga
from sandshift.fleet.calls import Calls
from sandshift.fleet.result import MigrationResult
from sandshift.fleet.saga import Outcome
from sandshift.session.ids import Side
from tests.demo.guest_memory import alter_page
from tests.demo.old_qemu import unpacked_qemu_72
from tests.demo.test_proof import ISSUE_KEYS
from tests.needs import needs_root

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    needs_root,
]

WARM_S_MAX = 60.0
"""With the machine to itself: 16 s on two cores."""


def left_of_demos() -> set[str]:
    """Folders and namespaces of labs on this machine whose maker is gone: others may be at work beside us."""
    folders = (
        {path.name for path in LABS_FOLDER.iterdir() if path.is_dir()} if LABS_FOLDER.exists() else set()
    )
    dead = {path.name for path in leftovers(LABS_FOLDER)} if folders else set()
    alive = folders - dead
    namespaces = {path.name for path in Path("/run/netns").glob(f"{NAMESPACE_PREFIX}*")}
    return dead | {name for name in namespaces if name.split("-")[1] not in alive}


async def run(settings: Settings, kind: type[Demo] = Demo) -> dict:
    figures = await kind(settings, Lines()).run()
    print(json.dumps(figures))
    return figures


async def test_a_whole_demo_is_proven_within_a_minute_and_leaves_nothing():
    before = left_of_demos()
    await Demo(Settings(), Lines()).prepare_image()
    shared = os.getloadavg()[0] > (os.cpu_count() or 1)
    began_s = time.monotonic()
    figures = await run(Settings())
    assert figures["reasons"] == []
    assert figures["ok"] is True
    assert set(figures) >= ISSUE_KEYS
    assert figures["control_capture"]["pattern_blocks"] > 0
    assert shared or time.monotonic() - began_s < WARM_S_MAX
    assert left_of_demos() <= before


async def test_one_page_altered_on_the_paused_destination_is_found(monkeypatch):
    settings = Settings(control=False)
    altered = []
    make = Calls.make

    async def harmful(self, step, **options):
        if step == saga.DESTINATION_RESUME and not altered:
            status = await self.shim(Side.DESTINATION).status()
            altered.append(await asyncio.to_thread(alter_page, status.qemu_pid, settings.workload.marker))
        return await make(self, step, **options)

    monkeypatch.setattr(Calls, "make", harmful)
    figures = await run(settings)
    assert figures["ok"] is False
    assert figures["pages_stale"] == 1
    assert [example["page"] for example in figures["stale_examples"]] == altered
    assert figures["reasons"] == ["the guest's memory is not verified", "pages of the pattern are wrong"]


async def test_a_client_that_is_cut_off_during_the_move_is_found():
    class Cut(Demo):
        async def move(self, source, destination, name):
            self.client.cut()
            return await super().move(source, destination, name)

    figures = await run(Settings(control=False), Cut)
    assert figures["ok"] is False
    assert figures["tcp_connection_survived"] is False
    assert "the client's TCP connection did not survive" in figures["reasons"]
    assert figures["memory_verified"] is True


async def test_a_move_that_is_only_claimed_is_found():
    """Everything but the move itself: the connection stands, the pages are right, and still it is not proven."""

    class Claimed(Demo):
        async def move(self, source, destination, name):
            return MigrationResult(
                name,
                "s",
                "host-a",
                "host-b",
                Outcome.MOVED,
                total_ms=900.0,
                blackout_ms=9,
                passes=3,
                bytes_transferred=1 << 27,
            )

    figures = await run(Settings(control=False), Claimed)
    assert figures["memory_verified"] is True
    assert figures["reasons"] == ["the channel is not proven to be encrypted"]


@pytest.mark.full
def test_qemu_7_2_under_tcg_is_refused_and_so_not_proven():
    """What it would do to the guest: test_old_qemu_vm.py."""
    qemu = unpacked_qemu_72()
    data = [word for folder in qemu.data_dirs for word in ("--qemu-data", folder)]
    ran = CliRunner().invoke(demo, ["--json", "--no-control", "--qemu", str(qemu.binary), *data])
    print(ran.output)
    assert ran.exit_code == 1
    told = json.loads(ran.stdout)
    assert told["ok"] is False
    assert "a step failed" in told["reasons"]
    assert "7.2" in told["failure"]
    assert "9.0" in told["failure"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_demo_that_is_interrupted_in_the_middle_leaves_nothing(number):
    before = left_of_demos()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "sandshift", "demo", "--json", "--no-control"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told = []
    async with asyncio.timeout(120):
        while b"moving it to host B" not in (line := await process.stderr.readline()):
            assert line, b"".join(told).decode()
            told.append(line)
    process.send_signal(number)
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert b"interrupted" in stderr
    document = json.loads(stdout)
    assert (document["ok"], document["code"]) == (False, "CANCELLED")
    assert "interrupted" in document["failure"]
    assert left_of_demos() <= before
