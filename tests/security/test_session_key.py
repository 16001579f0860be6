"""The session key: in no log, no message, no name, and in no file once its session has ended."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.session import saved
from sandshift.session.ids import SessionId
from sandshift.session.statement import Seal
from sandshift.shim.migration import books
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import FakeHost, TwoHosts, two_hosts

STOP, RESUME = 1, 2


@pytest.fixture
async def hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[TwoHosts]:
    with caplog.at_level(logging.DEBUG):
        async with two_hosts(tmp_path) as both:
            yield both


def shapes_of(key: bytes) -> list[bytes]:
    """The key as it could be written: raw, hexadecimal, base64, as Python shows bytes, and each half of these."""
    whole = [
        key,
        key.hex().encode(),
        key.hex().upper().encode(),
        base64.b64encode(key).rstrip(b"="),
        base64.urlsafe_b64encode(key).rstrip(b"="),
        repr(key)[2:-1].encode(),
    ]
    return [part for one in whole for part in (one[: len(one) // 2], one[len(one) // 2 :])]


def shows(data: bytes, key: bytes) -> bool:
    return any(shape in data for shape in shapes_of(key))


def files_with(key: bytes, *folders: str) -> set[str]:
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    assert not any(shows(str(path).encode(), key) for path in paths)
    return {path.name for path in paths if path.is_file() and shows(path.read_bytes(), key)}


def places_of(hosts: TwoHosts) -> list[str]:
    return [
        folder
        for host in (hosts.source, hosts.destination)
        for folder in (host.config.places.run_dir, host.config.places.state_dir)
    ]


async def key_of(hosts: TwoHosts) -> bytes:
    """Everything is on the destination; the key, from the saved state."""
    config = (await hosts.export()).config
    await hosts.import_config(config)
    request = m.PrepareSandboxRequest(session_id=hosts.session)
    await hosts.d.migration.prepare_sandbox(request, timeout_s=10)
    await hosts.connect()
    await hosts.transfer()
    return saved.decode(config, expected=SessionId(hosts.session)).session_key


async def said_by(hosts: TwoHosts) -> bytes:
    """All that a caller can be told of the session."""
    said = []
    for client in (hosts.s, hosts.d):
        said.append((await client.shim.status(shim_pb2.StatusRequest())).SerializeToString())
        async with asyncio.timeout(10):
            stream = client.migration.notifications(m.NotificationsRequest(session_id=hosts.session))
            async for response in stream:
                said.append(response.SerializeToString())
                if response.notification.phase == 6:
                    break
    return b"".join(said)


async def clean_up(hosts: TwoHosts) -> None:
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))


async def test_while_a_session_is_open_its_key_is_in_its_own_two_files_and_nowhere_else(
    hosts: TwoHosts, caplog: pytest.LogCaptureFixture
) -> None:
    key = await key_of(hosts)
    assert files_with(key, *places_of(hosts)) == {"session.key", "session.config"}
    assert not shows(await said_by(hosts), key)
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    logging.getLogger("sandshift.shim").debug("the log is listened to")
    assert "the log is listened to" in caplog.text
    assert not shows(caplog.text.encode(), key)


@pytest.mark.parametrize("ending", ["moved", "undone"])
async def test_after_a_session_its_key_is_nowhere(
    hosts: TwoHosts, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = await key_of(hosts)
    if ending == "moved":
        await hosts.d.finalize(hosts.session, RESUME)
        await hosts.s.finalize(hosts.session, STOP)
    else:
        await hosts.s.finalize(hosts.session, RESUME)
        await hosts.d.finalize(hosts.session, STOP)
    await clean_up(hosts)
    assert files_with(key, str(tmp_path)) == set()
    reports = [
        (await client.shim.report(shim_pb2.ReportRequest(session_id=hosts.session))).report
        for client in (hosts.s, hosts.d)
    ]
    assert all(len(report) > 100 and not shows(report, key) for report in reports)
    assert not shows(caplog.text.encode(), key)


async def test_after_a_restart_the_key_is_said_no_more_than_before(
    hosts: TwoHosts, caplog: pytest.LogCaptureFixture
) -> None:
    key = await key_of(hosts)
    for host in (hosts.source, hosts.destination):
        await host.stop()
        await host.start()
    await hosts.reconnect()
    assert not shows(await said_by(hosts), key)
    assert not shows(caplog.text.encode(), key)
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    await clean_up(hosts)
    assert files_with(key, *places_of(hosts)) == set()


@pytest.mark.parametrize("how", ["another key", "a missing key"])
async def test_a_journal_and_a_key_that_do_not_belong_together_are_left_and_not_shown(
    hosts: TwoHosts, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = await key_of(hosts)
    await hosts.source.stop()
    path = books.key_file(hosts.source.places)
    if how == "another key":
        path.write_bytes(b"k" * 32)
    else:
        path.unlink()
    journal = hosts.source.places.journal_file.read_bytes()
    with pytest.raises(Exception, match=r"session\.key") as told:
        await start(hosts.source)
    assert type(told.value).__name__ == "Damaged"
    assert not shows(str(told.value).encode(), key)
    assert not shows(caplog.text.encode(), key)
    assert hosts.source.places.journal_file.read_bytes() == journal
    assert hosts.source.process.alive


async def start(host: FakeHost) -> None:
    try:
        await host.start()
    finally:
        host.server = None


async def test_a_seal_and_a_saved_state_do_not_show_the_key_they_hold(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    state = saved.decode(config, expected=SessionId(hosts.session))
    active = hosts.source.server.desk.require_active()  # type: ignore[union-attr]
    for holder in (state, Seal("s", state.session_key), active.session.seal, active.books):
        assert not shows(repr(holder).encode(), state.session_key)


async def test_a_call_that_fails_says_nothing_of_the_key(hosts: TwoHosts) -> None:
    key = await key_of(hosts)
    for client, action, receipt in (
        (hosts.s, STOP, b"\xff" * 10),
        (hosts.d, STOP, b"\xff" * 10),
        (hosts.s, STOP, (await hosts.s.status()).session.receipt),
    ):
        with pytest.raises(ttrpc.StatusError) as told:
            await client.finalize(hosts.session, action, receipt)
        assert not shows(told.value.message.encode(), key)


def test_the_search_finds_a_key_that_is_there() -> None:
    key = bytes(range(200, 232))
    for shape in shapes_of(key):
        assert shows(b"before " + shape + b" after", key)
    assert not shows(b"nothing of it", key)
