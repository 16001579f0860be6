"""Every transfer ends, and whoever waits for it hears how: a full disk, a slow disk, a Cancel at the wrong moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.config import Limits
from sandshift.errors import Unavailable
from sandshift.session.phases import Outcome
from sandshift.session.precopy import End
from sandshift.session.right_model import Record
from sandshift.session.states import State
from sandshift.shim.migration import source
from sandshift.shim.migration.channel import Channel
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.pacing import StopSending
from sandshift.shim.migration.source import Source
from sandshift.vmm.machine import ChannelSecurity, Machine, MigrationStatus, RunState, TransferSettings
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from tests.shim.house import TwoHosts, channel, two_hosts

STOP, RESUME = 1, 2


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


def source_of(hosts: TwoHosts) -> Source:
    assert hosts.source.server is not None
    active = hosts.source.server.desk.active
    assert isinstance(active, Source)
    return active


async def test_a_transfer_that_fails_on_a_full_disk_still_ends(hosts: TwoHosts) -> None:
    await hosts.prepare()
    hosts.source.process.faults.fail_out = "no more pages"
    books = source_of(hosts).books
    write = books.write_records

    async def full_for_failures(records: list[Record]) -> None:
        if records[-1].reason:
            raise Unavailable("session cannot be written: No space left on device")
        await write(records)

    books.write_records = full_for_failures  # type: ignore[method-assign]
    await hosts.connect()
    with pytest.raises(ttrpc.StatusError, match="no more pages") as told:
        await hosts.s.migration.transfer_sandbox(
            m.TransferSandboxRequest(session_id=hosts.session), timeout_s=5
        )
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    books.write_records = write  # type: ignore[method-assign]
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def test_a_transfer_that_completes_before_a_rule_can_end_it_is_complete(hosts: TwoHosts) -> None:
    """Else the source would be told as failed with a guest that stands still, while the other side has all of it."""
    await hosts.prepare()
    machine = source_of(hosts).machine
    assert machine is not None
    switch_over = machine.switch_over

    async def switch_over_and_give_up() -> None:
        await switch_over()
        while (await machine.migration_info()).status is not MigrationStatus.COMPLETED:
            await asyncio.sleep(0)
        raise StopSending(End(Outcome.DEADLINE, "the transfer has taken longer than 1 s"))

    machine.switch_over = switch_over_and_give_up  # type: ignore[method-assign]
    await hosts.connect()
    await hosts.transfer()
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    assert hosts.runners() == ["destination"]


async def test_equal_memory_is_no_data_loss_when_the_source_s_disk_is_slow(hosts: TwoHosts) -> None:
    await hosts.prepare(o.InitializeOptions(memory_transport=1, checksum_verification=True))
    books = source_of(hosts).books
    write = books.write_records

    async def slowly(records: list[Record]) -> None:
        if records[-1].handover:
            await asyncio.sleep(0.2)  # The disk's time, not the test's.
        await write(records)

    books.write_records = slowly  # type: ignore[method-assign]
    await hosts.connect()
    await hosts.transfer()
    await hosts.d.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["destination"]


async def test_a_cancel_while_the_transfer_is_being_begun_leaves_no_transfer_behind(hosts: TwoHosts) -> None:
    await hosts.prepare()
    machine = source_of(hosts).machine
    assert machine is not None
    begin = machine.migrate_out
    beginning, go_on = asyncio.Event(), asyncio.Event()

    async def begin_slowly(fd: int, security: ChannelSecurity, settings: TransferSettings) -> None:
        beginning.set()
        await go_on.wait()
        await begin(fd, security, settings)

    machine.migrate_out = begin_slowly  # type: ignore[method-assign]
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    moving = asyncio.create_task(hosts.s.migration.transfer_sandbox(request, timeout_s=10))
    await beginning.wait()
    cancelling = asyncio.create_task(
        hosts.s.migration.cancel(m.CancelRequest(session_id=hosts.session), timeout_s=10)
    )
    while source_of(hosts).session.state.value == "Transferring":
        await asyncio.sleep(0)
    go_on.set()
    await cancelling
    with pytest.raises(ttrpc.StatusError) as told:
        await moving
    assert told.value.code is ttrpc.Code.CANCELLED
    assert hosts.source.process.transfer_status in (MigrationStatus.NONE, MigrationStatus.CANCELLED)
    assert hosts.runners() == ["source"]


async def test_a_destination_whose_channel_is_cut_while_its_vm_is_asked_to_receive_meets_no_defect(
    hosts: TwoHosts, caplog: pytest.LogCaptureFixture
) -> None:
    """By then the number of the channel may be another file's: the VM gets a copy that was taken before."""
    await hosts.prepare()
    machine = hosts.destination.server.sandbox.machine
    assert machine is not None
    begin = machine.migrate_in
    beginning, go_on = asyncio.Event(), asyncio.Event()

    async def begin_slowly(fd: int, security: ChannelSecurity) -> None:
        beginning.set()
        await go_on.wait()
        await begin(fd, security)

    machine.migrate_in = begin_slowly  # type: ignore[method-assign]
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    moving = asyncio.create_task(hosts.d.migration.transfer_sandbox(request, timeout_s=10))
    await beginning.wait()
    session = hosts.destination.server.desk.active
    assert session is not None
    assert session.session.channel is not None
    session.session.channel.cut()
    go_on.set()
    with pytest.raises(ttrpc.StatusError) as told:
        await moving
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    assert "defect" not in caplog.text
    assert hosts.runners() == ["source"]


