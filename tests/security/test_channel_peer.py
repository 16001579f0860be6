"""A hostile peer on the channel: whatever it says or does not say changes no cell, and the move can still end."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.config import Limits
from sandshift.session.right_model import Record
from sandshift.session.statement import FRAME_BYTES_MAX, Cell, Seal, Statement, frame
from sandshift.session.states import Side
from sandshift.shim.migration.channel import READ_BYTES
from sandshift.shim.migration.session import FRAMES_WAITING_MAX
from sandshift.wire.containerd.sandbox_pb2 import SandboxStatusRequest
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import state_pb2
from tests.security.between import Between, between_hosts, cells, finish_by_receipts, session_of
from tests.shim.house import TwoHosts, channel, two_hosts

STOP, RESUME = 1, 2
LENGTH = struct.Struct(">I")
SIDES = ("source", "destination")
NOISE = random.Random(5).randbytes(4096)
SHORT = Limits(handover_frame_s=0.3, stall_s=0.5)
WRONG_KEY = b"w" * 32


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path, SHORT) as both:
        yield both


def peer_cell(side: str) -> Cell:
    """A word of the other side that would end the session, were it believed."""
    return Cell.RUNNING if side == "source" else Cell.GONE


def unsigned(hosts: TwoHosts, side: str, **changes: object) -> bytes:
    """Everything right but the HMAC."""
    seal, cell = session_of(hosts, side).seal, peer_cell(side)
    body = state_pb2.Statement(
        version=1,
        session_id=seal.session_id,
        key_id=seal.key_id,
        side=state_pb2.Side.ValueType(cell.side.value),
        cell=state_pb2.Cell.ValueType(cell.value),
    )
    for name, value in changes.items():
        setattr(body, name, value)
    return state_pb2.SignedStatement(statement=body.SerializeToString(), hmac=bytes(32)).SerializeToString()


ATTACKS = {
    "garbage": (lambda _hosts, _side: NOISE, r"a handover frame of \d+ bytes"),
    "a frame of no bytes": (lambda _hosts, _side: LENGTH.pack(0), "a handover frame of 0 bytes"),
    "an oversized frame": (
        lambda _hosts, _side: LENGTH.pack(FRAME_BYTES_MAX + 1) + NOISE,
        "a handover frame of 65537 bytes; 1 to 65536 are allowed",
    ),
    "the longest length": (lambda _hosts, _side: b"\xff" * 4, "a handover frame of 4294967295 bytes"),
    "no statement": (lambda _hosts, _side: frame(NOISE), "is not a statement"),
    "nobody's signature": (lambda hosts, side: frame(unsigned(hosts, side)), "is not signed with its key"),
    "another key's signature": (
        lambda hosts, side: frame(Seal(hosts.session, WRONG_KEY).sign(Statement(peer_cell(side)))),
        "is of another run of session 'session-1'",
    ),
    "another session's statement": (
        lambda hosts, side: frame(unsigned(hosts, side, session_id="another")),
        "is of session 'another', not of 'session-1'",
    ),
    "a version of the future": (
        lambda hosts, side: frame(unsigned(hosts, side, version=2)),
        "has version 2; this shim knows 1",
    ),
    "its own words": (
        lambda hosts, side: frame(session_of(hosts, side).receipt()),
        "is not of the (source|destination)",
    ),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_does_not_verify_closes_the_channel_and_changes_nothing(
    hosts: TwoHosts, attack: str, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, words = ATTACKS[attack]
    async with between_hosts(hosts) as between:
        before = cells(hosts)
        with caplog.at_level(logging.WARNING, "sandshift"):
            await between.say(side, make(hosts, side))
            await asyncio.wait_for(between.closed[side].wait(), 5)
        assert cells(hosts) == before == ("OPEN", "READY")
        assert session_of(hosts, side).state.value == "TransferCompleted"
        lost = [
            record.getMessage() for record in caplog.records if "the channel is lost" in record.getMessage()
        ]
        assert len(lost) == 1
        assert re.search(words, lost[0]), lost
        assert hosts.runners() == []
        await finish_by_receipts(hosts)
        assert hosts.runners() == ["destination"]


async def half_a_frame(between: Between, side: str) -> None:
    await between.say(side, LENGTH.pack(1000) + b"half")


@pytest.mark.parametrize("side", SIDES)
async def test_half_a_frame_and_then_silence_is_a_peer_that_does_not_answer(
    hosts: TwoHosts, side: str
) -> None:
    async with between_hosts(hosts) as between:
        await half_a_frame(between, side)
        with pytest.raises(ttrpc.StatusError, match="the source does not answer") as told:
            await hosts.d.finalize(hosts.session, RESUME)
        assert told.value.code is ttrpc.Code.UNAVAILABLE
        assert cells(hosts) == ("OPEN", "READY")
        await hosts.s.finalize(hosts.session, RESUME)
        assert hosts.runners() == ["source"]


@pytest.mark.parametrize("side", SIDES)
async def test_half_a_frame_and_then_the_end_is_a_lost_channel(
    hosts: TwoHosts, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with between_hosts(hosts) as between:
        await half_a_frame(between, side)
        between.hang_up(side)
        await asyncio.wait_for(between.closed[side].wait(), 5)
        async with asyncio.timeout(5):
            while not session_of(hosts, side).channel.lost:
                await asyncio.sleep(0.001)
        assert "the channel is lost: closed by the other side" in caplog.text
        assert cells(hosts) == ("OPEN", "READY")
        await hosts.s.finalize(hosts.session, RESUME)
        assert hosts.runners() == ["source"]


async def test_a_peer_that_never_answers_leaves_the_right_where_it_is(hosts: TwoHosts) -> None:
    async with between_hosts(hosts):
        for client, action in ((hosts.d, RESUME), (hosts.s, STOP)):
            with pytest.raises(ttrpc.StatusError, match="does not answer") as told:
                await client.finalize(hosts.session, action)
            assert told.value.code is ttrpc.Code.UNAVAILABLE
        assert cells(hosts) == ("OPEN", "READY")
        await hosts.s.finalize(hosts.session, RESUME)
        assert hosts.runners() == ["source"]


async def test_frames_of_an_earlier_run_of_the_session_are_refused(
    hosts: TwoHosts, caplog: pytest.LogCaptureFixture
) -> None:
    async with between_hosts(hosts):
        old = {side: session_of(hosts, side).receipt() for side in SIDES}
        await hosts.s.finalize(hosts.session, RESUME)
        with pytest.raises(ttrpc.StatusError):
            await hosts.d.finalize(hosts.session, RESUME, (await hosts.s.status()).session.receipt)
        await hosts.d.finalize(hosts.session, STOP)
        for client in (hosts.s, hosts.d):
            await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    async with between_hosts(hosts) as between:
        await between.say("source", frame(old["destination"]))
        await between.say("destination", frame(old["source"]))
        for side in SIDES:
            await asyncio.wait_for(between.closed[side].wait(), 5)
        assert caplog.text.count("is of another run of session 'session-1'") == 2
        assert cells(hosts) == ("OPEN", "READY")
        with pytest.raises(ttrpc.StatusError, match="peer_receipt is of another run") as told:
            await hosts.s.finalize(hosts.session, STOP, old["destination"])
        assert told.value.code is ttrpc.Code.INVALID_ARGUMENT
        await finish_by_receipts(hosts)
        assert hosts.runners() == ["destination"]


async def test_older_frames_of_this_session_move_the_right_nowhere(hosts: TwoHosts) -> None:
    async with between_hosts(hosts) as between:
        ready, opened = (session_of(hosts, side).receipt() for side in ("destination", "source"))
        between.passes = True
        await hosts.d.finalize(hosts.session, RESUME)
        between.hold()
        async with asyncio.timeout(5):
            while session_of(hosts, "source").party.cell is Cell.OPEN:
                await asyncio.sleep(0.001)
        for _ in range(3):
            await between.say("source", frame(ready))
            await between.say("destination", frame(opened))
        await hosts.s.status()
        assert cells(hosts) == ("RELEASED", "RUNNING")
        assert hosts.runners() == ["destination"]
        await hosts.s.finalize(hosts.session, STOP, (await hosts.d.status()).session.receipt)
        assert (await hosts.s.status()).vm_state == "stopped"


async def test_a_flood_of_frames_is_read_no_faster_than_it_is_handled(hosts: TwoHosts) -> None:
    """Frames that verify, seen before and sent again and again, as only a replay or the other host itself can, while the
    disk is slow."""
    async with between_hosts(hosts) as between:
        opened = frame(session_of(hosts, "source").receipt())
        active = hosts.destination.server.desk.require_active()  # type: ignore[union-attr]
        write, go_on = active.books.write_records, asyncio.Event()

        async def slowly(records: list[Record]) -> None:
            await go_on.wait()
            await write(records)

        active.books.write_records = slowly  # type: ignore[method-assign]
        stopping = asyncio.create_task(hosts.d.finalize(hosts.session, STOP))
        flooding = asyncio.create_task(flood(between, opened * 1000))
        most = 0
        asked = 0
        while asked < 20 or most < FRAMES_WAITING_MAX:
            async with asyncio.timeout(20):
                await hosts.d.sandbox.sandbox_status(SandboxStatusRequest(sandbox_id="box"))
            most = max(most, len(active.session._background))
            asked += 1
        assert FRAMES_WAITING_MAX <= most <= FRAMES_WAITING_MAX + READ_BYTES // len(opened)
        flooding.cancel()
        go_on.set()
        await stopping
        await hosts.s.finalize(hosts.session, RESUME)
        assert hosts.runners() == ["source"]


async def flood(between: Between, frames: bytes) -> None:
    while True:
        await between.say("destination", frames)


async def give_to_nobody(hosts: TwoHosts, side: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`side` gets an end of a connection whose other end is ours."""
    given, ours = channel()
    await getattr(hosts, side[0]).give_socket(hosts.session, given)
    given.close()
    return await asyncio.open_connection(sock=ours)


