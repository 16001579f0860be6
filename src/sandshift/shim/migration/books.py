"""A session's books on disk: its journal, its key, the saved state; and what outlives it, last statement and report.

STATE_DIR/.../ID/session          journal
STATE_DIR/.../ID/session.key      the session key, 32 bytes
STATE_DIR/.../ID/session.config   the saved state, as it was exported or imported
STATE_DIR/statements/NAME         last statement; NAME is the session's SHA-256, the key id and the side
STATE_DIR/reports/NAME.json       report
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sandshift.errors import Damaged, Unavailable
from sandshift.session.ids import SessionId, session_name
from sandshift.session.journal import (
    Journal,
    JournalRecord,
    JournalState,
    Noted,
    Opened,
    StreamsAt,
    replay,
    right_written,
    told,
)
from sandshift.session.record import Entry
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import key_id
from sandshift.session.states import Side, State
from sandshift.shim.durable import AppendOnlyFile, Disk, make_folder, sync_folder, write_atomically
from sandshift.shim.places import Places

log = logging.getLogger(__name__)

CHANNEL_NOTE: Final = "channel"
"""SO_COOKIE of the channel."""
STOPPED_NOTE: Final = "stopped"
"""When the guest stopped on the source, microseconds since the epoch."""
LOADED_NOTE: Final = "loaded"
"""When everything was here on the destination, microseconds since the epoch."""
STARTING_NOTE: Final = "starting"
"""When the destination began to start the guest, microseconds since the epoch."""
OUTCOME_NOTE: Final = "outcome"
"""How the transfer ended: a value of phases.Outcome."""
HEAD_NOTE: Final = "head"
"""A call of revision head was seen: the session ends with Cleanup."""
PATCH_NOTE: Final = "patch/"
"""Before the id of a container on the source: what was supplied for it here (sandbox/patching.py, patch_bytes)."""
HEARD_NOTE: Final = "heard"
"""A frame of the peer's was read: its VM process has finished with the channel, and this side may write."""
ADOPTED_NOTE: Final = "adopted"
"""The destination has taken over the containers' streams: a later shim goes on from its own files."""
NUMBER: Final = struct.Struct(">Q")
STATEMENT_KEPT_S: Final = 30 * 24 * 3600.0
REPORTS_KEPT_MAX: Final = 1000


MISSED_MAX: Final = 256
"""Records that wait for a disk that takes nothing; beyond it progress goes, the oldest first. The record keeps less of it."""


