"""The journal of a session: what a shim that is killed at any moment finds again (contract 4.15).

Append-only. After a heading, each record is

    length (4 bytes, big-endian) | CRC-32 (4 bytes) | payload (msgpack of one of the types below)

and the CRC is seeded with the record's place in the file, so that no bytes are a record anywhere but where they were
written. What `replay` finds at the end and cannot read is a write that was cut off: nobody was told of it, so it is
dropped, and reported. What it cannot read with a good record behind it was damaged later, and then nothing is assumed.

The shell writes and syncs; here are only bytes. No secret is in a journal: the session key lies in a file of its own.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, assert_never

import msgspec

from sandshift.errors import Damaged, NoRoom
from sandshift.session import record as records
from sandshift.session.record import Entry
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import Cell
from sandshift.session.states import Side, State

HEADING: Final = b"sandshift journal 1\n"
RECORD_BYTES_MAX: Final = 128 * 1024
JOURNAL_BYTES_MAX: Final = 1024 * 1024
COMPACT_AT_BYTES: Final = 512 * 1024
"""From this size on the next append should be a compaction. What a compaction leaves is smaller (NOTES_BYTES_MAX)."""
NOTES_BYTES_MAX: Final = 256 * 1024
"""All notes of a session together, names and values."""
_HEAD: Final = struct.Struct(">II")


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The first record: which session this is."""

    side: str
    """"SOURCE" or "DESTINATION"."""
    session_id: str
    sandbox_id: str
    key_id: bytes
    """Names the key, which lies in a file beside the journal."""
    options: bytes
    """A serialized InitializeOptions: those in force on this side."""
    encrypted: bool
    config_digest: bytes
    """SHA-256 of the saved state that was exported or imported, which lies in a file beside the journal."""
    opened_at_us: int


class RightWritten(msgspec.Struct, frozen=True, tag="right"):
    """The session's state and its cell, whole: the newest one counts (session/right_model.py, Record)."""

    cell: str
    state: str
    complete: bool = False
    cancelled: bool = False
    forced: bool = False
    reason: str = ""
    handover: bytes = b""
    peer_handover: bytes = b""


class Told(msgspec.Struct, frozen=True, tag="told"):
    """A notification (session/record.py, entry_bytes)."""

    entry: bytes


class Noted(msgspec.Struct, frozen=True, tag="noted"):
    """Something that the shell must know again: a patch, a place, a mark. The newest of a name counts."""

    name: str
    value: bytes = b""


class StreamsAt(msgspec.Struct, frozen=True, tag="streams"):
    """Up to which byte each stream was delivered here: (process id, 0 stdin 1 stdout 2 stderr, offset)."""

    offsets: tuple[tuple[str, int, int], ...]


class Forced(msgspec.Struct, frozen=True, tag="forced"):
    """An operator took the right by force. Written before it is acted on."""

    cell: str
    at_us: int


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Cleanup is done."""


JournalRecord = Opened | RightWritten | Told | Noted | StreamsAt | Forced | Closed
_decoder: Final[msgspec.msgpack.Decoder[JournalRecord]] = msgspec.msgpack.Decoder(JournalRecord)
_encoder: Final = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a journal says in the end."""

    opened: Opened | None = None
    right: RightWritten | None = None
    entries: tuple[Entry, ...] = ()
    notes: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    streams: StreamsAt | None = None
    forced: Forced | None = None
    closed: bool = False

    @property
    def side(self) -> Side:
        return Side[self._opened.side]

    @property
    def right_record(self) -> RightRecord | None:
        """What session/right_model.py takes back; None if nothing was written yet."""
        if self.right is None:
            return None
        kept = self.right
        return RightRecord(
            side=self.side,
            session_id=self._opened.session_id,
            cell=Cell[kept.cell],
            state=State(kept.state),
            complete=kept.complete,
            cancelled=kept.cancelled,
            forced=kept.forced,
            reason=kept.reason,
            handover=kept.handover,
            peer_handover=kept.peer_handover,
        )

    def notification_record(self) -> records.Record:
        """The notification record, ready to go on."""
        return records.restore(self.side, self.entries)

    @property
    def _opened(self) -> Opened:
        if self.opened is None:
            raise Damaged("the journal says nothing of the session that it belongs to")
        return self.opened


@dataclass(frozen=True, slots=True)
class Replay:
    """What `replay` found. The shell cuts the file to `valid_bytes` before it appends."""

    state: JournalState
    valid_bytes: int
    torn_bytes: int
    """Bytes of a write that was cut off, dropped; 0: none."""


class Journal:
    """Where a journal stands: gives the bytes to append, and new contents when it has grown."""

    def __init__(self, found: Replay | None = None) -> None:
        self.state = found.state if found else JournalState()
        self.size_bytes = found.valid_bytes if found else 0

    @property
    def wants_compaction(self) -> bool:
        return self.size_bytes >= COMPACT_AT_BYTES

    def append(self, *added: JournalRecord) -> bytes:
        """The bytes to append, in one write and one sync, for these records.

        Raises:
            NoRoom: they do not fit; nothing has changed.
            Damaged: they cannot follow what is there (a defect of ours, caught before it reaches the disk).
        """
        data, state = b"" if self.size_bytes else HEADING, self.state
        for record in added:
            state = apply(state, record)
            data += encode(record, offset=self.size_bytes + len(data))
        if self.size_bytes + len(data) > JOURNAL_BYTES_MAX:
            raise NoRoom(
                f"the journal has {self.size_bytes} bytes and {len(data)} more are over {JOURNAL_BYTES_MAX}"
            )
        self.state = state
        self.size_bytes += len(data)
        return data

    def compacted(self) -> bytes:
        """New contents that say the same. Write them to a new file, sync it, rename it over the old, sync the folder."""
        data = compact(self.state)
        self.size_bytes = len(data)
        return data


