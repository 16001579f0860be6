"""The order in which a session's journal reaches the disk, and what happens when it does not."""

import asyncio
import errno
import os

import pytest

from sandshift.errors import Unavailable
from sandshift.session import journal as journals
from sandshift.session.journal import Opened
from sandshift.session.phases import Phase, PhaseState, Told
from sandshift.session.record import Entry, Progress
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import Cell, key_id
from sandshift.session.states import Side, State
from sandshift.shim import durable
from sandshift.shim.durable import Disk
from sandshift.shim.migration.books import MISSED_MAX, Books
from sandshift.shim.places import Places

KEY = bytes(32)
FIRST = RightRecord(Side.SOURCE, "s-1", Cell.OPEN, State.SOURCE_EXPORTED)
RELEASED = RightRecord(Side.SOURCE, "s-1", Cell.RELEASED, State.TRANSFER_COMPLETED, complete=True)


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "run", tmp_path / "state", tmp_path / "statements", tmp_path / "reports")


@pytest.fixture
def disk():
    thread = Disk()
    yield thread
    thread.close()


async def opened(places, disk):
    first = Opened("SOURCE", "s-1", "box", key_id(KEY), b"", True, b"d", 1)
    return await Books.open(places, disk, first, FIRST, key=KEY, config=b"config")


def progress(number):
    moving = Told(Phase.TRANSFER_IN_PROGRESS, PhaseState.SUCCESS)
    return Entry(
        number, moving, 5, 4, Progress(number % 7, 1 << 40, 1 << 39, 1 << 38, 1 << 30, 1 << 30, 20, 300)
    )


def on_disk(places):
    return journals.replay(places.journal_file.read_bytes())


async def test_hours_of_progress_without_a_record_do_not_fill_the_journal(places, disk):
    books = await opened(places, disk)
    for number in range(1, 20_001):
        books.write_entry(progress(number))
    await books.write_records([RELEASED])
    found = on_disk(places)
    assert found.state.right_record == RELEASED
    assert found.state.entries[-1] == progress(20_000)
    assert found.torn_bytes == 0
    assert places.journal_file.stat().st_size < journals.JOURNAL_BYTES_MAX


class FailingOnce:
    """os.write that finds the disk full once, in the middle of a record."""

    def __init__(self):
        self.armed = False

    def __call__(self, descriptor, data):
        if self.armed:
            self.armed = False
            os.pwrite(descriptor, bytes(data)[:3], os.fstat(descriptor).st_size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return WRITE(descriptor, data)


WRITE = os.write


async def test_a_record_behind_one_that_could_not_be_written_is_not_acknowledged(places, disk, monkeypatch):
    books = await opened(places, disk)
    failing = FailingOnce()
    monkeypatch.setattr(durable.os, "write", failing)
    failing.armed = True
    books.write_entry(progress(1))
    with pytest.raises(
        Unavailable, match="an earlier record could not be written, so nothing was done; repeat"
    ):
        await books.write_records([RELEASED])
    assert on_disk(places).state.right_record == FIRST
    await books.write_records([RELEASED])
    found = on_disk(places)
    assert (found.state.right_record, found.torn_bytes) == (RELEASED, 0)


async def test_a_torn_record_that_cannot_be_cut_off_is_cut_off_by_the_repeat(places, disk, monkeypatch):
    books = await opened(places, disk)
    failing, cut = FailingOnce(), os.ftruncate
    monkeypatch.setattr(durable.os, "write", failing)
    failing.armed = True

    def refused(_descriptor, _size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable.os, "ftruncate", refused)
    with pytest.raises(Unavailable, match="No space left on device"):
        await books.write_records([RELEASED])
    monkeypatch.setattr(durable.os, "ftruncate", cut)
    assert on_disk(places).torn_bytes == 3
    await books.write_records([RELEASED])
    found = on_disk(places)
    assert (found.state.right_record, found.torn_bytes) == (RELEASED, 0)


async def test_what_is_told_while_the_journal_is_read_again_is_in_it_and_the_next_record_follows(
    places, disk
):
    books = await opened(places, disk)
    reading = asyncio.ensure_future(books.last_record())
    await asyncio.sleep(0)
    books.write_entry(progress(1))
    assert (await reading).cell is Cell.OPEN
    await books.write_records([RELEASED])
    found = on_disk(places)
    assert found.state.right_record == RELEASED
    assert [entry.message_id for entry in found.state.entries] == [1]


class Full:
    """os.write on a disk that has no room until it is given some."""

    full = True

    def __call__(self, descriptor, data):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return WRITE(descriptor, data)


def phase(number, which):
    return Entry(number, Told(which, PhaseState.SUCCESS), 5, 4)


async def test_what_was_told_while_the_disk_was_full_is_written_with_the_next_record(
    places, disk, monkeypatch, caplog
):
    books = await opened(places, disk)
    books.write_entry(phase(1, Phase.SETUP_DONE))
    await books.note("before", b"1")
    write = Full()
    monkeypatch.setattr(durable.os, "write", write)
    books.write_entry(phase(2, Phase.BLACKOUT_STARTED))
    with pytest.raises(Unavailable):
        await books.note("refused", b"never")
    books.note_soon("during", b"2")
    books.streams_at({("job", 1): 7})
    books.write_entry(phase(3, Phase.OFFLINE_DONE))
    assert [entry.message_id for entry in on_disk(places).state.entries] == [1]
    assert caplog.text.count("what is told meanwhile is written later") == 1
    write.full = False
    books.write_entry(phase(4, Phase.DONE))
    await books.write_records([RELEASED])
    found = on_disk(places)
    assert [entry.message_id for entry in found.state.entries] == [1, 2, 3, 4]
    assert dict(found.state.notes) == {"before": b"1", "during": b"2"}
    assert found.state.streams is not None
    assert found.state.streams.offsets == (("job", 1, 7),)
    assert (found.state.right_record, found.torn_bytes) == (RELEASED, 0)
    books.write_entry(phase(5, Phase.RECOVERY_DONE))
    await books.note("after", b"3")
    assert [entry.message_id for entry in on_disk(places).state.entries] == [1, 2, 3, 4, 5]


async def test_a_disk_that_stays_full_costs_progress_and_no_phase(places, disk, monkeypatch):
    books = await opened(places, disk)
    books.write_entry(phase(1, Phase.SETUP_DONE))
    await books.note("before", b"1")
    write = Full()
    monkeypatch.setattr(durable.os, "write", write)
    for number in range(2, 1000):
        books.write_entry(progress(number))
    books.write_entry(phase(1000, Phase.DONE))
    for _ in range(3):
        with pytest.raises(Unavailable):
            await books.note("refused", b"never")
    assert len(books._missed._records) == MISSED_MAX
    write.full = False
    await books.write_records([RELEASED])
    told = on_disk(places).state.entries
    assert (told[0].message_id, told[-2].message_id, told[-1].message_id) == (1, 999, 1000)
    assert told[-1].told.phase is Phase.DONE
