"""A whole move, its undoing and its repetition, over real sockets, with fake VMs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.vmm.machine import MigrationStatus
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import TwoHosts, channel, two_hosts

STOP, RESUME = 1, 2


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


async def finish(hosts: TwoHosts) -> None:
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    await hosts.d.migration.cleanup(m.CleanupRequest(session_id=hosts.session))


async def test_a_sandbox_moves_and_runs_on_the_destination_alone(hosts: TwoHosts) -> None:
    boot_id = (await hosts.s.status()).boot_id
    await hosts.ready()
    assert hosts.runners() == []
    await finish(hosts)
    assert hosts.runners() == ["destination"]
    assert (await hosts.d.status()).boot_id == boot_id
    assert (await hosts.s.status()).vm_state == "stopped"
    assert not hosts.source.places.journal_file.exists()


async def test_the_phases_are_told_in_order_on_both_sides(hosts: TwoHosts) -> None:
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    assert await hosts.s.phases(hosts.session, ("DONE", "SUCCESS")) == [
        ("SETUP_DONE", "SUCCESS"),
        ("BLACKOUT_STARTED", "SUCCESS"),
        ("OFFLINE_DONE", "SUCCESS"),
        ("DONE", "SUCCESS"),
    ]
    exited = ("BLACKOUT_EXITED", "SUCCESS")
    assert await hosts.d.phases(hosts.session, exited) == [("DONE", "SUCCESS"), exited]


async def test_it_moves_back_with_the_same_shims_after_cleanup(hosts: TwoHosts) -> None:
    await hosts.ready()
    await finish(hosts)
    status = await hosts.d.status()
    assert status.session.state == "Idle"
    assert status.session.action == "resume"


async def test_a_move_is_undone_after_everything_has_arrived(hosts: TwoHosts) -> None:
    await hosts.ready()
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.d.finalize(hosts.session, STOP)
    assert hosts.runners() == ["source"]
    recovered = ("RECOVERY_DONE", "SUCCESS")
    assert recovered in await hosts.s.phases(hosts.session, recovered)


async def test_cancel_in_the_transfer_leaves_the_source_running(hosts: TwoHosts) -> None:
    hosts.source.process.faults.stall = True
    await hosts.prepare()
    await hosts.connect()
    moving = asyncio.create_task(
        hosts.s.migration.transfer_sandbox(m.TransferSandboxRequest(session_id=hosts.session))
    )
    async with asyncio.timeout(20):
        while hosts.source.process.transfer_status is MigrationStatus.NONE:
            await asyncio.sleep(0.001)
    await hosts.s.migration.cancel(m.CancelRequest(session_id=hosts.session), timeout_s=10)
    with pytest.raises(ttrpc.StatusError) as told:
        await moving
    assert told.value.code is ttrpc.Code.CANCELLED
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def test_the_source_cannot_stop_before_the_destination_runs(hosts: TwoHosts) -> None:
    await hosts.prepare()
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.s.finalize(hosts.session, STOP)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    assert hosts.runners() == ["source"]


async def test_memory_that_differs_is_data_loss_and_rolls_back(hosts: TwoHosts) -> None:
    options = o.InitializeOptions(memory_transport=1, checksum_verification=True)
    await hosts.prepare(options)
    original = hosts.source.server.sandbox.machine.memory_digest  # type: ignore[union-attr]

    async def wrong() -> bytes:
        return bytes(reversed(await original()))

    hosts.source.server.sandbox.machine.memory_digest = wrong  # type: ignore[union-attr,method-assign]
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    results = await asyncio.gather(
        hosts.d.migration.transfer_sandbox(request, timeout_s=10),
        hosts.s.migration.transfer_sandbox(request, timeout_s=10),
        return_exceptions=True,
    )
    assert isinstance(results[0], ttrpc.StatusError)
    assert results[0].code is ttrpc.Code.DATA_LOSS
    with pytest.raises(ttrpc.StatusError):
        await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def restart(hosts: TwoHosts, *, channel_lost: bool) -> None:
    """Both shims end without a word and others begin on what they left."""
    for host in (hosts.source, hosts.destination):
        await host.stop()
        if channel_lost:
            host.process.drop_channel()
    for host in (hosts.source, hosts.destination):
        await host.start()
    await hosts.reconnect()


async def test_a_session_goes_on_over_its_channel_after_both_shims_died(hosts: TwoHosts) -> None:
    await hosts.ready()
    done = ("OFFLINE_DONE", "SUCCESS")
    before = await hosts.s.phases(hosts.session, done)
    await restart(hosts, channel_lost=False)
    assert (await hosts.s.status()).session.state == "TransferCompleted"
    assert await hosts.s.phases(hosts.session, done) == before
    await finish(hosts)
    assert hosts.runners() == ["destination"]


async def test_receipts_finish_a_move_whose_channel_is_gone(hosts: TwoHosts) -> None:
    await hosts.ready()
    await restart(hosts, channel_lost=True)
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.d.finalize(hosts.session, RESUME)
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    ready = (await hosts.d.status()).session.receipt
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.s.finalize(hosts.session, STOP, ready)
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    released = (await hosts.s.status()).session.receipt
    await hosts.d.finalize(hosts.session, RESUME, released)
    assert hosts.runners() == ["destination"]
    running = (await hosts.d.status()).session.receipt
    await hosts.s.finalize(hosts.session, STOP, running)
    assert (await hosts.s.status()).vm_state == "stopped"


async def test_a_socket_that_is_not_the_one_described_harms_nothing(hosts: TwoHosts) -> None:
    await hosts.prepare()
    source, destination = channel()
    with source, destination:
        described = m.SocketDescriptor.FromString(b"")
        described.version = 1
        described.pid, described.fd = 1, 0
        request = m.CreateDuplicateSocketRequest(
            session_id=hosts.session, protocol_info=described.SerializeToString()
        )
        with pytest.raises(ttrpc.StatusError) as told:
            await hosts.s.migration.create_duplicate_socket(request)
    assert told.value.code is ttrpc.Code.INVALID_ARGUMENT
    await hosts.connect()
    await hosts.transfer()
    await finish(hosts)
    assert hosts.runners() == ["destination"]


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
async def test_the_blackout_is_right_though_the_hosts_clocks_differ_by_an_hour(
    tmp_path: Path, ahead_s: int
) -> None:
    async with two_hosts(tmp_path, destination_ahead_s=ahead_s) as hosts:
        await hosts.ready()
        stopped = asyncio.get_running_loop().time()
        await asyncio.sleep(0.2)
        await hosts.d.finalize(hosts.session, RESUME)
        lasted_ms = (asyncio.get_running_loop().time() - stopped) * 1000
        told = await hosts.blackout_ms()
        assert 200 <= told <= lasted_ms + 1000
        await hosts.s.finalize(hosts.session, STOP)
        for host in (hosts.s, hosts.d):
            await host.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
        answer = await hosts.d.shim.report(shim_pb2.ReportRequest(session_id=hosts.session))
        report = json.loads(answer.report)
        assert report["blackout"]["method"] == "pieces"
        assert report["clock_skew_ms"] == pytest.approx(ahead_s * 1000, abs=500)
        assert any("clock" in warning for warning in report["warnings"])
