import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandshift.errors import Damaged, NoRoom
from sandshift.session import journal as journals
from sandshift.session import phases
from sandshift.session.journal import (
    HEADING,
    Closed,
    Forced,
    Journal,
    JournalState,
    Noted,
    Opened,
    RightWritten,
    StreamsAt,
    Told,
)
from sandshift.session.phases import Phase, PhaseState
from sandshift.session.record import Entry, Failure, Progress
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import Cell
from sandshift.session.states import Side, State

OPENED = Opened(
    side="SOURCE",
    session_id="s-1",
    sandbox_id="box",
    key_id=b"12345678",
    options=b"",
    encrypted=True,
    config_digest=b"d" * 32,
    opened_at_us=1_750_000_000_000_000,
)


def entry(message_id, pass_number=None, state=PhaseState.SUCCESS):
    numbers = None if pass_number is None else Progress(pass_number, 1, 2, 3)
    phase = Phase.SETUP_DONE if numbers is None else Phase.TRANSFER_IN_PROGRESS
    return Entry(message_id, phases.Told(phase, state), updated_at_us=5, progress=numbers)


def written(*added):
    journal = Journal()
    return journal.append(OPENED, *added), journal


def test_a_journal_says_what_was_written_last():
    data, journal = written(
        RightWritten("OPEN", "SourceExported"),
        journals.told(entry(1), Side.SOURCE),
        Noted("patch:c1", b"one"),
        RightWritten("RELEASED", "TransferCompleted", complete=True, handover=b"h", reason="why"),
        StreamsAt((("p", 1, 70), ("p", 2, 0))),
        Noted("patch:c1", b"two"),
        Forced("RELEASED", 9),
        Closed(),
    )
    found = journals.replay(data)
    assert (found.valid_bytes, found.torn_bytes) == (len(data), 0)
    assert found.state == journal.state
    assert found.state.opened == OPENED
    assert found.state.entries == (entry(1),)
    assert found.state.notes == {"patch:c1": b"two"}
    assert found.state.streams.offsets == (("p", 1, 70), ("p", 2, 0))
    assert found.state.forced == Forced("RELEASED", 9)
    assert found.state.closed
    assert found.state.side is Side.SOURCE


def test_the_right_to_run_comes_back_as_it_was_ordered_to_be_written():
    record = RightRecord(
        side=Side.SOURCE,
        session_id="s-1",
        cell=Cell.RELEASED,
        state=State.CANCELLED,
        complete=True,
        cancelled=True,
        forced=True,
        reason="why",
        handover=b"mine",
        peer_handover=b"yours",
    )
    data, _ = written(journals.right_written(record))
    assert journals.replay(data).state.right_record == record


def test_before_anything_was_written_about_it_there_is_no_right_record():
    data, _ = written()
    assert journals.replay(data).state.right_record is None
    with pytest.raises(Damaged, match="says nothing of the session that it belongs to"):
        _ = JournalState().side


def test_the_notification_record_goes_on_where_it_was():
    data, _ = written(*(journals.told(entry(n), Side.SOURCE) for n in (1, 2, 2, 1)))
    record = journals.replay(data).state.notification_record()
    assert [kept.message_id for kept in record.entries] == [1, 2]
    assert record.side is Side.SOURCE


def test_no_file_and_a_heading_cut_off_are_an_empty_journal():
    for size in range(len(HEADING)):
        found = journals.replay(HEADING[:size])
        assert (found.state, found.valid_bytes, found.torn_bytes) == (JournalState(), 0, size)
    assert journals.replay(HEADING).valid_bytes == len(HEADING)
    assert Journal(journals.replay(b"")).append(OPENED).startswith(HEADING)


def test_another_file_is_no_journal():
    with pytest.raises(Damaged, match="this is no journal of a session"):
        journals.replay(b"#!/bin/sh\n")


