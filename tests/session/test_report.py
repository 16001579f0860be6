import json

import pytest

from sandshift.config import Limits
from sandshift.errors import Damaged
from sandshift.session import report as reports
from sandshift.session.blackout import Blackout, Method, Split
from sandshift.session.options import Options, limits
from sandshift.session.phases import Phase, PhaseState, Told
from sandshift.session.precopy import plan
from sandshift.session.record import Progress, Record
from sandshift.session.report import (
    BlackoutReport,
    ChecksumReport,
    Moment,
    PassReport,
    PhaseReport,
    Report,
)
from sandshift.session.states import Side

T0_US = 1_750_000_000_000_000


def report(**changes):
    usual = {
        "session_id": "s-1",
        "sandbox_id": "box",
        "side": "source",
        "host": "a",
        "outcome": "success",
        "action": "stop",
        "began_at_us": T0_US,
        "ended_at_us": T0_US + 9,
    }
    return Report(**{**usual, **changes})


FULL = report(
    code=14,
    failure="the channel was lost",
    forced=True,
    transfer_ms=410.4,
    encrypted=True,
    accelerator="tcg",
    qemu_version="10.0.2",
    peer_qemu_version="10.0.3",
    memory_bytes=256 << 20,
    bytes_transferred=300 << 20,
    passes=(
        PassReport(
            number=1, at_ms=12.5, bytes_transferred=5 << 20, bytes_remaining=1 << 20, throttle_percent=20
        ),
    ),
    phases=(
        PhaseReport(phase="SETUP_DONE", state="SUCCESS", at_us=T0_US, lasted_ms=4.0),
        PhaseReport(phase="DONE", state="SUCCESS", at_us=T0_US + 4000),
    ),
    blackout=BlackoutReport(
        duration_ms=9.1, error_ms=2.1, method="pieces", stop_ms=1.5, last_pass_ms=4.0, device_state_ms=0.5
    ),
    clock_skew_ms=-3.0,
    options=reports.options_of(Options(maximum_passes=9)),
    plan=reports.plan_of(plan(Options(), limits(Options(), Limits()), downtime_limit_ms=20)),
    rules=("pass 5: guest CPUs throttled by 20 %",),
    checksum=ChecksumReport(took_ms=8.9, matched=True),
    timeline=(Moment(at_ms=1.0, what="MIGRATION active"),),
    warnings=("clocks differ",),
)


@pytest.mark.parametrize("one", [report(), FULL])
def test_a_report_is_json_and_comes_back(one):
    assert reports.decode(reports.encode(one)) == one
    assert json.loads(reports.encode(one))["schema"] == 1


def test_the_json_names_units_and_says_null_where_a_side_cannot_know():
    document = json.loads(reports.encode(report()))
    assert document["blackout"]["duration_ms"] is None
    assert document["transfer_ms"] is None
    assert document["side"] == "source"


def test_fields_of_a_later_version_are_passed_over_and_rubbish_is_damage():
    document = json.loads(reports.encode(FULL)) | {"of_the_future": 1}
    assert reports.decode(json.dumps(document).encode()) == FULL
    with pytest.raises(Damaged, match="this is no report of a session"):
        reports.decode(b"{}")


def test_phases_have_durations_and_passes_their_numbers():
    record = Record(Side.SOURCE)
    success = PhaseState.SUCCESS
    record.progress(Progress(1, 100, 10, 90), T0_US, now_s=0)
    record.transfer_started(T0_US)
    record.phase(Told(Phase.SETUP_DONE, success), T0_US + 1_000)
    record.progress(Progress(2, 100, 20, 80, 3, 4, 50), T0_US + 2_500, now_s=1)
    record.phase(Told(Phase.DONE, success), T0_US + 5_000)
    assert reports.phases_of(record.entries) == (
        PhaseReport(phase="SETUP_DONE", state="SUCCESS", at_us=T0_US + 1_000, lasted_ms=4.0),
        PhaseReport(phase="DONE", state="SUCCESS", at_us=T0_US + 5_000),
    )
    first, second = reports.passes_of(record.entries)
    assert (first.number, first.at_ms) == (1, 0.0)
    assert second == PassReport(
        number=2,
        at_ms=2.5,
        bytes_transferred=20,
        bytes_remaining=80,
        dirty_bytes_per_s=3,
        bytes_per_s=4,
        throttle_percent=50,
    )
    assert reports.phases_of([]) == ()


