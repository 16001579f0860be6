"""What a shim finds that begins where an earlier one was killed: the worst moments of both sides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.config import Limits
from sandshift.errors import Unavailable
from sandshift.guest.client import GuestInfo
from sandshift.sandbox.model import Process
from sandshift.session import journal as journals
from sandshift.session.right_model import Record
from sandshift.session.statement import Cell
from sandshift.session.states import State
from sandshift.shim.migration.books import CHANNEL_NOTE
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.source import Source
from sandshift.vmm.fake import FakeMachine
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import SANDBOX, FakeHost, HostClient, TwoHosts, channel, two_hosts

STOP, RESUME = 1, 2


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


def destination_of(hosts: TwoHosts) -> Destination:
    assert hosts.destination.server is not None
    active = hosts.destination.server.desk.active
    assert isinstance(active, Destination)
    return active


def source_of(hosts: TwoHosts) -> Source:
    assert hosts.source.server is not None
    active = hosts.source.server.desk.active
    assert isinstance(active, Source)
    return active


async def restart(host: FakeHost) -> HostClient:
    await host.stop()
    await host.start()
    return await host.client()


async def begin_again(hosts: TwoHosts, host: FakeHost) -> None:
    if host is hosts.source:
        await hosts.s.connection.close()
        hosts.s = await restart(host)
    else:
        await hosts.d.connection.close()
        hosts.d = await restart(host)


async def die_in_the_start(hosts: TwoHosts, *, before_cont: bool) -> None:
    """The destination's shim is killed around `cont`: STARTING is on disk, RUNNING is not."""
    machine = destination_of(hosts).machine
    assert machine is not None
    run, at_it = machine.run_vcpus, asyncio.Event()

    async def run_and_hang(licence: object) -> None:
        if not before_cont:
            await run(licence)
        at_it.set()
        await asyncio.Event().wait()

    machine.run_vcpus = run_and_hang  # type: ignore[method-assign]
    resuming = asyncio.create_task(hosts.d.finalize(hosts.session, RESUME))
    await at_it.wait()
    resuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await resuming
    await hosts.d.connection.close()
    hosts.d = await restart(hosts.destination)


async def test_a_guest_whose_agent_never_answers_after_a_move_is_this_shim_s_for_the_next_one_too(
    hosts: TwoHosts,
) -> None:
    await hosts.ready()
    destination = destination_of(hosts)
    guest = destination.sandbox.guest
    assert guest is not None

    async def does_not_answer() -> GuestInfo:
        raise Unavailable("the guest's agent did not answer within 10 s")

    guest.info = does_not_answer  # type: ignore[method-assign]
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    await hosts.d.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=10)
    await begin_again(hosts, hosts.destination)
    await ready_again(hosts.d)
    assert hosts.runners() == ["destination"]


