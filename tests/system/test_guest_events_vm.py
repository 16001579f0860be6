"""Real guests that reboot, power off or panic while they move. All phases, on fake VMs: tests/shim/test_guest_events.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

import ttrpc
from sandshift.fleet.launch import run_process
from sandshift.fleet.shim_client import Shim
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import options_pb2 as o
from tests.lab import Lab, open_lab
from tests.needs import needs_root
from tests.system.pair import RESUME, SANDBOX, SESSION, STOP, Pair, code_of, destination_code_of, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240), needs_root]
REBOOT, POWER_OFF = "busybox reboot -f", "busybox poweroff -f"
PANIC = "echo c > /proc/sysrq-trigger"
BEFORE_S = 8.0
"""Of the guest's time: what comes before the transfer is done in one or two seconds, more on a busy machine."""
GUEST = (o.PHASE_FAILED, o.PHASE_STATE_GUEST_INITIATED_CANCELLATION)


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with open_lab() as made:
        yield made


async def will(shim: Shim, event: str, *, after_s: float) -> None:
    """The guest does it by itself, after so much of its own time."""
    await run_process(shim, ("sh", "-c", f"sleep {after_s}; {event}"), process_id="end")


async def ended(shim: Shim) -> int:
    request = sandbox_pb2.WaitSandboxRequest(sandbox_id=SANDBOX)
    return (await shim.sandbox.wait_sandbox(request, timeout_s=60)).exit_status


async def ending(shim: Shim) -> tuple[int, int]:
    """Phase and state with which the side's transfer has ended, and the guest's own end in the session's words."""
    async with asyncio.timeout(60):
        async for response in shim.notifications(SESSION):
            told = response.notification
            if told.phase in (o.PHASE_FAILED, o.PHASE_DONE):
                return told.phase, told.state
    raise AssertionError("the stream ended without it")


async def over(hosts: Pair) -> None:
    """Nothing is left to run, and both sides can be cleaned up."""
    assert await ended(hosts.s) == 137
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.finalize(hosts.s, RESUME)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    if (await hosts.d.status()).session.active:
        await hosts.finalize(hosts.d, STOP)
        await hosts.clean_up(hosts.d)
    await hosts.clean_up(hosts.s)
    assert await hosts.runners() == []
    assert (await hosts.d.status()).vm_state == "absent"


async def test_a_panic_in_the_brownout_ends_the_move_as_a_reset_does(lab: Lab) -> None:
    async with pair(lab, dirty_mib=60) as hosts:
        await will(hosts.s, PANIC, after_s=1.5)
        await hosts.prepare()
        await hosts.connect()
        outcomes = await asyncio.gather(*hosts.transfers(), return_exceptions=True)
        assert code_of(outcomes[1]) is ttrpc.Code.ABORTED
        assert destination_code_of(outcomes[0]) is ttrpc.Code.UNAVAILABLE
        assert await ending(hosts.s) == GUEST
        assert await ending(hosts.d) == (o.PHASE_DONE, o.PHASE_STATE_SOURCE_FAILED)
        # The guest's kernel is told to reboot when it panics: to QEMU that is a reset.
        assert "guest-reset" in (await hosts.s.status()).session.failure
        await over(hosts)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(REBOOT, id="reboot"),
        pytest.param(POWER_OFF, id="power-off", marks=FULL),
        pytest.param(PANIC, id="panic", marks=FULL),
    ],
)
async def test_before_the_transfer_the_destination_hears_of_it_at_once(lab: Lab, event: str) -> None:
    async with pair(lab) as hosts:
        await will(hosts.s, event, after_s=BEFORE_S)
        await hosts.prepare()
        await hosts.connect()
        assert await ended(hosts.s) == 137
        assert await ending(hosts.s) == GUEST
        assert await ending(hosts.d) == (o.PHASE_DONE, o.PHASE_STATE_SOURCE_FAILED)
        await over(hosts)


@pytest.mark.parametrize(
    "event", [pytest.param(PANIC, id="panic"), pytest.param(REBOOT, id="reboot", marks=FULL)]
)
async def test_after_the_move_it_is_the_destination_s_guest_that_ends(lab: Lab, event: str) -> None:
    """The destination is done with its session, the source is not: it still has its copy, and lets go of it."""
    async with pair(lab) as hosts:
        await hosts.ready()
        await hosts.finalize(hosts.d, RESUME)
        await hosts.clean_up(hosts.d)
        with contextlib.suppress(ttrpc.StatusError):  # It may end before it has answered.
            await run_process(hosts.d, ("sh", "-c", event))
        assert await ended(hosts.d) == 137
        await hosts.finalize(hosts.s, STOP)
        await hosts.clean_up(hosts.s)
        assert await ended(hosts.s) == 255
        assert await hosts.runners() == []
