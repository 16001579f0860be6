import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import Damaged
from sandshift.session import record as records
from sandshift.session.phases import Phase, PhaseState, Told
from sandshift.session.record import BlackoutExited, Entry, Failure, Progress, Record, Stream2691
from sandshift.session.states import Side
from sandshift.wire.migration import messages_pb2, options_pb2

SETUP = Told(Phase.SETUP_DONE, PhaseState.SUCCESS)
DONE = Told(Phase.DONE, PhaseState.SUCCESS)
FAILED = Told(Phase.FAILED, PhaseState.CANCELLED)
EXITED = Told(Phase.BLACKOUT_EXITED, PhaseState.SUCCESS)
MOVING = Told(Phase.TRANSFER_IN_PROGRESS, PhaseState.SUCCESS)
T0_US = 1_750_000_000_000_000


def numbers(pass_number, **more):
    return Progress(pass_number, bytes_total=100, bytes_transferred=10, bytes_remaining=90, **more)


def ids_of(entries):
    return [entry.message_id for entry in entries]


def test_a_record_begins_before_anybody_listens_and_is_replayed_whole():
    record = Record(Side.SOURCE)
    record.phase(SETUP, T0_US)
    record.progress(numbers(1), T0_US, now_s=0)
    record.phase(DONE, T0_US)
    assert ids_of(record.after(0)) == [1, 2, 3]
    assert ids_of(record.after(0)) == [1, 2, 3]
    assert ids_of(record.after(2)) == [3]
    assert record.after(3) == []
    assert [entry.told for entry in record.entries] == [SETUP, MOVING, DONE]


def test_the_start_time_is_unset_until_the_transfer_starts_and_then_stays():
    record = Record(Side.SOURCE)
    before = record.phase(SETUP, T0_US)
    record.transfer_started(T0_US + 5)
    record.transfer_started(T0_US + 9)
    after = record.phase(DONE, T0_US + 10)
    assert (before.started_at_us, after.started_at_us) == (0, T0_US + 5)
    assert not records.to_response(before, Side.SOURCE).HasField("start_time")
    assert records.to_response(after, Side.SOURCE).start_time.ToMicroseconds() == T0_US + 5


def test_a_phase_told_again_is_told_once():
    record = Record(Side.SOURCE)
    first = record.phase(FAILED, T0_US, failure=Failure(1, "cancelled"))
    assert record.phase(FAILED, T0_US + 9) is first
    assert record.entries == (first,)
    assert record.ending is first


def test_progress_does_not_stand_in_for_the_phase_of_the_same_name():
    record = Record(Side.SOURCE)
    record.progress(numbers(1), T0_US, now_s=0)
    assert record.phase(MOVING, T0_US).message_id == 2
    assert record.ending is None


def test_at_most_four_progress_entries_come_in_any_second_and_one_of_them_is_left_for_a_rule_that_acts():
    record = Record(Side.SOURCE)
    told = [record.progress(numbers(n + 1), T0_US, now_s=n * 0.01) for n in range(150)]
    times = [n * 0.01 for n, entry in enumerate(told) if entry]
    assert times == [0, 0.01, 0.02, 1.0, 1.01, 1.02]
    assert record.progress(numbers(151, rule="maximum_passes"), T0_US, now_s=1.5)
    assert record.progress(numbers(152, rule="throttling"), T0_US, now_s=1.51) is None


def test_within_a_pass_progress_comes_twice_a_second_so_that_a_new_pass_is_told_at_once():
    record = Record(Side.SOURCE)
    told = [record.progress(numbers(1), T0_US, now_s=n * 0.1) for n in range(11)]
    assert [n for n, entry in enumerate(told) if entry] == [0, 5, 10]
    assert record.progress(numbers(2), T0_US, now_s=1.05)


def test_the_record_keeps_the_newest_progress_of_each_pass():
    record = Record(Side.SOURCE)
    record.progress(numbers(1), T0_US, now_s=0)
    record.progress(numbers(1, bytes_per_s=7), T0_US, now_s=1)
    record.progress(numbers(2), T0_US, now_s=2)
    assert ids_of(record.entries) == [2, 3]
    assert record.entries[0].progress.bytes_per_s == 7
    assert ids_of(record.after(1)) == [2, 3]


