"""Where a session's books begin and end: a shim that is killed there, and a disk that is full there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.errors import Damaged, Unavailable
from sandshift.session import journal as journals
from sandshift.session.journal import Opened
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import Cell, key_id
from sandshift.session.states import Side, State
from sandshift.shim.durable import AppendOnlyFile, Disk
from sandshift.shim.migration import last
from sandshift.shim.migration.books import Books, key_file
from sandshift.shim.migration.session import first_ask_number
from sandshift.shim.places import Places
from sandshift.shim.serve import ShimServer
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import FakeHost, TwoHosts, two_hosts

STOP, RESUME = 1, 2
KEY = bytes(32)
OPENED = Opened("SOURCE", "s-1", "box", key_id(KEY), b"", True, b"d", 1)
FIRST = RightRecord(Side.SOURCE, "s-1", Cell.OPEN, State.SOURCE_EXPORTED)
ENDED = RightRecord(Side.SOURCE, "s-1", Cell.KEPT, State.IDLE)


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "run", tmp_path / "state", tmp_path / "statements", tmp_path / "reports")


def cleanup(hosts: TwoHosts) -> m.CleanupRequest:
    return m.CleanupRequest(session_id=hosts.session)


async def moved(hosts: TwoHosts) -> None:
    """The guest runs on the destination; no side has been cleaned up."""
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)


def test_every_life_of_a_shim_counts_its_questions_from_a_number_of_its_own() -> None:
    """An answer to a question of the process before must never be taken for one to a question of this one."""
    firsts = {first_ask_number() for _ in range(1000)}
    assert len(firsts) == 1000
    assert min(firsts) > 0  # 0: no question.
    assert 1 << 60 < max(firsts) < 1 << 63  # Half of 64 bits is left to count in.


class Killed(BaseException):
    """The process ends here."""


async def test_a_journal_is_there_with_its_first_records_or_not_at_all(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`delete` brings a shim back wherever there is a journal, and then kills no VM."""
    make = AppendOnlyFile.__init__

    def make_and_die(self: AppendOnlyFile, path: Path) -> None:
        make(self, path)
        raise Killed

    monkeypatch.setattr(AppendOnlyFile, "__init__", make_and_die)
    disk = Disk()
    with pytest.raises(Killed):
        await Books.open(places, disk, OPENED, FIRST, key=KEY, config=b"config")
    disk.close()
    assert journals.replay(places.journal_file.read_bytes()).state.right_record == FIRST


async def test_books_whose_removal_was_cut_off_are_removed(places: Places) -> None:
    disk = Disk()
    books = await Books.open(places, disk, OPENED, FIRST, key=KEY, config=b"config")
    await books.write_records([ENDED])
    key_file(places).unlink()
    assert Books.read(places, disk) is None
    assert list(places.state_dir.iterdir()) == []
    disk.close()


async def test_books_of_an_open_session_without_their_key_are_left_as_they_are(places: Places) -> None:
    disk = Disk()
    await Books.open(places, disk, OPENED, FIRST, key=KEY, config=b"config")
    key_file(places).unlink()
    with pytest.raises(Damaged, match=r"session\.key is missing beside the journal"):
        Books.read(places, disk)
    assert places.journal_file.exists()
    disk.close()


async def killed_in_cleanup(hosts: TwoHosts, at_it: asyncio.Event) -> None:
    """The destination's Cleanup hangs where `at_it` is set; there its shim is killed, and another begins."""
    cleaning = asyncio.create_task(hosts.d.migration.cleanup(cleanup(hosts), timeout_s=30))
    await at_it.wait()
    cleaning.cancel()
    await asyncio.wait([cleaning])
    await hosts.d.connection.close()
    await hosts.destination.stop()
    await hosts.destination.start()
    hosts.d = await hosts.destination.client()


async def test_a_shim_killed_before_it_wrote_how_its_session_ended_still_knows(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await moved(hosts)
    at_it = asyncio.Event()

    async def hang(*_: object) -> None:
        at_it.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(last, "keep_end", hang)
        await killed_in_cleanup(hosts, at_it)
    assert not hosts.destination.places.unfinished_session()
    assert (await hosts.d.status()).session.cell == Cell.RUNNING.value
    await hosts.d.finalize(hosts.session, RESUME)  # The same may be said again.
    await hosts.d.migration.cleanup(cleanup(hosts), timeout_s=10)
    with pytest.raises(ttrpc.StatusError, match="has ended with RESUME"):
        await hosts.d.finalize(hosts.session, STOP)
    assert hosts.runners() == ["destination"]


async def test_a_disk_that_does_not_take_how_a_session_ended_does_not_keep_it_open(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await moved(hosts)

    def full(path: Path, data: bytes) -> None:
        raise Unavailable(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(last, "write_atomically", full)
    await hosts.d.migration.cleanup(cleanup(hosts), timeout_s=10)
    assert server_of(hosts.destination).desk.active is None
    assert not key_file(hosts.destination.places).exists()
    assert "is known to this shim alone" in caplog.text
    await hosts.d.finalize(hosts.session, RESUME)  # It knows.


def server_of(host: FakeHost) -> ShimServer:
    assert host.server is not None
    return host.server