async def test_a_destination_that_fails_as_transfer_is_called_answers_why_it_failed(hosts: TwoHosts) -> None:
    await hosts.prepare()
    server = hosts.destination.server
    active = server.desk.active
    machine, write = server.sandbox.machine, active.books.write_records
    failing, go_on = asyncio.Event(), asyncio.Event()

    async def refuses(_fd: int, _security: ChannelSecurity) -> None:
        raise Unavailable("QEMU refused to receive")

    async def slowly(records: list[Record]) -> None:
        if records[-1].reason:
            failing.set()
            await go_on.wait()
        await write(records)

    machine.migrate_in = refuses  # type: ignore[method-assign]
    active.books.write_records = slowly  # type: ignore[method-assign]
    await hosts.connect()
    await failing.wait()
    assert active.session.state is State.SOCKET_READY
    request = m.TransferSandboxRequest(session_id=hosts.session)
    moving = asyncio.create_task(hosts.d.migration.transfer_sandbox(request, timeout_s=10))
    while not active.session.transfer.started:
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(ttrpc.StatusError, match="QEMU refused to receive") as told:
        await moving
    assert told.value.code is ttrpc.Code.UNAVAILABLE


async def test_a_transfer_that_waits_for_its_socket_goes_on_though_a_second_call_comes_with_it(
    hosts: TwoHosts,
) -> None:
    """Two coordinators: one waits in TransferSandbox, the other hands the socket over and calls in the same moment."""
    await hosts.prepare()
    books = source_of(hosts).books
    write, is_begun = books.write_records, asyncio.Event()

    async def slowly(records: list[Record]) -> None:
        if records[-1].state is State.TRANSFERRING:
            is_begun.set()
            await asyncio.sleep(0.1)  # The disk's time, not the test's.
        await write(records)

    books.write_records = slowly  # type: ignore[method-assign]
    request = m.TransferSandboxRequest(session_id=hosts.session)
    waiting = asyncio.create_task(hosts.s.migration.transfer_sandbox(request, timeout_s=20))
    while source_of(hosts).session.state is not State.SOCKET_WAITING:
        await asyncio.sleep(0)
    source, destination = channel()
    with source, destination:
        await hosts.d.give_socket(hosts.session, destination)
        giving = asyncio.create_task(hosts.s.give_socket(hosts.session, source))
        calling = asyncio.create_task(hosts.s.migration.transfer_sandbox(request, timeout_s=20))
        receiving = hosts.d.migration.transfer_sandbox(request, timeout_s=20)
        await asyncio.gather(giving, calling, waiting, receiving)
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    assert is_begun.is_set()
    assert hosts.runners() == ["destination"]


async def test_a_destination_to_which_nothing_ever_comes_ends_at_its_deadline(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, Limits(transfer_deadline_s=0.4)) as hosts:
        await hosts.prepare()
        await hosts.connect()
        request = m.TransferSandboxRequest(session_id=hosts.session)
        with pytest.raises(ttrpc.StatusError, match=r"within 0\.4 s") as told:
            await hosts.d.migration.transfer_sandbox(request, timeout_s=5)
        assert told.value.code is ttrpc.Code.DEADLINE_EXCEEDED
        assert (await hosts.d.status()).session.state == "Failed"