def test_the_record_keeps_64_progress_entries_and_every_phase():
    record = Record(Side.SOURCE)
    record.phase(SETUP, T0_US)
    for n in range(200):
        assert record.progress(numbers(n + 1), T0_US, now_s=n)
    record.phase(DONE, T0_US)
    kept = [entry.progress.pass_number for entry in record.entries if entry.progress]
    assert kept == list(range(137, 201))
    assert (record.entries[0].told, record.entries[-1].told) == (SETUP, DONE)
    assert record.entries[-1].message_id == 202


def test_a_closed_record_says_so_and_still_replays():
    record = Record(Side.DESTINATION)
    record.phase(DONE, T0_US)
    assert not record.closed
    record.close()
    assert record.closed
    assert ids_of(record.after(0)) == [1]


def test_a_very_long_failure_is_cut():
    entry = Record(Side.SOURCE).phase(FAILED, T0_US, failure=Failure(14, "x" * 5000))
    assert entry.failure == Failure(14, "x" * 2048)


def test_head_is_told_everything():
    entry = Entry(
        message_id=9,
        told=EXITED,
        updated_at_us=T0_US + 1,
        started_at_us=T0_US,
        blackout=BlackoutExited(duration_ms=12, stopped_at_us=T0_US + 12_000),
    )
    response = records.to_response(entry, Side.DESTINATION)
    told = response.notification
    assert response.message_id == 9
    assert response.update_time.ToMicroseconds() == T0_US + 1
    assert (told.origin, told.phase, told.state) == (
        options_pb2.ORIGIN_DESTINATION,
        options_pb2.PHASE_BLACKOUT_EXITED,
        options_pb2.PHASE_STATE_SUCCESS,
    )
    assert told.WhichOneof("phase_details") == "blackout_exited"
    assert told.blackout_exited.blackout_duration_milliseconds == 12
    assert told.blackout_exited.blackout_stop_timestamp.ToMicroseconds() == T0_US + 12_000


def test_progress_and_failure_are_ours_and_travel_in_fields_no_client_looks_at():
    record = Record(Side.SOURCE)
    moving = record.progress(numbers(3, dirty_bytes_per_s=4, expected_blackout_ms=1 << 40), T0_US, now_s=0)
    failed = record.phase(FAILED, T0_US, failure=Failure(1, "cancelled by the caller"))
    told = records.to_response(moving, Side.SOURCE).notification
    assert (told.origin, getattr(told.progress, "pass"), told.progress.bytes_total) == (
        options_pb2.ORIGIN_SOURCE,
        3,
        100,
    )
    assert told.progress.expected_blackout_milliseconds == (1 << 32) - 1
    failure = records.to_response(failed, Side.SOURCE).notification.failure
    assert (failure.code, failure.message) == (1, "cancelled by the caller")


U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
STAMPS_US = st.integers(1, 4_000_000_000_000_000)
TOLD = st.builds(Told, st.sampled_from(Phase), st.sampled_from(PhaseState))
PROGRESS = st.builds(Progress, U32, U64, U64, U64, U64, U64, U32, U32, st.sampled_from(["", "throttling"]))
ENTRIES = st.builds(
    Entry,
    message_id=st.integers(1, (1 << 32) - 1),
    told=TOLD,
    updated_at_us=STAMPS_US,
    started_at_us=st.just(0) | STAMPS_US,
    progress=st.none() | PROGRESS,
    blackout=st.none() | st.builds(BlackoutExited, U64, STAMPS_US),
    failure=st.none()
    | st.builds(Failure, st.integers(0, 16), st.text(st.characters(codec="utf-8"), max_size=50)),
)


@given(ENTRIES, st.sampled_from(Side))
def test_an_entry_survives_the_wire_and_the_journal(entry, side):
    assert records.entry_from_bytes(records.entry_bytes(entry, side)) == entry


def test_bytes_that_are_no_entry_are_damage():
    with pytest.raises(Damaged, match="a notification in the journal cannot be read"):
        records.entry_from_bytes(b"\xff")
    with pytest.raises(Damaged, match="notification 4 names phase 0, state 0"):
        records.entry_from_bytes(messages_pb2.NotificationsResponse(message_id=4).SerializeToString())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("phase"), TOLD),
        st.tuples(st.just("progress"), st.tuples(st.integers(1, 90), st.floats(0, 0.6))),
    ),
    max_size=150,
)


