"""The notification record of a session: everything that was told, for whoever listens, whenever.

It begins with the session and is replayed whole to each subscriber (contract 4.8). Phases are never dropped. Progress is
thinned on entry, never per reader, so that every reader sees the same record: one entry per pass, the newest 64, and
live at most 4 in any second. Ids strictly increase; a gap is progress that was thinned.

A reader keeps the last id that it has seen and asks `after(id)`: a slow reader is served from here and costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.errors import Damaged
from sandshift.session.phases import DEADLINE_EXCEEDED, TERMINAL, Phase, PhaseState, Told
from sandshift.session.states import Side
from sandshift.wire.migration import messages_pb2, options_pb2

PROGRESS_KEPT_MAX: Final = 64
PROGRESS_PER_SECOND_MAX: Final = 4
PROGRESS_WITHIN_PASS_S: Final = 0.5
"""Within one pass progress is told half as often as it may be, so that there is always room for a new pass."""
UINT32_MAX: Final = (1 << 32) - 1
FAILURE_CHARACTERS_MAX: Final = 2048


@dataclass(frozen=True, slots=True)
class Progress:
    """Numbers of a transfer under way."""

    pass_number: int
    bytes_total: int
    bytes_transferred: int
    bytes_remaining: int
    dirty_bytes_per_s: int = 0
    bytes_per_s: int = 0
    guest_throttle_percent: int = 0
    expected_blackout_ms: int = 0
    rule: str = ""
    """The rule of session/precopy.py that acted last; empty: none did."""


@dataclass(frozen=True, slots=True)
class BlackoutExited:
    duration_ms: int
    stopped_at_us: int
    """When the blackout stopped, that is, the guest ran again, by this host's clock: microseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Failure:
    code: int
    """gRPC's."""
    message: str


@dataclass(frozen=True, slots=True)
class Entry:
    message_id: int
    told: Told
    updated_at_us: int
    started_at_us: int = 0
    """When the transfer started; 0: not yet."""
    progress: Progress | None = None
    blackout: BlackoutExited | None = None
    failure: Failure | None = None


class Record:
    """What one side of a session has told. Times are arguments: `_us` since the epoch, `now_s` of a monotonic clock."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._entries: list[Entry] = []
        self._next_id = 1
        self._started_at_us = 0
        self._told_at_s: deque[float] = deque(maxlen=PROGRESS_PER_SECOND_MAX)
        self._closed = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    @property
    def last_id(self) -> int:
        """The newest entry's; 0: nothing was told yet."""
        return self._next_id - 1

    @property
    def closed(self) -> bool:
        """Nothing more will come: a stream ends once it has sent what is here."""
        return self._closed

    @property
    def ending(self) -> Entry | None:
        """The entry that told the end of the transfer, if there is one."""
        return next((entry for entry in self._entries if entry.told.phase in TERMINAL), None)

    def after(self, message_id: int) -> list[Entry]:
        """Everything newer than `message_id`, in order; after(0) is the whole record."""
        return [entry for entry in self._entries if entry.message_id > message_id]

    def transfer_started(self, now_us: int) -> None:
        """From now on entries carry a start time. Only the first call counts."""
        self._started_at_us = self._started_at_us or now_us

    def phase(
        self,
        told: Told,
        now_us: int,
        *,
        blackout: BlackoutExited | None = None,
        failure: Failure | None = None,
    ) -> Entry:
        """Tell a phase. It is kept for ever, and telling it again (after a restart, a retry) changes nothing."""
        for entry in self._entries:
            if entry.told == told and not entry.progress:
                return entry
        cut = failure and Failure(failure.code, failure.message[:FAILURE_CHARACTERS_MAX])
        return self._append(told, now_us, blackout=blackout, failure=cut)

    def progress(self, numbers: Progress, now_us: int, *, now_s: float) -> Entry | None:
        """Tell progress, or not: None if it would come too soon after what was told."""
        if not self._due(numbers, now_s):
            return None
        self._told_at_s.append(now_s)
        entry = self._append(Told(Phase.TRANSFER_IN_PROGRESS, PhaseState.SUCCESS), now_us, progress=numbers)
        self._thin()
        return entry

    def close(self) -> None:
        """The session has ended."""
        self._closed = True

    def take_back(self, entry: Entry) -> None:
        """Append an entry that a journal kept. Entries come in order; one that is here already is passed over."""
        if entry.message_id < self._next_id:
            return
        self._entries.append(entry)
        self._next_id = entry.message_id + 1
        self._started_at_us = self._started_at_us or entry.started_at_us
        self._thin()

    def _append(self, told: Told, now_us: int, **details: object) -> Entry:
        assert self._next_id <= UINT32_MAX, "message ids are used up"
        entry = Entry(self._next_id, told, now_us, self._started_at_us, **details)  # type: ignore[arg-type]
        self._next_id += 1
        self._entries.append(entry)
        return entry

    def _due(self, numbers: Progress, now_s: float) -> bool:
        """One of the four in a second is left for a rule that acts: whoever watches shall see that."""
        recent = [told_s for told_s in self._told_at_s if now_s - told_s < 1.0]
        last = next((entry.progress for entry in reversed(self._entries) if entry.progress), None)
        if last is not None and numbers.rule != last.rule:
            return len(recent) < PROGRESS_PER_SECOND_MAX
        same_pass = last is not None and last.pass_number == numbers.pass_number
        if same_pass and recent and now_s - recent[-1] < PROGRESS_WITHIN_PASS_S:
            return False
        return len(recent) < PROGRESS_PER_SECOND_MAX - 1

    def _thin(self) -> None:
        self._entries = thinned(self._entries)


