"""Too much of anything is refused with its bound named, and the shim, its session and its other callers go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

import ttrpc
from sandshift.config import Limits
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import SANDBOX, FakeHost, HostClient, TwoHosts, two_hosts

IA, FULL = ttrpc.Code.INVALID_ARGUMENT, ttrpc.Code.RESOURCE_EXHAUSTED
HEADER = struct.Struct(">IIBB")
"""ttrpc's: length, stream, type (1: request), flags."""
MESSAGE_BYTES_MAX = 4 << 20
SUBSCRIBERS_MAX = 3


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path, Limits(subscribers_max=SUBSCRIBERS_MAX, containers_max=4)) as both:
        yield both


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[FakeHost]:
    alone = FakeHost(tmp_path, "alone")
    await alone.start()
    yield alone
    await alone.stop()
    for process in list(alone.world.processes.values()):
        process.die()


async def raw(host: FakeHost) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(host.socket_path)


async def test_a_message_of_more_than_4_mib_costs_its_call_alone(host: FakeHost) -> None:
    reader, writer = await raw(host)
    size = MESSAGE_BYTES_MAX + 1
    writer.write(HEADER.pack(size, 1, 1, 0) + bytes(size))
    await writer.drain()
    length, stream, kind, _flags = HEADER.unpack(await asyncio.wait_for(reader.readexactly(HEADER.size), 10))
    answer = await reader.readexactly(length)
    assert (stream, kind) == (1, 2)
    assert b"exceeds" in answer or b"maximum" in answer, answer
    client = await host.client()
    assert (await client.status()).sandbox_id == SANDBOX
    await client.connection.close()
    writer.close()


@pytest.mark.parametrize("seed", range(8))
async def test_noise_on_the_shim_s_socket_ends_nothing_but_its_own_connection(
    host: FakeHost, seed: int
) -> None:
    noise = random.Random(seed).randbytes(64 << 10)
    reader, writer = await raw(host)
    with contextlib.suppress(OSError):
        writer.write(noise)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
    writer.close()
    client = await host.client()
    await client.start_sandbox()
    assert (await client.status()).vm_state == "running"
    await client.connection.close()


async def test_connections_that_say_nothing_do_not_keep_others_out(host: FakeHost) -> None:
    silent = [(await raw(host))[1] for _ in range(200)]
    for one in silent:
        one.write(b"\0")  # Not even a header.
    client = await host.client()
    assert (await client.status()).sandbox_id == SANDBOX
    await client.connection.close()
    for one in silent:
        one.close()


async def test_a_sandbox_that_is_too_much_to_describe_does_not_move(host: FakeHost) -> None:
    client = await host.client()
    request = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX)
    request.annotations["essay"] = "x" * (MESSAGE_BYTES_MAX - (60 << 10))
    await client.sandbox.create_sandbox(request)
    await client.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))
    with pytest.raises(ttrpc.StatusError, match="bytes and at most 4128768 fit into a message") as told:
        await client.migration.prepare_and_export_sandbox(
            m.PrepareAndExportSandboxRequest(session_id="s"), timeout_s=20
        )
    assert told.value.code is FULL
    assert not (await client.status()).session.session_id
    assert not host.places.journal_file.exists()
    await client.connection.close()


NO_SESSION_IDS = {
    "none": "",
    "too long": "x" * 257,
    "too long in bytes": "\N{EURO SIGN}" * 86,
    "a line break": "a\nb",
    "a NUL": "a\0b",
    "an override of the writing direction": "a\u202eb",
}


@pytest.mark.parametrize("name", NO_SESSION_IDS)
async def test_a_session_id_that_is_none_is_refused_by_every_call(
    hosts: TwoHosts, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sandshift")
    named, migration = NO_SESSION_IDS[name], hosts.s.migration
    calls = (
        migration.prepare_and_export_sandbox(m.PrepareAndExportSandboxRequest(session_id=named)),
        migration.import_sandbox(m.ImportSandboxRequest(session_id=named, sandbox_id_or_config=b"box")),
        migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=named)),
        migration.transfer_sandbox(m.TransferSandboxRequest(session_id=named)),
        hosts.s.finalize(named, 1),
        migration.cancel(m.CancelRequest(session_id=named)),
        migration.cleanup(m.CleanupRequest(session_id=named)),
        hosts.s.shim.report(shim_pb2.ReportRequest(session_id=named)),
    )
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, ttrpc.StatusError), outcome
        assert outcome.code is IA, outcome
    lines = [record.getMessage() for record in caplog.records if "INVALID_ARGUMENT" in record.getMessage()]
    assert len(lines) == len(calls)
    assert all(line.isprintable() for line in lines)
    assert hosts.runners() == ["source"]