def test_wherever_a_write_is_cut_off_what_was_there_before_stays_and_the_rest_is_reported():
    before, journal = written(RightWritten("OPEN", "Transferring"))
    state = journal.state
    data = before + journal.append(RightWritten("RELEASED", "TransferCompleted"))
    for size in range(len(before), len(data)):
        found = journals.replay(data[:size])
        assert (found.state, found.valid_bytes, found.torn_bytes) == (state, len(before), size - len(before))


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 300, b"\0\0\0\5\0\0\0\0abcde"])
def test_a_tail_that_never_was_a_record_is_dropped(tail):
    data, journal = written()
    found = journals.replay(data + tail)
    assert (found.state, found.valid_bytes, found.torn_bytes) == (journal.state, len(data), len(tail))


def test_damage_in_the_middle_is_not_taken_for_a_write_cut_off():
    data, journal = written()
    middle = len(data)
    data += journal.append(RightWritten("OPEN", "Transferring"))
    last = len(data)
    data += journal.append(RightWritten("RELEASED", "TransferCompleted"))
    for place in range(middle, last):
        broken = bytearray(data)
        broken[place] ^= 0x41
        with pytest.raises(Damaged, match=f"damaged at byte {middle}: a good record follows at byte {last}"):
            journals.replay(bytes(broken))


def test_a_record_is_good_only_where_it_was_written():
    inner = journals.encode(RightWritten("KEPT", "Failed"), offset=0)
    data, journal = written(Noted("text of a stranger", inner))
    cut = data[:-1]
    assert journals.replay(cut).state.notes == {}
    assert journals.replay(data).state == journal.state


def test_after_a_cut_the_journal_goes_on_where_it_was_good():
    data, _ = written(RightWritten("OPEN", "Transferring"))
    found = journals.replay(data + b"\0\0\1")
    journal = Journal(found)
    grown = data[: found.valid_bytes] + journal.append(RightWritten("KEPT", "Failed"))
    assert journals.replay(grown).state.right == RightWritten("KEPT", "Failed")


def raw(value):
    payload = msgspec.msgpack.encode(value)
    offset = len(HEADING)
    checksum = zlib.crc32(payload, zlib.crc32(offset.to_bytes(8, "big")))
    return HEADING + len(payload).to_bytes(4, "big") + checksum.to_bytes(4, "big") + payload


def test_a_record_of_a_kind_that_we_do_not_know_is_not_passed_over():
    with pytest.raises(Damaged, match="record at byte 20 is of a kind that this sandshift does not know"):
        journals.replay(raw({"type": "of the future"}))


@pytest.mark.parametrize("first", [Closed(), RightWritten("OPEN", "Idle"), Noted("x")])
def test_the_first_record_names_the_session(first):
    with pytest.raises(Damaged, match=f"has a record {type(first).__name__} where it cannot stand"):
        Journal().append(first)


def test_a_session_opens_once_and_nothing_follows_its_end():
    _, journal = written()
    with pytest.raises(Damaged, match="a record Opened where it cannot stand"):
        journal.append(OPENED)
    journal.append(Closed())
    with pytest.raises(Damaged, match="a record Noted where it cannot stand"):
        journal.append(Noted("x"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RightWritten("HELT", "Failed"), "names a cell 'HELT'"),
        (RightWritten("HELD", "Fallen"), "names a state 'Fallen'"),
    ],
)
def test_words_that_we_do_not_know_are_not_guessed(record, message):
    _, journal = written()
    with pytest.raises(Damaged, match=message):
        journal.append(record)
    with pytest.raises(Damaged, match="names a side 'LEFT'"):
        Journal().append(msgspec.structs.replace(OPENED, side="LEFT"))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    _, journal = written()
    state, size = journal.state, journal.size_bytes
    with pytest.raises(NoRoom, match=r"a journal record of \d+ bytes: at most 131072"):
        journal.append(RightWritten("OPEN", "Idle", handover=b"x" * journals.RECORD_BYTES_MAX))
    assert (journal.state, journal.size_bytes) == (state, size)


def test_notes_are_bounded_together():
    _, journal = written(Noted("a", b"x" * 100_000), Noted("b", b"x" * 100_000), Noted("a", b"x" * 120_000))
    with pytest.raises(NoRoom, match="note 'c': the session's notes would have 270003 bytes, at most 262144"):
        journal.append(Noted("c", b"x" * 50_000))


