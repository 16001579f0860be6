"""The guest reboots, powers off or panics while it moves: at each phase the outcome of contract 4.9, and nobody left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.session.statement import Cell
from sandshift.vmm.fake_process import FakeProcess
from sandshift.vmm.machine import MigrationStatus, RunState
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import SANDBOX, FakeHost, HostClient, TwoHosts, two_hosts

STOP, RESUME = 1, 2
WAIT_S = 20.0
"""How long anything here may take: the shims' own limits are minutes."""
EVENTS = {"reboot": "guest-reset", "power-off": "guest-shutdown", "panic": "guest-panic"}
"""What QEMU gives as the reason of SHUTDOWN with -action reboot=shutdown,shutdown=poweroff,panic=shutdown."""


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


@pytest.fixture(params=EVENTS)
def event(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def happens(process: FakeProcess, event: str) -> None:
    """In the guest: every one of them ends the VM process, which says why."""
    process.stop(RunState.GUEST_PANICKED if event == "panic" else RunState.SHUTDOWN)
    if event == "panic":
        process.say("GUEST_PANICKED", {"action": "shutdown"})
    process.say("SHUTDOWN", {"guest": True, "reason": EVENTS[event]})
    process.die(returncode=0)


def transfer(client: HostClient, session: str) -> asyncio.Task[m.TransferSandboxResponse]:
    request = m.TransferSandboxRequest(session_id=session)
    return asyncio.create_task(client.migration.transfer_sandbox(request, timeout_s=WAIT_S))


async def code_of(task: asyncio.Task[m.TransferSandboxResponse]) -> ttrpc.Code:
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if not isinstance(outcome, BaseException):
        return ttrpc.Code.OK
    assert isinstance(outcome, ttrpc.StatusError), repr(outcome)
    assert outcome.code is not ttrpc.Code.DEADLINE_EXCEEDED, "nobody told the caller"
    return outcome.code


async def told_last(client: HostClient, session: str, *last: str) -> bool:
    phase, state = last
    return (await client.phases(session, (phase, state)))[-1] == (phase, state)


async def ended_here(client: HostClient, exit_code: int = 137) -> None:
    waited = await client.sandbox.wait_sandbox(
        sandbox_pb2.WaitSandboxRequest(sandbox_id=SANDBOX), timeout_s=WAIT_S
    )
    assert waited.exit_status == exit_code


async def it_is_over(hosts: TwoHosts) -> None:
    """The source cannot go back to a guest that has ended, says so, and both sides can be cleaned up."""
    await ended_here(hosts.s)
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.s.finalize(hosts.session, RESUME)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    if (await hosts.d.status()).session.active:
        await hosts.d.finalize(hosts.session, STOP)
        await hosts.d.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=WAIT_S)
    await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=WAIT_S)
    assert hosts.runners() == []
    for host in (hosts.source, hosts.destination):
        assert not host.places.journal_file.exists()
    life = await hosts.d.sandbox.sandbox_status(sandbox_pb2.SandboxStatusRequest(sandbox_id=SANDBOX))
    assert life.info["sandshift.life"] == "awaiting"


async def until(host: FakeHost, status: MigrationStatus) -> None:
    async with asyncio.timeout(WAIT_S):
        while host.process.transfer_status is not status:
            await asyncio.sleep(0.001)


async def test_after_the_export(hosts: TwoHosts, event: str) -> None:
    await hosts.export()
    happens(hosts.source.process, event)
    await ended_here(hosts.s)
    assert await told_last(hosts.s, hosts.session, "FAILED", "GUEST_INITIATED_CANCELLATION")
    status = (await hosts.s.status()).session
    assert (status.state, status.cell) == ("Failed", Cell.KEPT.value)
    assert EVENTS[event] in status.failure
    await it_is_over(hosts)


async def test_while_transfer_waits_for_its_socket(hosts: TwoHosts, event: str) -> None:
    await hosts.prepare()
    waiting = transfer(hosts.s, hosts.session)
    async with asyncio.timeout(WAIT_S):
        while (await hosts.s.status()).session.state != "SocketWaiting":
            await asyncio.sleep(0.001)
    happens(hosts.source.process, event)
    assert await code_of(waiting) is ttrpc.Code.ABORTED
    assert await told_last(hosts.s, hosts.session, "FAILED", "GUEST_INITIATED_CANCELLATION")
    await it_is_over(hosts)


async def test_before_the_first_byte(hosts: TwoHosts, event: str) -> None:
    """Both have their sockets and the destination waits: it hears at once, not at its deadline."""
    await hosts.prepare()
    await hosts.connect()
    waiting = transfer(hosts.d, hosts.session)
    happens(hosts.source.process, event)
    await ended_here(hosts.s)
    assert await code_of(waiting) is ttrpc.Code.UNAVAILABLE
    assert await told_last(hosts.s, hosts.session, "FAILED", "GUEST_INITIATED_CANCELLATION")
    assert await told_last(hosts.d, hosts.session, "DONE", "SOURCE_FAILED")
    await it_is_over(hosts)