@pytest.mark.parametrize("side", SIDES)
async def test_garbage_in_the_place_of_memory_ends_the_transfer_and_the_guest_runs_on(
    hosts: TwoHosts, side: str
) -> None:
    await hosts.prepare()
    _reader, writer = await give_to_nobody(hosts, side)
    client = getattr(hosts, side[0])
    request = m.TransferSandboxRequest(session_id=hosts.session)
    moving = asyncio.create_task(client.migration.transfer_sandbox(request, timeout_s=10))
    writer.write(NOISE)
    with pytest.raises(ttrpc.StatusError) as told:
        await moving
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    assert (await client.status()).session.state == "Failed"
    writer.close()
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def test_a_peer_that_takes_no_memory_is_given_up_after_the_stall_limit(hosts: TwoHosts) -> None:
    await hosts.prepare()
    _reader, writer = await give_to_nobody(hosts, "source")
    request = m.TransferSandboxRequest(session_id=hosts.session)
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.s.migration.transfer_sandbox(request, timeout_s=10)
    assert told.value.code is ttrpc.Code.DEADLINE_EXCEEDED
    writer.close()
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def test_a_source_without_the_session_key_is_not_taken_in(hosts: TwoHosts, tmp_path: Path) -> None:
    """Somebody answers for the source who has everything but the key: the destination's VM refuses the stream."""
    await hosts.prepare()
    active = hosts.source.server.desk.require_active()  # type: ignore[union-attr]
    active.books.session_key = WRONG_KEY
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    outcomes = await asyncio.gather(
        hosts.d.migration.transfer_sandbox(request, timeout_s=10),
        hosts.s.migration.transfer_sandbox(request, timeout_s=10),
        return_exceptions=True,
    )
    assert all(isinstance(outcome, ttrpc.StatusError) for outcome in outcomes)
    assert (await hosts.d.status()).session.cell == Cell.REFUSED.value
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