def test_a_blackout_is_reported_with_its_pieces_and_its_error():
    pieces = Split(stop_ms=1.0, handover_ms=2.0)
    whole = reports.blackout_of(Blackout(9_100, 2_100, Method.PIECES), pieces)
    assert whole == BlackoutReport(
        duration_ms=9.1, error_ms=2.1, method="pieces", stop_ms=1.0, handover_ms=2.0
    )
    assert reports.blackout_of(Blackout(9_000, None, Method.CLOCKS), Split()).error_ms is None
    assert reports.blackout_of(None, pieces) == BlackoutReport(stop_ms=1.0, handover_ms=2.0)


def test_a_report_is_bounded_and_says_what_was_cut():
    long = report(
        warnings=tuple(str(n) for n in range(500)),
        timeline=tuple(Moment(at_ms=float(n), what="x") for n in range(2001)),
        passes=tuple(
            PassReport(number=n, at_ms=0.0, bytes_transferred=0, bytes_remaining=0) for n in range(1200)
        ),
    )
    kept = reports.decode(reports.encode(long))
    assert (len(kept.passes), len(kept.timeline), len(kept.warnings)) == (1000, 2000, 100)
    assert (kept.passes[-1].number, kept.timeline[0].at_ms) == (1199, 1.0)
    assert kept.warnings[-3:] == (
        "passes: the newest 1000 of 1200 are here",
        "timeline: the newest 2000 of 2001 are here",
        "warnings: the newest 97 of 500 are here",
    )


def test_a_person_reads_everything():
    text = reports.render(FULL)
    assert text.splitlines() == [
        "session      s-1",
        "sandbox      box, source, host a",
        "outcome      success, finalized with stop, BY FORCE",
        "failure      the channel was lost (code 14)",
        "transfer     410 ms, 300.0 MiB, encrypted",
        "machine      256.0 MiB, tcg, QEMU 10.0.2 (peer 10.0.3)",
        "blackout     9.1 +- 2.1 ms, by pieces",
        "   of which  stop 1.5, last pass 4.0, device state 0.5 ms",
        "checksum     the same on both sides, 8.9 ms to hash",
        "phases",
        "  SETUP_DONE           SUCCESS                             4.0 ms",
        "  DONE                 SUCCESS",
        "passes",
        "     1 at      12.5 ms  sent      5.0 MiB  left      1.0 MiB  dirtied      0.0 MiB/s  throttle 20 %",
        "options",
        "  maximum_passes = 9",
        "  compression = False",
        "  checksum_verification = False",
        "  perf_tracing = False",
        "  cancel_if_blackout_exceeds = False",
        "  prepare_mode = False",
        "in force",
        "  downtime_limit_ms = 20",
        "  throttling = True",
        "  throttling_from_pass = 5",
        "  throttling_asked_for = False",
        "  minimum_throttle_percent = 20",
        "  peak_throttle_percent = 99",
        "  target_passes = 12",
        "  maximum_passes = 30",
        "  relaxed_blackout_ms = 1000",
        "  forced_blackout_ms = 10000",
        "  threshold_ms = None",
        "  stall_s = 30.0",
        "  deadline_s = 1800.0",
        "rules",
        "  pass 5: guest CPUs throttled by 20 %",
        "timeline",
        "         1.0 ms  MIGRATION active",
        "warnings",
        "  clocks differ",
    ]


def test_a_person_reads_little_of_a_session_in_which_little_happened():
    text = reports.render(report(outcome="none", action="resume"))
    assert text.splitlines() == [
        "session      s-1",
        "sandbox      box, source, host a",
        "outcome      none, finalized with resume",
        "machine      0.0 MiB, ?, QEMU ?",
    ]


@pytest.mark.parametrize(
    ("encrypted", "words"), [(None, "encryption not known"), (False, "NOT ENCRYPTED"), (True, "encrypted")]
)
def test_a_stream_in_the_clear_is_not_passed_over(encrypted, words):
    assert reports.render(report(transfer_ms=1.0, encrypted=encrypted)).splitlines()[3].endswith(f", {words}")


def test_a_checksum_says_whether_it_matched_and_an_unknown_error_is_not_shown():
    text = reports.render(
        report(
            checksum=ChecksumReport(took_ms=1.0), blackout=BlackoutReport(duration_ms=5.0, method="clocks")
        )
    )
    assert "checksum     not compared here, 1.0 ms to hash" in text
    assert "blackout     5.0 ms, by clocks" in text
    assert "DIFFERENT" in reports.render(report(checksum=ChecksumReport(took_ms=1.0, matched=False)))