def played(steps):
    record, kept, now_s = Record(Side.SOURCE), [], 0.0
    for kind, detail in steps:
        if kind == "phase":
            known = record.entries
            entry = record.phase(detail, T0_US)
            entry = entry if entry not in known else None
        else:
            now_s += detail[1]
            entry = record.progress(numbers(detail[0]), T0_US, now_s=now_s)
        if entry:
            kept.append(entry)
    return record, kept


@given(STEPS)
def test_whatever_happens_ids_increase_phases_stay_and_progress_is_bounded(steps):
    record, told = played(steps)
    ids = ids_of(record.entries)
    assert ids == sorted(set(ids))
    assert ids_of(told) == list(range(1, len(told) + 1))
    assert [entry for entry in record.entries if not entry.progress] == [
        entry for entry in told if not entry.progress
    ]
    passes = [entry.progress.pass_number for entry in record.entries if entry.progress]
    assert len(passes) == len(set(passes)) <= 64


@given(STEPS, st.integers(0, 160))
def test_a_reader_that_comes_back_misses_only_what_was_thinned(steps, seen_id):
    record, _ = played(steps)
    assert record.after(seen_id) == [entry for entry in record.after(0) if entry.message_id > seen_id]


@given(STEPS)
def test_a_record_replayed_from_all_that_was_told_is_the_same_record(steps):
    record, told = played(steps)
    back = records.restore(
        Side.SOURCE, [records.entry_from_bytes(records.entry_bytes(e, Side.SOURCE)) for e in told]
    )
    assert back.entries == record.entries
    assert back.phase(Told(Phase.SETUP_DONE, PhaseState.RECOVERY_FAILED), T0_US) == record.phase(
        Told(Phase.SETUP_DONE, PhaseState.RECOVERY_FAILED), T0_US
    )


def test_a_restored_record_goes_on_with_its_start_time():
    first = Entry(5, SETUP, T0_US, started_at_us=T0_US - 3)
    again = records.restore(Side.SOURCE, [first]).phase(DONE, T0_US + 1)
    assert (again.message_id, again.started_at_us) == (6, T0_US - 3)


def test_an_entry_that_the_journal_kept_twice_is_restored_once():
    first, second = Entry(1, SETUP, T0_US), Entry(2, DONE, T0_US)
    assert records.restore(Side.SOURCE, [first, second, first, second]).entries == (first, second)


def test_revision_2691_counts_from_one_and_ends_with_the_transfer():
    record = Record(Side.SOURCE)
    record.transfer_started(T0_US)
    record.progress(numbers(1), T0_US, now_s=0)
    record.progress(numbers(1), T0_US, now_s=1)
    stream = Stream2691()
    assert [(m.message_id, m.event) for m in stream.take(record)] == [(1, "TRANSFER_IN_PROGRESS")]
    assert stream.take(record) == []
    assert not stream.ended
    record.phase(DONE, T0_US + 4)
    record.phase(EXITED, T0_US + 5)
    last = stream.take(record)
    assert [(m.message_id, m.event, m.error) for m in last] == [(2, "DONE", "")]
    assert last[0].start_time.ToMicroseconds() == T0_US
    assert last[0].update_time.ToMicroseconds() == T0_US + 4
    assert stream.ended
    assert stream.take(record) == []
    assert [m.message_id for m in Stream2691().take(record)] == [1, 2]


@pytest.mark.parametrize(("code", "event"), [(1, "FAILED"), (4, "TIMEOUT"), (14, "FAILED")])
def test_revision_2691_is_told_of_a_failure_and_of_a_timeout(code, event):
    record = Record(Side.SOURCE)
    record.phase(FAILED, T0_US, failure=Failure(code, "why it ended"))
    stream = Stream2691()
    told = stream.take(record)
    assert [(m.event, m.error) for m in told] == [(event, "why it ended")]
    assert not told[0].HasField("start_time")
    assert stream.ended


def test_message_ids_never_wrap():
    record = records.restore(
        Side.SOURCE, [dataclasses.replace(Entry(1, SETUP, T0_US), message_id=(1 << 32) - 1)]
    )
    with pytest.raises(AssertionError, match="used up"):
        record.phase(DONE, T0_US)
