"""Real sandboxes moved between two hosts by the commands and by coordinators that die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.fleet.driver import migrate
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host
from sandshift.fleet.launch import Wish, launch, logs, run_process, stop
from sandshift.fleet.listing import list_sandboxes
from sandshift.fleet.request import Migration
from sandshift.fleet.result import Update
from sandshift.fleet.resume import migrate_or_resume
from sandshift.fleet.saga import Outcome
from sandshift.fleet.shim_client import connect
from sandshift.image.build import build
from tests.lab import Lab, open_lab
from tests.needs import needs_root

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300), needs_root]

SANDBOX = "moved-1"
COUNTER = ("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done")
KILLED_COORDINATOR = Path(__file__).with_name("killed_coordinator.py")


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with open_lab() as made:
        await asyncio.to_thread(build, Path(made.host_a.config.places.cache_dir))
        yield made


def hosts_of(lab: Lab) -> tuple[Host, Host]:
    return Host.load(lab.host_a.config_path), Host.load(lab.host_b.config_path)


async def counting_sandbox(host: Host) -> None:
    shim = await launch(host, Wish(SANDBOX))
    try:
        await run_process(shim, COUNTER)
    finally:
        await shim.close()


async def running_on(*hosts: Host) -> list[str]:
    return [found.host for host in hosts for found in await list_sandboxes(host) if found.state == "running"]


async def leftovers(host: Host) -> list[str]:
    """Sandboxes of `host`, and files of theirs that stayed."""
    run_dir, state_dir = Path(host.config.places.run_dir), Path(host.config.places.state_dir)
    files = [*run_dir.glob("*/*"), *(state_dir / "sandboxes").glob("*/*")]
    return [str(path) for path in files]


async def numbers_from(host: Host, count: int) -> list[int]:
    """The next `count` numbers that the counter writes on this host."""
    shim = await connect(host, NAMESPACE_DEFAULT, SANDBOX)
    text = b""
    try:
        async with contextlib.aclosing(logs(shim, "main", follow=True)) as parts:
            async for part in parts:
                text += part.data
                if text.count(b"\n") > count:
                    break
    finally:
        await shim.close()
    return [int(line) for line in text.split(b"\n")[:-1]]


async def test_the_commands_run_move_and_stop_a_sandbox_and_no_output_is_lost(lab: Lab) -> None:
    a, b = hosts_of(lab)
    config_a, config_b = str(lab.host_a.config_path), str(lab.host_b.config_path)
    started = await command("run", "--config", config_a, "--id", SANDBOX, "--json", "--", *COUNTER)
    assert started["state"] == "running"
    before = await numbers_from(a, 5)
    assert before[:3] == [1, 2, 3]
    moved = await command("migrate", "--config", config_a, SANDBOX, "--to", config_b, "--json")
    assert moved["outcome"] == "moved"
    assert moved["warnings"] == []
    assert 0 < moved["blackout_ms"] < moved["total_ms"]
    assert moved["passes"] >= 1
    assert await running_on(a, b) == [b.name]
    after = await numbers_from(b, 10)
    assert after == list(range(after[0], after[0] + len(after)))
    assert after[0] > before[-1] - len(before)
    assert await leftovers(a) == []
    listed = await command("ls", "--config", config_a, "--also", config_b, "--json")
    assert [(each["id"], each["host"], each["state"]) for each in listed] == [(SANDBOX, b.name, "running")]
    assert listed[0]["boot_id"] == started["boot_id"]
    assert (await command("stop", "--config", config_b, SANDBOX, "--json"))[0]["stopped"] is True
    assert await leftovers(b) == []


async def command(*words: str) -> object:
    """Run the command as a person does; its document."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandshift",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert stderr == b""
    return json.loads(stdout)


DEATHS = [
    ("SOURCE", "EXPORT", "after"),
    ("DESTINATION", "OPEN", "after"),
    ("DESTINATION", "IMPORT", "after"),
    ("DESTINATION", "PREPARE", "after"),
    ("DESTINATION", "SOCKET", "after"),
    ("SOURCE", "SOCKET", "after"),
    ("DESTINATION", "RESUME", "before"),
    ("DESTINATION", "RESUME", "after"),
    ("SOURCE", "STOP", "after"),
    ("SOURCE", "CLEANUP", "after"),
]


@pytest.mark.full
async def test_wherever_a_coordinator_dies_another_one_ends_the_session_with_one_runner(lab: Lab) -> None:
    here, there = hosts_of(lab)
    await counting_sandbox(here)
    try:
        for number, (side, call, moment) in enumerate(DEATHS):
            session = f"death-{number}"
            await die_at(here, there, session, side, call, moment)
            migration = Migration(here, there, SANDBOX, session)
            result = await migrate_or_resume(migration)
            told = (side, call, moment, result.outcome, result.reason, result.warnings)
            assert result.outcome in (Outcome.MOVED, Outcome.UNDONE), told
            runner, other = (there, here) if result.moved else (here, there)
            assert await running_on(here, there) == [runner.name], told
            assert await leftovers(other) == [], told
            numbers = await numbers_from(runner, 3)
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), told
            here, there = runner, other
    finally:
        for host in (here, there):
            for found in await list_sandboxes(host):
                await stop(host, found.namespace, found.sandbox_id)


async def die_at(here: Host, there: Host, session: str, side: str, call: str, moment: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(KILLED_COORDINATOR), str(here.config_path), str(there.config_path), SANDBOX, session,
        side, call, moment,
    )  # fmt: skip
    assert await process.wait() == -signal.SIGKILL, f"it did not reach {call} on the {side}"


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("source shim", marks=pytest.mark.full),
        pytest.param("destination shim", marks=pytest.mark.full),
        "destination qemu",
        "source qemu",
    ],
)
async def test_a_part_killed_while_memory_flows_leaves_at_most_one_runner_and_nothing_else(
    lab: Lab, victim: str
) -> None:
    here, there = hosts_of(lab)
    await counting_sandbox(here)
    killed = asyncio.Event()

    def kill_once(update: Update) -> None:
        if update.phase == "SETUP_DONE" and not killed.is_set():
            killed.set()
            tasks.append(asyncio.ensure_future(kill(here, there, victim)))

    tasks: list[asyncio.Future[None]] = []
    try:
        result = await migrate(Migration(here, there, SANDBOX, f"kill-{victim[:3]}"), on_update=kill_once)
        await asyncio.gather(*tasks)
        told = (result.outcome, result.failed_call, result.reason, result.warnings)
        if victim == "source qemu":
            assert result.outcome is Outcome.CRASHED, told
            assert await running_on(here, there) == [], told
            assert await leftovers(there) == [], told
            return
        assert result.outcome in (Outcome.MOVED, Outcome.UNDONE), told
        runner, other = (there, here) if result.moved else (here, there)
        assert await running_on(here, there) == [runner.name], told
        assert await leftovers(other) == [], told
        numbers = await numbers_from(runner, 3)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), told
        again = await migrate(Migration(runner, other, SANDBOX, "again"))
        assert again.moved, (again.failed_call, again.reason)
    finally:
        for host in (here, there):
            for found in await list_sandboxes(host):
                await stop(host, found.namespace, found.sandbox_id)


async def kill(here: Host, there: Host, victim: str) -> None:
    host = here if victim.startswith("source") else there
    shim = await connect(host, NAMESPACE_DEFAULT, SANDBOX)
    try:
        status = await shim.status()
    finally:
        await shim.close()
    os.kill(status.shim_pid if victim.endswith("shim") else status.qemu_pid, signal.SIGKILL)