def test_a_journal_stays_under_a_mebibyte_by_compaction():
    _, journal = written()
    contents = b""
    for _ in range(4000):
        contents += journal.append(RightWritten("OPEN", "Transferring", reason="x" * 400))
        if journal.wants_compaction:
            contents = journal.compacted()
            assert len(contents) < 2000
        assert journal.size_bytes < journals.JOURNAL_BYTES_MAX
    assert journals.replay(contents).state == journal.state


def test_a_journal_that_is_never_compacted_is_full_in_the_end():
    _, journal = written()
    record = RightWritten("OPEN", "Transferring", handover=b"x" * 60_000)
    for _ in range(17):
        journal.append(record)
    with pytest.raises(NoRoom, match=r"the journal has 102\d+ bytes and 60\d+ more are over 1048576"):
        journal.append(record)


def test_the_fullest_session_fits_after_compaction():
    failures = [
        Entry(n + 200, phases.Told(phase, state), 5, failure=Failure(14, "ü" * 2048))
        for n, (phase, state) in enumerate((phase, state) for phase in Phase for state in PhaseState)
    ]
    journal = Journal()
    for record in (
        OPENED,
        *(journals.told(entry(n + 1, n), Side.SOURCE) for n in range(150)),
        *(journals.told(one, Side.SOURCE) for one in failures),
        *(Noted(f"patch:{n}", b"x" * 2000) for n in range(128)),
        StreamsAt(tuple((f"process-{n}" * 3, 2, 1 << 62) for n in range(2000))),
        RightWritten(
            "RELEASED", "TransferCompleted", handover=b"x" * 48 * 1024, peer_handover=b"y" * 48 * 1024
        ),
        Closed(),
    ):
        journal.append(record)
        if journal.wants_compaction:
            journal.compacted()
    assert journal.size_bytes < journals.JOURNAL_BYTES_MAX
    assert len(journal.compacted()) < journals.JOURNAL_BYTES_MAX
    assert len(journal.state.entries) == 64 + len(failures)


RECORDS = st.one_of(
    st.builds(
        RightWritten,
        st.sampled_from([cell.name for cell in Cell]),
        st.sampled_from([state.value for state in State]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.binary(max_size=5),
    ),
    st.builds(
        lambda n, p: journals.told(entry(n, p), Side.SOURCE),
        st.integers(1, 99),
        st.none() | st.integers(0, 80),
    ),
    st.builds(Noted, st.sampled_from("abc"), st.binary(max_size=9)),
    st.builds(
        StreamsAt, st.tuples(st.tuples(st.text(max_size=3), st.integers(0, 2), st.integers(0, 1 << 63)))
    ),
    st.builds(Forced, st.sampled_from([cell.name for cell in Cell]), st.integers(0, 1 << 60)),
)


@given(st.lists(RECORDS, max_size=30), st.booleans())
def test_replay_is_the_first_run_and_a_compaction_says_the_same(added, closed):
    data, journal = written(*added, *([Closed()] if closed else []))
    found = journals.replay(data)
    assert found.state == journal.state
    compacted = journals.compact(found.state)
    assert journals.replay(compacted).state == found.state
    assert journals.compact(journals.replay(compacted).state) == compacted
    assert len(compacted) <= len(data)


@given(st.lists(RECORDS, min_size=1, max_size=8), st.data())
@settings(max_examples=200)
def test_a_flipped_bit_is_never_read_as_something_else(added, data):
    journal, states = Journal(), []
    whole = journal.append(OPENED)
    states.append(journal.state)
    for record in added:
        whole += journal.append(record)
        states.append(journal.state)
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << (bit % 8)
    try:
        found = journals.replay(bytes(broken))
    except Damaged:
        return
    assert found.torn_bytes > 0
    assert found.state in [JournalState(), *states[:-1]]


def test_a_compaction_of_nothing_is_a_heading():
    assert journals.compact(JournalState()) == HEADING
    assert Told(b"").entry == b""