async def test_a_session_id_that_looks_like_a_path_is_part_of_none(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.session = "../../../../escaped"
    await hosts.ready()
    await hosts.d.finalize(hosts.session, 2)
    await hosts.s.finalize(hosts.session, 1)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    assert not [path for path in tmp_path.parent.rglob("*escaped*") if "escaped" in path.name]
    answer = await hosts.d.shim.report(shim_pb2.ReportRequest(session_id=hosts.session))
    assert b"escaped" in answer.report


@pytest.mark.parametrize("receipt", [bytes((64 << 10) + 1), b"\xff" * 100, random.Random(1).randbytes(500)])
async def test_a_receipt_that_is_none_is_refused_and_decides_nothing(hosts: TwoHosts, receipt: bytes) -> None:
    await hosts.ready()
    for client, action in ((hosts.s, 1), (hosts.d, 2)):
        with pytest.raises(ttrpc.StatusError, match="peer_receipt") as told:
            await client.finalize(hosts.session, action, receipt)
        assert told.value.code is IA
    assert [(await one.status()).session.state for one in (hosts.s, hosts.d)] == ["TransferCompleted"] * 2
    await hosts.d.finalize(hosts.session, 2)
    assert hosts.runners() == ["destination"]


OPTIONS = {
    "throttling_scale": o.MemoryTransferThrottleParams(throttling_scale=float("nan")),
    "minimum_throttle_percentage": o.MemoryTransferThrottleParams(minimum_throttle_percentage=4_000_000_000),
}


@pytest.mark.parametrize("field", OPTIONS)
async def test_options_out_of_their_range_are_named_with_it(hosts: TwoHosts, field: str) -> None:
    with pytest.raises(ttrpc.StatusError, match=field) as told:
        await hosts.export(
            o.InitializeOptions(memory_transport=1, memory_transfer_throttle_params=OPTIONS[field])
        )
    assert told.value.code is IA
    assert not (await hosts.s.status()).session.session_id


@pytest.mark.parametrize(
    "wait", [Duration(seconds=1 << 60), Duration(seconds=5, nanos=-5), Duration(nanos=2_000_000_000)]
)
async def test_a_time_that_is_none_is_refused(hosts: TwoHosts, wait: Duration) -> None:
    await hosts.prepare()
    with pytest.raises(ttrpc.StatusError, match="timeout") as told:
        await hosts.s.migration.transfer_sandbox(
            m.TransferSandboxRequest(session_id=hosts.session, timeout=wait)
        )
    assert told.value.code is IA
    assert (await hosts.s.status()).session.state == "SourceExported"


async def test_one_subscriber_too_many_is_refused_and_takes_nobody_s_place(hosts: TwoHosts) -> None:
    await hosts.export()
    others = [await hosts.source.client() for _ in range(SUBSCRIBERS_MAX)]
    waiting = [await subscribe(hosts, one, number) for number, one in enumerate(others, 1)]
    with pytest.raises(ttrpc.StatusError, match="3 subscribers listen to this session already") as told:
        await anext(hosts.s.migration.notifications(m.NotificationsRequest(session_id=hosts.session)))
    assert told.value.code is FULL
    await others[0].connection.close()
    await subscribers(hosts, SUBSCRIBERS_MAX - 1)
    waiting.append(await subscribe(hosts, hosts.s, SUBSCRIBERS_MAX))
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for one in others:
        await one.connection.close()


async def subscribe(
    hosts: TwoHosts, client: HostClient, count: int
) -> asyncio.Future[m.NotificationsResponse]:
    """One subscriber more, the `count`th."""
    stream = client.migration.notifications(m.NotificationsRequest(session_id=hosts.session))
    first = asyncio.ensure_future(anext(stream))
    await subscribers(hosts, count)
    return first


async def subscribers(hosts: TwoHosts, count: int) -> None:
    desk = hosts.source.server.desk  # type: ignore[union-attr]
    async with asyncio.timeout(5):
        while desk._subscribers != count:
            await asyncio.sleep(0.001)


async def test_a_process_with_more_arguments_than_fit_is_refused(hosts: TwoHosts) -> None:
    for request, words in (
        (shim_pb2.RunProcessRequest(process_id="p", args=["x" * (129 << 10)]), "more than 131072 bytes"),
        (shim_pb2.RunProcessRequest(process_id="../p", args=["x"]), "container id '../p'"),
        (shim_pb2.RunProcessRequest(process_id="p" * 77, args=["x"]), "at most 76 are allowed"),
        (shim_pb2.RunProcessRequest(process_id="p"), "args is empty"),
    ):
        with pytest.raises(ttrpc.StatusError, match=words) as told:
            await hosts.s.shim.run_process(request, timeout_s=10)
        assert told.value.code is IA
    assert not (await hosts.s.status()).processes
