"""What is left on a host is seen: a process, a tap, a file and a lock, each put there by hand."""

from __future__ import annotations

import asyncio
import fcntl
import os

import pytest

from sandshift import net
from sandshift.net.plan import Tap, plan_taps
from tests.faults.leftovers import beside_the_guest, left_on
from tests.lab import open_lab
from tests.needs import needs_root

pytestmark = [pytest.mark.vm, needs_root]


async def test_a_process_a_tap_a_file_and_a_lock_are_seen_and_an_empty_host_is_empty() -> None:
    async with open_lab() as lab:
        host = lab.host_a
        (state := host.folder / "state" / "sandboxes" / "default" / "box").mkdir(parents=True)
        (kept := host.folder / "state" / "statements").mkdir()
        (kept / "one").touch()
        assert await asyncio.to_thread(left_on, host) == []
        await net.apply(plan_taps([Tap(name="ss0123456789ab")]), network_namespace=host.namespace)
        sleeper = await asyncio.create_subprocess_exec("sleep", "60", env=host.environment)
        lock = os.open(state / "session", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert await asyncio.to_thread(left_on, host) == [
                f"process {sleeper.pid} (sleep)",
                "tap ss0123456789ab",
                str(state / "session"),
                f"lock on {state / 'session'}",
            ]
            assert await asyncio.to_thread(beside_the_guest, host) == [str(state / "session")]
            assert await asyncio.to_thread(left_on, lab.host_b) == []
        finally:
            os.close(lock)
            sleeper.kill()
            await sleeper.wait()