async def test_a_defect_of_ours_ends_the_transfer_with_internal(hosts: TwoHosts) -> None:
    await hosts.prepare()
    machine = source_of(hosts).machine
    assert machine is not None

    async def defect(*_what: object) -> None:
        raise KeyError("secret")

    machine.migrate_out = defect  # type: ignore[method-assign]
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    with pytest.raises(ttrpc.StatusError, match="KeyError") as told:
        await hosts.s.migration.transfer_sandbox(request, timeout_s=5)
    assert told.value.code is ttrpc.Code.INTERNAL
    assert "secret" not in told.value.message


async def test_a_side_that_could_not_look_after_a_failed_step_looks_before_the_next(hosts: TwoHosts) -> None:
    await hosts.ready()
    active = source_of(hosts)
    write, look = active.books.write_records, active.look

    async def refused(*_what: object) -> None:
        raise Unavailable("for a moment")

    active.books.write_records = active.look = refused  # type: ignore[assignment,method-assign]
    with pytest.raises(ttrpc.StatusError, match="for a moment"):
        await hosts.s.finalize(hosts.session, RESUME)
    active.books.write_records, active.look = write, look  # type: ignore[method-assign]
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


class Late:
    """The destination's shim handles its VM's word of the end only when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = asyncio.Event()
        whole = Destination._completed

        async def late(destination: Destination, machine: Machine, at_us: int) -> None:
            await self.may_go_on.wait()
            await whole(destination, machine, at_us)

        monkeypatch.setattr(Destination, "_completed", late)


async def resumed_too_early(hosts: TwoHosts) -> asyncio.Task[None]:
    """The source has told its caller that the destination has everything, and the destination does not know yet."""
    await hosts.prepare()
    await hosts.connect()
    await hosts.s.migration.transfer_sandbox(m.TransferSandboxRequest(session_id=hosts.session), timeout_s=10)
    resuming = asyncio.create_task(hosts.d.finalize(hosts.session, RESUME))
    await asyncio.sleep(0.1)
    assert not resuming.done()
    return resuming


async def test_a_resume_that_is_faster_than_the_destination_s_own_vm_waits_for_it(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch)
    resuming = await resumed_too_early(hosts)
    late.may_go_on.set()
    await resuming
    assert hosts.runners() == ["destination"]
    await hosts.s.finalize(hosts.session, STOP)
    assert not hosts.source.process.alive


async def test_a_cancel_ends_the_wait_of_a_resume_that_came_too_early(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch)
    resuming = await resumed_too_early(hosts)
    await hosts.d.migration.cancel(m.CancelRequest(session_id=hosts.session), timeout_s=5)
    with pytest.raises(ttrpc.StatusError) as told:
        await resuming
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    late.may_go_on.set()
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def hung_in_its_channel(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch, *, give_up_s: float
) -> asyncio.Task[object]:
    """The source's QEMU answers nothing until its channel is cut, as 10.0 does when that takes no byte any more."""
    faults = hosts.source.process.faults
    whole = Channel.cut

    def cut(channel: Channel) -> None:
        whole(channel)
        faults.hang = False

    monkeypatch.setattr(Channel, "cut", cut)
    faults.stall, faults.give_up_s = True, give_up_s
    await hosts.prepare()
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    transfer = asyncio.create_task(hosts.s.migration.transfer_sandbox(request, timeout_s=20))
    async with asyncio.timeout(10):
        while source_of(hosts).session.state is not State.TRANSFERRING:
            await asyncio.sleep(0.01)
    faults.hang = True
    return transfer


async def test_a_vm_that_hangs_in_its_channel_is_freed_and_the_guest_stays(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = await hung_in_its_channel(hosts, monkeypatch, give_up_s=0.2)
    with pytest.raises(ttrpc.StatusError, match="QEMU did not answer") as told:
        await transfer
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.source.process.state is RunState.RUNNING


async def test_a_cancel_frees_a_vm_that_hangs_in_its_channel(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "HANGS_S", 0.2)
    transfer = await hung_in_its_channel(hosts, monkeypatch, give_up_s=30.0)
    await hosts.s.migration.cancel(m.CancelRequest(session_id=hosts.session), timeout_s=8)
    with pytest.raises(ttrpc.StatusError) as told:
        await transfer
    assert told.value.code is ttrpc.Code.CANCELLED
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.source.process.state is RunState.RUNNING