def thinned(entries: Iterable[Entry]) -> list[Entry]:
    """Of progress the newest of each pass, and the newest 64 of those. Phases stay."""
    all_of_them = list(entries)
    newest = {entry.progress.pass_number: entry.message_id for entry in all_of_them if entry.progress}
    kept = set(sorted(newest.values())[-PROGRESS_KEPT_MAX:])
    return [entry for entry in all_of_them if not entry.progress or entry.message_id in kept]


def restore(side: Side, entries: Iterable[Entry]) -> Record:
    """The record as it was when its entries were written down."""
    record = Record(side)
    for entry in entries:
        record.take_back(entry)
    return record


def to_response(entry: Entry, side: Side) -> messages_pb2.NotificationsResponse:
    """An entry as revision head tells it, and as the journal keeps it."""
    response = messages_pb2.NotificationsResponse(
        message_id=entry.message_id,
        notification=_notification(entry, side),
        update_time=_stamp(entry.updated_at_us),
    )
    if entry.started_at_us:
        response.start_time.CopyFrom(_stamp(entry.started_at_us))
    return response


def from_response(response: messages_pb2.NotificationsResponse) -> Entry:
    """The entry that `to_response` was given.

    Raises:
        Damaged: it names a phase or state that nothing of ours writes.
    """
    told = response.notification
    try:
        phase, state = Phase(told.phase), PhaseState(told.state)
    except ValueError as error:
        raise Damaged(
            f"notification {response.message_id} names phase {told.phase}, state {told.state}"
        ) from error
    return Entry(
        message_id=response.message_id,
        told=Told(phase, state),
        updated_at_us=response.update_time.ToMicroseconds(),
        started_at_us=response.start_time.ToMicroseconds(),
        progress=_progress(told.progress) if told.HasField("progress") else None,
        blackout=_blackout(told.blackout_exited) if told.HasField("blackout_exited") else None,
        failure=Failure(told.failure.code, told.failure.message) if told.HasField("failure") else None,
    )


def entry_bytes(entry: Entry, side: Side) -> bytes:
    """An entry for the journal."""
    return to_response(entry, side).SerializeToString(deterministic=True)


def entry_from_bytes(data: bytes) -> Entry:
    """What `entry_bytes` wrote.

    Raises:
        Damaged: it did not.
    """
    try:
        return from_response(messages_pb2.NotificationsResponse.FromString(data))
    except DecodeError as error:
        raise Damaged("a notification in the journal cannot be read") from error