class Missed:
    """Records that did not reach the disk and were not waited for, in the order in which they were given.

    Used by the event loop and by the disk's thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._expendable: set[int] = set()
        self._records: dict[int, JournalRecord] = {}

    def number(self, *, expendable: bool) -> int:
        number = next(self._numbers)
        if expendable:
            self._expendable.add(number)
        return number

    def take(self) -> dict[int, JournalRecord]:
        with self._lock:
            taken, self._records = self._records, {}
        return dict(sorted(taken.items()))

    def put_back(self, records: Mapping[int, JournalRecord]) -> None:
        with self._lock:
            self._records.update(records)
            excess = len(self._records) - MISSED_MAX
            for number in sorted(self._expendable.intersection(self._records))[: max(0, excess)]:
                del self._records[number]


class Books:
    """The books of one session. Writes go through the shim's disk thread, in the order of the calls."""

    def __init__(
        self, places: Places, disk: Disk, journal: Journal, file: AppendOnlyFile, key: bytes, config: bytes
    ) -> None:
        self._places = places
        self._disk = disk
        self._journal = journal
        self._file = file
        self._spoilt = False
        self._given = 0
        """Records given to the disk's thread."""
        self._missed = Missed()
        self.session_key = key
        self.config = config

    @classmethod
    async def open(
        cls, places: Places, disk: Disk, opened: Opened, first: RightRecord, *, key: bytes, config: bytes
    ) -> Books:
        """Begin the books of a new session. Raises Unavailable; then nothing is left of them."""

        def begin() -> Books:
            remove(places)
            try:
                write_atomically(key_file(places), key)
                write_atomically(config_file(places), config)
                journal = Journal()
                # Not there at all, or with its first records: `delete` asks whether it is there.
                write_atomically(places.journal_file, journal.append(opened, right_written(first)))
                file = AppendOnlyFile(places.journal_file)
            except Unavailable:
                remove(places)
                raise
            return cls(places, disk, journal, file, key, config)

        return await disk.run(begin)

    @classmethod
    def read(cls, places: Places, disk: Disk) -> Books | None:
        """The books that a former shim left; None if there are none, or it died as it removed them. Blocks.

        Raises:
            Damaged: they cannot be believed. Nothing is overwritten; the VM is left as it is.
        """
        try:
            found = replay(places.journal_file.read_bytes())
        except FileNotFoundError:
            return None
        if found.state.opened is None:
            return None
        try:
            key = key_file(places).read_bytes()
            config = config_file(places).read_bytes()
        except FileNotFoundError as error:
            if _is_over(found.state):
                remove(places)
                return None
            raise Damaged(f"{error.filename} is missing beside the journal {places.journal_file}") from error
        if found.state.opened.key_id != key_id(key):
            raise Damaged(f"{key_file(places)} is not the key of the session in {places.journal_file}")
        file = AppendOnlyFile(places.journal_file)
        if found.torn_bytes:
            log.warning(
                "%s: %d bytes of a write that was cut off are dropped", places.journal_file, found.torn_bytes
            )
            file.truncate(found.valid_bytes)
        return cls(places, disk, Journal(found), file, key, config)

    @property
    def encrypted(self) -> bool:
        opened = self._journal.state.opened
        assert opened is not None
        return opened.encrypted

    @property
    def state(self) -> JournalState:
        return self._journal.state

    async def write_records(self, records: list[RightRecord]) -> None:
        """Durable when it returns."""
        await self._append(*(right_written(record) for record in records))

    async def note(self, name: str, value: bytes) -> None:
        await self._append(Noted(name, value))

    def note_soon(self, name: str, value: bytes) -> None:
        """As `note`, without waiting for the disk: it survives the shim, not necessarily the host."""
        self._append_soon(Noted(name, value))

    def streams_at(self, offsets: dict[tuple[str, int], int]) -> None:
        """Up to where each stream was delivered when the guest stopped. Survives the shim, not necessarily the host."""
        self._append_soon(
            StreamsAt(tuple((process, stream, at) for (process, stream), at in offsets.items()))
        )

    def write_entry(self, entry: Entry) -> None:
        self._append_soon(told(entry, self._journal.state.side), expendable=entry.progress is not None)

    async def last_record(self) -> RightRecord:
        """The newest right record, from the disk."""
        await self._reread()
        record = self._journal.state.right_record
        assert record is not None
        return record

    async def _append(self, *added: JournalRecord) -> None:
        if self._spoilt:
            await self._reread()
        self._compact_if_due()
        missed = self._missed.take()
        at_bytes = self._journal.size_bytes
        data = self._journal.append(*missed.values(), *added)
        self._given += 1
        try:
            await self._disk.run(lambda: self._write(data, at_bytes))
        except Unavailable:
            self._missed.put_back(missed)
            self._spoilt = True
            raise

    def _append_soon(self, added: JournalRecord, *, expendable: bool = False) -> None:
        """What the disk does not take now goes before the next record that it does take."""
        number = self._missed.number(expendable=expendable)
        if self._spoilt:
            self._missed.put_back({number: added})
            return
        self._compact_if_due()
        batch = {**self._missed.take(), number: added}
        at_bytes, data = self._journal.size_bytes, self._journal.append(*batch.values())

        def spoil(error: BaseException) -> None:
            self._missed.put_back(batch)
            self._spoil(error)

        self._given += 1
        self._disk.soon(lambda: self._write(data, at_bytes, sync=False), spoil)

    def _write(self, data: bytes, at_bytes: int, *, sync: bool = True) -> None:
        """On the disk's thread. A record is good only at its own place, so none is written after one that failed."""
        if self._file.size_bytes != at_bytes:
            raise Unavailable(
                f"{self._places.journal_file}: an earlier record could not be written, so nothing was done; repeat"
            )
        self._file.append(data, sync=sync)

    def _spoil(self, error: BaseException) -> None:
        if not self._spoilt:
            log.error("%s: %s; what is told meanwhile is written later", self._places.journal_file, error)
        self._spoilt = True

    async def _reread(self) -> None:
        def read() -> Journal:
            found = replay(self._places.journal_file.read_bytes())
            if self._file.size_bytes != found.valid_bytes or found.torn_bytes:
                self._file.truncate(found.valid_bytes)
            return Journal(found)

        while True:
            given = self._given
            journal = await self._disk.run(read)
            if self._given == given:
                break  # Else something was appended after it was read.
        self._journal = journal
        self._spoilt = False

    def _compact_if_due(self) -> None:
        """Everything after this call is appended to the new file: the disk's thread keeps the order."""
        if self._journal.wants_compaction:
            data = self._journal.compacted()
            self._disk.soon(lambda: self._replace_file(data), self._spoil)

    def _replace_file(self, data: bytes) -> None:
        """On the disk's thread, which alone uses `_file`: no append can meet the closed descriptor."""
        write_atomically(self._places.journal_file, data)
        old, self._file = self._file, AppendOnlyFile(self._places.journal_file)
        old.close()

    async def keep_statement(self, signed: bytes) -> None:
        """Keep the last statement on this host; those older than 30 days go."""
        opened = self._journal.state.opened
        assert opened is not None
        path = statement_file(self._places, opened.session_id, opened.key_id, self._journal.state.side)
        await self._disk.run(lambda: write_atomically(path, signed))
        self._disk.soon(lambda: _forget_older(self._places.statements_dir, STATEMENT_KEPT_S), self._spoil_not)

    def _spoil_not(self, error: BaseException) -> None:
        log.warning("old files were not removed: %s", error)

    async def keep_report(self, report: bytes) -> None:
        """Keep the session's report; the newest 1,000 stay."""
        opened = self._journal.state.opened
        assert opened is not None
        path = report_file(self._places, opened.session_id, self._journal.state.side)
        await self._disk.run(lambda: write_atomically(path, report))
        self._disk.soon(lambda: _keep_newest(self._places.reports_dir, REPORTS_KEPT_MAX), self._spoil_not)

    async def close(self) -> None:
        """The session is over and its statement is kept: remove the books, the key first."""
        await self._disk.run(self._file.close)
        await self._disk.run(lambda: remove(self._places))