def right_written(record: RightRecord) -> RightWritten:
    """The journal's form of what the handover protocol orders to be written."""
    return RightWritten(
        cell=record.cell.name,
        state=record.state.value,
        complete=record.complete,
        cancelled=record.cancelled,
        forced=record.forced,
        reason=record.reason,
        handover=record.handover,
        peer_handover=record.peer_handover,
    )


def told(entry: Entry, side: Side) -> Told:
    """The journal's form of a notification."""
    return Told(records.entry_bytes(entry, side))


def encode(record: JournalRecord, *, offset: int) -> bytes:
    """One record as it stands at `offset` of the file.

    Raises:
        NoRoom: it is larger than a record may be.
    """
    payload = _encoder.encode(record)
    if len(payload) > RECORD_BYTES_MAX:
        raise NoRoom(f"a journal record of {len(payload)} bytes: at most {RECORD_BYTES_MAX} are allowed")
    return _HEAD.pack(len(payload), _checksum(payload, offset)) + payload


def replay(data: bytes) -> Replay:
    """Read a journal from its beginning.

    Raises:
        Damaged: a record in the middle cannot be read, or they make no sense together.
    """
    if not data.startswith(HEADING):
        if HEADING.startswith(data):
            return Replay(JournalState(), 0, len(data))
        raise Damaged("this is no journal of a session, or its beginning is damaged")
    state, offset = JournalState(), len(HEADING)
    while (payload := _payload_at(data, offset)) is not None:
        state = apply(state, _decoded(payload, offset))
        offset += _HEAD.size + len(payload)
    if (behind := next(_good_offsets(data, offset + 1), None)) is not None:
        raise Damaged(f"the journal is damaged at byte {offset}: a good record follows at byte {behind}")
    return Replay(state, offset, len(data) - offset)


def apply(state: JournalState, record: JournalRecord) -> JournalState:
    """What a journal says once it says this too.

    Raises:
        Damaged: a first record that opens nothing, a second that opens, anything after the end.
        NoRoom: the notes have become too large.
    """
    if state.closed or (state.opened is None) != isinstance(record, Opened):
        raise Damaged(f"the journal has a record {type(record).__name__} where it cannot stand")
    match record:
        case Opened(side=side):
            _known("side", side, Side.__members__)
            return replace(state, opened=record)
        case RightWritten(cell=cell, state=name):
            _known("cell", cell, Cell.__members__)
            _known("state", name, _STATES)
            return replace(state, right=record)
        case Told(entry):
            return _with_entry(state, records.entry_from_bytes(entry))
        case Noted(name, value):
            return replace(state, notes=_with_note(state.notes, name, value))
        case StreamsAt():
            return replace(state, streams=record)
        case Forced():
            return replace(state, forced=record)
        case Closed():
            return replace(state, closed=True)
        case _:  # pragma: no cover
            assert_never(record)


def compact(state: JournalState) -> bytes:
    """The shortest journal that says the same."""
    data = HEADING
    for record in _minimal(state):
        data += encode(record, offset=len(data))
    return data


def _minimal(state: JournalState) -> Iterator[JournalRecord]:
    if state.opened is None:
        return
    yield state.opened
    for name, value in state.notes.items():
        yield Noted(name, value)
    for entry in state.entries:
        yield told(entry, state.side)
    for latest in (state.streams, state.forced, state.right):
        if latest is not None:
            yield latest
    if state.closed:
        yield Closed()


_STATES: Final = frozenset(state.value for state in State)


def _known(what: str, name: str, names: Container[str]) -> None:
    if name not in names:
        raise Damaged(f"the journal names a {what} {name!r}, which this sandshift does not know")


def _with_entry(state: JournalState, entry: Entry) -> JournalState:
    if state.entries and entry.message_id <= state.entries[-1].message_id:
        return state
    return replace(state, entries=tuple(records.thinned((*state.entries, entry))))


def _with_note(notes: Mapping[str, bytes], name: str, value: bytes) -> Mapping[str, bytes]:
    joined = {**notes, name: value}
    size_bytes = sum(len(key.encode()) + len(one) for key, one in joined.items())
    if size_bytes > NOTES_BYTES_MAX:
        raise NoRoom(
            f"note {name!r}: the session's notes would have {size_bytes} bytes, at most {NOTES_BYTES_MAX}"
        )
    return MappingProxyType(joined)


def _checksum(payload: bytes, offset: int) -> int:
    return zlib.crc32(payload, zlib.crc32(offset.to_bytes(8, "big")))


def _payload_at(data: bytes, offset: int) -> bytes | None:
    """The payload of a good record that begins at `offset`, else None."""
    begin = offset + _HEAD.size
    if begin > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, offset)
    if not 0 < length <= RECORD_BYTES_MAX or begin + length > len(data):
        return None
    payload = data[begin : begin + length]
    return payload if _checksum(payload, offset) == checksum else None


def _good_offsets(data: bytes, offset: int) -> Iterator[int]:
    """Where behind `offset` good records begin. Looks at every byte, but hashes only what could be one."""
    return (place for place in range(offset, len(data) - _HEAD.size) if _payload_at(data, place) is not None)


def _decoded(payload: bytes, offset: int) -> JournalRecord:
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise Damaged(
            f"the journal's record at byte {offset} is of a kind that this sandshift does not know"
        ) from error