async def test_in_the_brownout(hosts: TwoHosts, event: str) -> None:
    hosts.source.process.faults.stall = True
    await hosts.prepare()
    await hosts.connect()
    moving = [transfer(client, hosts.session) for client in (hosts.s, hosts.d)]
    await until(hosts.source, MigrationStatus.ACTIVE)
    await until(hosts.destination, MigrationStatus.ACTIVE)
    happens(hosts.source.process, event)
    assert [await code_of(task) for task in moving] == [ttrpc.Code.ABORTED, ttrpc.Code.UNAVAILABLE]
    assert await told_last(hosts.s, hosts.session, "FAILED", "GUEST_INITIATED_CANCELLATION")
    assert await told_last(hosts.d, hosts.session, "DONE", "SOURCE_FAILED")
    await it_is_over(hosts)


async def test_in_the_blackout(hosts: TwoHosts, event: str) -> None:
    """What the guest had asked for in its last moment is done while it stands still."""
    await hosts.prepare()
    machine = hosts.source.server.sandbox.machine  # type: ignore[union-attr]
    assert machine is not None
    there = asyncio.Event()

    async def never() -> None:
        there.set()
        await asyncio.Event().wait()

    machine.switch_over = never  # type: ignore[method-assign]
    await hosts.connect()
    moving = [transfer(client, hosts.session) for client in (hosts.s, hosts.d)]
    await asyncio.wait_for(there.wait(), WAIT_S)
    happens(hosts.source.process, event)
    assert [await code_of(task) for task in moving] == [ttrpc.Code.ABORTED, ttrpc.Code.UNAVAILABLE]
    assert await told_last(hosts.s, hosts.session, "FAILED", "GUEST_INITIATED_CANCELLATION")
    assert await told_last(hosts.d, hosts.session, "DONE", "SOURCE_FAILED")
    await it_is_over(hosts)


async def test_when_everything_is_there_the_guest_stands_still_and_does_nothing(hosts: TwoHosts) -> None:
    """Between completion and Finalize no virtual CPU runs on either side, so no event of the guest's can come."""
    await hosts.ready()
    assert hosts.runners() == []
    assert hosts.source.process.state is RunState.POSTMIGRATE
    assert hosts.destination.process.state is RunState.PAUSED


async def test_a_source_that_ends_when_everything_is_there_leaves_the_destination_s_copy(
    hosts: TwoHosts, event: str
) -> None:
    """QEMU carries a late request of the guest out: the copy on the destination is the only one, and may run."""
    await hosts.ready()
    happens(hosts.source.process, event)
    async with asyncio.timeout(WAIT_S):
        while (await hosts.s.status()).session.cell != Cell.GONE.value:
            await asyncio.sleep(0.001)
    await hosts.d.finalize(hosts.session, RESUME, (await hosts.s.status()).session.receipt)
    assert hosts.runners() == ["destination"]
    await hosts.s.finalize(hosts.session, STOP)
    await ended_here(hosts.s, 255)


@pytest.mark.parametrize("source", ["stopped before", "stopped after"])
async def test_on_the_destination_after_the_move_it_is_an_ordinary_end(
    hosts: TwoHosts, event: str, source: str
) -> None:
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    if source == "stopped before":
        await hosts.s.finalize(hosts.session, STOP)
    happens(hosts.destination.process, event)
    await ended_here(hosts.d)
    assert await told_last(hosts.d, hosts.session, "BLACKOUT_EXITED", "SUCCESS")
    if source == "stopped after":
        await hosts.s.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=WAIT_S)
    await ended_here(hosts.s, 255)
    assert hosts.runners() == []
    assert (await hosts.s.status()).moved_to


async def test_after_a_roll_back_it_is_an_ordinary_end_too(hosts: TwoHosts, event: str) -> None:
    await hosts.ready()
    await hosts.s.finalize(hosts.session, RESUME)
    happens(hosts.source.process, event)
    await ended_here(hosts.s)
    assert await told_last(hosts.s, hosts.session, "RECOVERY_DONE", "SUCCESS")
    await hosts.d.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=WAIT_S)
    assert hosts.runners() == []


async def test_a_destination_s_vm_that_ends_before_the_first_byte_is_told_to_the_source_at_once(
    hosts: TwoHosts,
) -> None:
    await hosts.prepare()
    await hosts.connect()
    hosts.destination.process.die()
    async with asyncio.timeout(WAIT_S):
        while (await hosts.d.status()).session.cell != Cell.REFUSED.value:
            await asyncio.sleep(0.001)
    assert await code_of(transfer(hosts.s, hosts.session)) is ttrpc.Code.UNAVAILABLE
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]