def _is_over(state: JournalState) -> bool:
    right = state.right_record
    return right is not None and right.state is State.IDLE


def key_file(places: Places) -> Path:
    return places.journal_file.with_name("session.key")


def config_file(places: Places) -> Path:
    return places.journal_file.with_name("session.config")


def statement_file(places: Places, session_id: str, session_key_id: bytes, side: Side) -> Path:
    return (
        places.statements_dir / f"{session_name(SessionId(session_id))}-{session_key_id.hex()}-{side.value}"
    )


def report_file(places: Places, session_id: str, side: Side) -> Path:
    return places.reports_dir / f"{session_name(SessionId(session_id))}-{side.value}.json"


def kept_statements(places: Places, session_id: str) -> list[bytes]:
    """Last statements of ended sessions of this id on this host, the newest first. Blocks."""
    paths = places.statements_dir.glob(f"{session_name(SessionId(session_id))}-*")
    return [path.read_bytes() for path in sorted(paths, key=_modified, reverse=True)]


def kept_reports(places: Places, session_id: str) -> list[bytes]:
    """Reports of ended sessions of this id on this host, the newest first. Blocks."""
    paths = places.reports_dir.glob(f"{session_name(SessionId(session_id))}-*.json")
    return [path.read_bytes() for path in sorted(paths, key=_modified, reverse=True)]


def remove(places: Places) -> None:
    """Remove a session's books, the key first: without it nothing of them can be used. Blocks."""
    for path in (key_file(places), config_file(places), places.journal_file):
        path.unlink(missing_ok=True)
    make_folder(places.state_dir)
    sync_folder(places.state_dir)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _forget_older(folder: Path, age_s: float) -> None:
    newest = max((_modified(path) for path in folder.iterdir()), default=0.0)
    for path in folder.iterdir():
        if _modified(path) < newest - age_s:
            path.unlink(missing_ok=True)


def _keep_newest(folder: Path, count: int) -> None:
    paths = sorted(folder.iterdir(), key=_modified, reverse=True)
    for path in paths[count:]:
        path.unlink(missing_ok=True)