class Stream2691:
    """The record as revision 2691's TransferSandbox streams it. One per stream: each counts from 1."""

    def __init__(self) -> None:
        self._seen_id = 0
        self._next_id = 1
        self.ended = False
        """The end of the transfer was told: close the stream with OK."""

    def take(self, record: Record) -> list[messages_pb2.TransferSandboxResponse]:
        """What is new in the record, up to the end of the transfer."""
        fresh = []
        for entry in record.after(self._seen_id):
            if self.ended:
                break
            fresh.append(self.response(entry))
        return fresh

    def response(self, entry: Entry) -> messages_pb2.TransferSandboxResponse:
        """The next entry of the record, as this stream tells it."""
        self._seen_id = entry.message_id
        self.ended = entry.told.phase in TERMINAL
        response = messages_pb2.TransferSandboxResponse(
            message_id=self._next_id,
            event=event_2691(entry),
            error=entry.failure.message if entry.failure else "",
            update_time=_stamp(entry.updated_at_us),
        )
        if entry.started_at_us:
            response.start_time.CopyFrom(_stamp(entry.started_at_us))
        self._next_id += 1
        return response


def event_2691(entry: Entry) -> str:
    """Revision 2691's word for an entry: the phase's name, or TIMEOUT where a bound ended the transfer."""
    if entry.told.phase in TERMINAL and entry.failure and entry.failure.code == DEADLINE_EXCEEDED:
        return "TIMEOUT"
    return entry.told.phase.name


def _notification(entry: Entry, side: Side) -> options_pb2.Notification:
    notification = options_pb2.Notification(
        origin=options_pb2.ORIGIN_SOURCE if side is Side.SOURCE else options_pb2.ORIGIN_DESTINATION,
        phase=entry.told.phase.proto,
        state=entry.told.state.proto,
    )
    if numbers := entry.progress:
        notification.progress.CopyFrom(_transfer_progress(numbers))
    if blackout := entry.blackout:
        notification.blackout_exited.blackout_duration_milliseconds = blackout.duration_ms
        notification.blackout_exited.blackout_stop_timestamp.CopyFrom(_stamp(blackout.stopped_at_us))
    if failure := entry.failure:
        notification.failure.code = failure.code
        notification.failure.message = failure.message
    return notification


def _transfer_progress(numbers: Progress) -> options_pb2.TransferProgress:
    message = options_pb2.TransferProgress(
        bytes_total=numbers.bytes_total,
        bytes_transferred=numbers.bytes_transferred,
        bytes_remaining=numbers.bytes_remaining,
        dirty_bytes_per_second=numbers.dirty_bytes_per_s,
        bytes_per_second=numbers.bytes_per_s,
        guest_throttle_percent=numbers.guest_throttle_percent,
        expected_blackout_milliseconds=min(numbers.expected_blackout_ms, UINT32_MAX),
        rule=numbers.rule,
    )
    setattr(message, "pass", min(numbers.pass_number, UINT32_MAX))  # a keyword of Python's
    return message


def _progress(message: options_pb2.TransferProgress) -> Progress:
    return Progress(
        pass_number=getattr(message, "pass"),
        bytes_total=message.bytes_total,
        bytes_transferred=message.bytes_transferred,
        bytes_remaining=message.bytes_remaining,
        dirty_bytes_per_s=message.dirty_bytes_per_second,
        bytes_per_s=message.bytes_per_second,
        guest_throttle_percent=message.guest_throttle_percent,
        expected_blackout_ms=message.expected_blackout_milliseconds,
        rule=message.rule,
    )


def _blackout(message: options_pb2.BlackoutExitedEventDetails) -> BlackoutExited:
    return BlackoutExited(
        duration_ms=message.blackout_duration_milliseconds,
        stopped_at_us=message.blackout_stop_timestamp.ToMicroseconds(),
    )


def _stamp(at_us: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(at_us)
    return stamp