def test_the_words_above_are_those_of_the_side_that_would_be_believed() -> None:
    assert (peer_cell("source").side, peer_cell("destination").side) == (Side.DESTINATION, Side.SOURCE)


BIG, OLD = (1 << 64) - 1, 1
RECORDS = {
    "times beyond all clocks": state_pb2.HandoverRecord(stopped_at_unix_us=BIG, stopped_for_us=BIG),
    "times before all clocks": state_pb2.HandoverRecord(stopped_at_unix_us=OLD, stopped_for_us=BIG // 2),
    "offsets that no stream has": state_pb2.HandoverRecord(
        streams=[
            state_pb2.StreamOffset(process_id="job", stream=1, offset=BIG),
            state_pb2.StreamOffset(process_id="../../job", stream=BIG >> 32, offset=1),
            state_pb2.StreamOffset(process_id="job", stream=0, offset=1),
        ]
    ),
    "a digest that was not asked for": state_pb2.HandoverRecord(memory_digest=NOISE),
}


async def moved_with_record(hosts: TwoHosts, said: bytes) -> None:
    """Everything is on the destination, and the source describes it with these bytes."""
    await hosts.prepare()
    active = hosts.source.server.desk.require_active()  # type: ignore[union-attr]
    active.handover = lambda: said  # type: ignore[union-attr,method-assign]
    await hosts.connect()
    await hosts.transfer()


@pytest.mark.parametrize("name", RECORDS)
async def test_a_source_with_the_key_that_says_what_cannot_be_does_not_stop_the_guest(
    hosts: TwoHosts, name: str, tmp_path: Path
) -> None:
    """The source was trusted with the guest; what it says of times and streams is still held to sense."""
    source = hosts.source.server.sandbox  # type: ignore[union-attr]
    source.processes.adopt("job", 7, ["/bin/job"], {}).outputs[1].take(0, b"said on the source")
    await moved_with_record(hosts, RECORDS[name].SerializeToString())
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    assert hosts.runners() == ["destination"]
    assert (await hosts.d.status()).vm_state == "running"
    written = {path.name for path in tmp_path.rglob("*.log") if "destination" in str(path)}
    assert all(path.startswith("job.") for path in written)


async def test_a_record_that_cannot_be_read_is_no_description_of_what_came(hosts: TwoHosts) -> None:
    await moved_with_record(hosts, b"\xff" * 100)
    with pytest.raises(ttrpc.StatusError, match="has refused the right to run for good") as told:
        await hosts.d.finalize(hosts.session, RESUME)
    assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]