@pytest.mark.parametrize("asked", ["migration_info", "run_state"])
async def test_a_vm_that_ends_while_the_next_shim_asks_it_ends_its_sandbox(
    hosts: TwoHosts, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hosts.prepare()
    await hosts.source.stop()
    process = hosts.source.process

    async def is_gone(_machine: FakeMachine) -> object:
        process.die()
        raise Unavailable(f"QEMU is gone or hung up during {asked}")

    monkeypatch.setattr(FakeMachine, asked, is_gone)
    await hosts.source.start()
    await hosts.s.connection.close()
    hosts.s = await hosts.source.client()
    assert (await hosts.s.status()).session.state == "Failed"
    waited = await hosts.s.sandbox.wait_sandbox(
        sandbox_pb2.WaitSandboxRequest(sandbox_id=SANDBOX), timeout_s=20
    )
    assert waited.exit_status == 137


async def ready_again(client: HostClient) -> None:
    """Until the shim takes the guest for its own, which it does after it has told that the guest runs."""
    request = sandbox_pb2.SandboxStatusRequest(sandbox_id=SANDBOX)
    async with asyncio.timeout(20):
        while (await client.sandbox.sandbox_status(request)).info["sandshift.life"] != "ready":
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("awaits", [True, False], ids=["CreateSandbox", "no CreateSandbox"])
async def test_a_guest_that_was_started_before_the_shim_died_has_arrived_afterwards(
    tmp_path: Path, *, awaits: bool
) -> None:
    """hcsshim's orchestrators import into a shim that nobody has asked for a sandbox (contract 4.3)."""
    async with two_hosts(tmp_path, awaits=awaits) as hosts:
        await hosts.ready()
        await die_in_the_start(hosts, before_cont=False)
        exited = ("BLACKOUT_EXITED", "SUCCESS")
        assert exited in await hosts.d.phases(hosts.session, exited)
        await ready_again(hosts.d)
        await hosts.d.finalize(hosts.session, RESUME)
        await hosts.s.finalize(hosts.session, STOP)
        assert hosts.runners() == ["destination"]


async def test_a_destination_killed_after_the_transfer_asks_the_source_for_the_right_again(
    hosts: TwoHosts,
) -> None:
    await hosts.ready()
    async with asyncio.timeout(10):
        while not destination_of(hosts).session.heard:
            await asyncio.sleep(0)
    await begin_again(hosts, hosts.destination)
    assert destination_of(hosts).session.heard
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    assert hosts.runners() == ["destination"]


async def test_streams_go_on_where_the_source_ended_though_the_shim_died_in_between(hosts: TwoHosts) -> None:
    source = hosts.source.server
    assert source is not None
    process = source.sandbox.processes.adopt("job", 7, ["/bin/job"], {})
    process.outputs[1].take(0, b"said on the source\n")
    await hosts.ready()
    await die_in_the_start(hosts, before_cont=True)
    await hosts.d.finalize(hosts.session, RESUME)
    destination = destination_of(hosts)
    await destination.settled()
    assert destination.sandbox.processes.get("job").outputs[1].base == len(b"said on the source\n")


async def test_a_shim_that_begins_in_the_switchover_still_knows_what_was_delivered(hosts: TwoHosts) -> None:
    source = hosts.source.server
    assert source is not None
    process = source.sandbox.processes.adopt("job", 7, ["/bin/job"], {1: 100})
    process.outputs[1].take(100, b"twenty bytes of text")
    source.sandbox.model = source.sandbox.frozen_model()
    await hosts.prepare()
    machine = source_of(hosts).machine
    assert machine is not None
    there = asyncio.Event()

    async def never() -> None:
        there.set()
        await asyncio.Event().wait()

    machine.switch_over = never  # type: ignore[method-assign]
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    moving = asyncio.create_task(hosts.s.migration.transfer_sandbox(request, timeout_s=10))
    await there.wait()
    moving.cancel()
    await hosts.s.connection.close()
    hosts.s = await restart(hosts.source)
    await asyncio.gather(hosts.s.migration.transfer_sandbox(request, timeout_s=10))
    assert source_of(hosts).offsets == {("job", 1): 120, ("job", 2): 0}
    assert await hosts.s.phases(hosts.session, ("DONE", "SUCCESS")) == [
        ("SETUP_DONE", "SUCCESS"),
        ("BLACKOUT_STARTED", "SUCCESS"),
        ("OFFLINE_DONE", "SUCCESS"),
        ("DONE", "SUCCESS"),
    ]


async def test_offsets_of_the_model_s_processes_are_those_of_the_files(hosts: TwoHosts) -> None:
    assert hosts.source.server is not None
    processes = hosts.source.server.sandbox.processes
    processes.adopt("a.b", 7, ["/bin/job"], {1: 5}).outputs[1].take(5, b"xyz")
    assert processes.offsets_on_disk() == {("a.b", 1): 8, ("a.b", 2): 0}
    assert processes.as_model() == (Process("a.b", 7, ("/bin/job",)),)


async def test_the_report_still_says_how_the_transfer_ended(hosts: TwoHosts) -> None:
    await hosts.ready()
    await begin_again(hosts, hosts.source)
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    answer = await hosts.s.shim.report(shim_pb2.ReportRequest(session_id=hosts.session))
    assert json.loads(answer.report)["outcome"] == "success"


async def test_a_sandbox_that_has_moved_away_is_still_known_to_have(hosts: TwoHosts) -> None:
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    await begin_again(hosts, hosts.source)
    status = await hosts.s.status()
    assert (status.vm_state, status.moved_to) == ("stopped", "session session-1, 127.0.0.1")
    waited = await hosts.s.sandbox.wait_sandbox(
        sandbox_pb2.WaitSandboxRequest(sandbox_id=SANDBOX), timeout_s=20
    )
    assert waited.exit_status == 255


async def test_a_vm_that_died_while_no_shim_was_there_ends_its_sandbox(hosts: TwoHosts) -> None:
    await hosts.prepare()
    await hosts.source.stop()
    hosts.source.process.die()
    await hosts.source.start()
    await hosts.s.connection.close()
    hosts.s = await hosts.source.client()
    assert (await hosts.s.status()).session.state == "Failed"
    waited = await hosts.s.sandbox.wait_sandbox(
        sandbox_pb2.WaitSandboxRequest(sandbox_id=SANDBOX), timeout_s=20
    )
    assert waited.exit_status == 137
    failed = ("FAILED", "SOURCE_FAILED")
    assert await hosts.s.phases(hosts.session, failed) == [failed]


async def test_a_destination_that_gave_an_import_up_takes_another_after_a_restart(hosts: TwoHosts) -> None:
    await hosts.prepare()
    for client, action in ((hosts.d, STOP), (hosts.s, RESUME)):
        await client.finalize(hosts.session, action)
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    await begin_again(hosts, hosts.destination)
    hosts.session = "session-2"
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["destination"]


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_channel_that_did_not_outlive_the_shim_fails_the_session_at_once(
    hosts: TwoHosts, side: str
) -> None:
    await hosts.prepare()
    await hosts.connect()
    host = getattr(hosts, side)
    active = source_of(hosts) if side == "source" else destination_of(hosts)
    await active.books.note(CHANNEL_NOTE, (0).to_bytes(8, "big"))
    client = await restart(host)
    status = await client.status()
    assert status.session.state == "Failed"
    assert "did not outlive the shim" in status.session.failure
    request = m.TransferSandboxRequest(session_id=hosts.session)
    with pytest.raises(ttrpc.StatusError) as told:
        await client.migration.transfer_sandbox(request, timeout_s=5)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    await client.connection.close()


async def test_the_receipt_of_a_side_whose_vm_is_dead_claims_nothing(hosts: TwoHosts) -> None:
    await hosts.ready()
    destination = destination_of(hosts)
    destination.sandbox.end_expected = True  # The news of its death is still on the way.
    hosts.destination.process.die()
    status = await hosts.d.status()
    assert status.session.cell == Cell.REFUSED.value
    assert status.vm_state == "dead"


async def test_a_vm_that_does_not_answer_does_not_hide_its_session(hosts: TwoHosts) -> None:
    await hosts.prepare()
    assert (await hosts.d.status()).vm_state == "incoming"
    machine = destination_of(hosts).machine
    assert machine is not None

    async def silent() -> None:
        raise Unavailable("QMP did not answer within 10 s")

    machine.run_state = silent  # type: ignore[assignment,method-assign]
    status = await hosts.d.status()
    assert (status.vm_state, status.session.state) == ("no answer", "DestinationPrepared")


async def test_the_blackout_counts_what_the_source_s_disk_takes(hosts: TwoHosts) -> None:
    await hosts.prepare()
    books = source_of(hosts).books
    write = books.write_records

    async def slowly(records: list[Record]) -> None:
        if records[-1].handover and records[-1].cell is Cell.OPEN:
            await asyncio.sleep(0.3)  # The disk's time, not the test's.
        await write(records)

    books.write_records = slowly  # type: ignore[method-assign]
    await hosts.connect()
    await hosts.transfer()
    await hosts.d.finalize(hosts.session, RESUME)
    assert await hosts.blackout_ms() >= 300


async def test_the_blackout_counts_the_time_before_a_receipt_was_carried(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, Limits(handover_frame_s=0.3)) as hosts:  # Waited for once: nobody answers.
        await hosts.ready(o.InitializeOptions(memory_transport=1))
        for active in (source_of(hosts), destination_of(hosts)):
            assert active.session.channel is not None
            active.session.channel.cut()
        await asyncio.sleep(0.3)  # The guest stands still, and that is what is measured.
        with pytest.raises(ttrpc.StatusError):
            await hosts.s.finalize(hosts.session, STOP, (await hosts.d.status()).session.receipt)
        await hosts.d.finalize(hosts.session, RESUME, (await hosts.s.status()).session.receipt)
        assert await hosts.blackout_ms() >= 300
        assert destination_of(hosts).blackout is not None


@pytest.mark.parametrize("with_socket", [False, True])
async def test_the_move_by_which_a_guest_came_is_not_taken_for_the_one_that_is_to_take_it_away(
    hosts: TwoHosts, with_socket: bool
) -> None:
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    for side in (hosts.s, hosts.d):
        await side.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    await hosts.d.migration.prepare_and_export_sandbox(m.PrepareAndExportSandboxRequest(session_id="onward"))
    if with_socket:
        near, far = channel()
        with near, far:
            await hosts.d.give_socket("onward", near)
    await begin_again(hosts, hosts.destination)
    status = await hosts.d.status()
    assert (status.session.session_id, status.session.state) == (
        "onward",
        "SocketReady" if with_socket else "SourceExported",
    )
    assert status.vm_state == "running"
    await hosts.d.migration.cancel(m.CancelRequest(session_id="onward"))
    assert (await hosts.d.status()).session.state == "Cancelled"
    await hosts.d.finalize("onward", RESUME)
    assert (await hosts.d.status()).vm_state == "running"


@pytest.mark.full
async def test_a_vm_that_dies_as_it_starts_the_guest_is_lost_and_its_session_can_be_closed(
    hosts: TwoHosts,
) -> None:
    await hosts.ready()
    machine = destination_of(hosts).machine
    assert machine is not None
    run = machine.run_vcpus

    async def run_and_die(licence: object) -> None:
        await run(licence)
        hosts.destination.process.die()

    machine.run_vcpus = run_and_die  # type: ignore[method-assign]
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.d.finalize(hosts.session, RESUME)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    assert "an operator decides" in told.value.message
    assert (await hosts.d.status()).session.cell == Cell.LOST.value
    await hosts.d.migration.cancel(m.CancelRequest(session_id=hosts.session))
    await hosts.d.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    status = await hosts.d.shim.status(shim_pb2.StatusRequest(session_id=hosts.session))
    assert (status.session.active, status.session.cell) == (False, Cell.LOST.value)
    assert hosts.runners() == []


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_that_there_is_a_channel_and_which_one_are_on_disk_together(hosts: TwoHosts, side: str) -> None:
    """A shim killed right after the record of its socket finds the channel all the same."""
    await hosts.prepare()
    host = getattr(hosts, side)
    active = source_of(hosts) if side == "source" else destination_of(hosts)
    write, seen = active.books.write_records, []

    async def look_at_the_disk(records: list[Record]) -> None:
        await write(records)
        if records[-1].state is State.SOCKET_READY:
            seen.append(journals.replay(host.places.journal_file.read_bytes()).state)

    active.books.write_records = look_at_the_disk  # type: ignore[method-assign]
    await hosts.connect()
    assert [CHANNEL_NOTE in state.notes for state in seen] == [True]


async def test_a_note_of_a_channel_that_was_not_taken_after_all_is_not_followed(hosts: TwoHosts) -> None:
    await hosts.prepare()
    active = source_of(hosts)
    write = active.books.write_records

    async def full(records: list[Record]) -> None:
        raise Unavailable("the disk is full")

    active.books.write_records = full  # type: ignore[method-assign]
    ends = channel()
    with ends[0], ends[1]:
        with pytest.raises(ttrpc.StatusError, match="the disk is full"):
            await hosts.s.give_socket(hosts.session, ends[0])
        active.books.write_records = write  # type: ignore[method-assign]
        await active.books.note("after", b"1")
        await begin_again(hosts, hosts.source)
        assert CHANNEL_NOTE in source_of(hosts).books.state.notes
        assert source_of(hosts).session.channel is None
        await hosts.give_both(*ends)
    await hosts.transfer()
    await hosts.d.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["destination"]
