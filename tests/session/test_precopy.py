import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandshift.config import Limits
from sandshift.session import precopy
from sandshift.session.options import Options, limits
from sandshift.session.phases import Outcome
from sandshift.session.precopy import Precopy, Rule, TransferStats, Tuning

MIB = 1 << 20
BOUNDS = limits(Options(), Limits())


def planned(downtime_limit_ms=20, **options):
    return precopy.plan(Options(**options), BOUNDS, downtime_limit_ms=downtime_limit_ms)


def transfer(**options):
    return Precopy(planned(**options), started_s=0.0)


def stats(pass_number, transferred=1, remaining=100 * MIB, **more):
    return TransferStats(pass_number, 256 * MIB, transferred, remaining, **more)


def passes(subject, numbers, remaining=100 * MIB):
    """Feed one answer per pass, a tenth of a second apart, and give the decisions."""
    return [subject.on_stats(stats(n, n, remaining), now_s=n * 0.1) for n in numbers]


def test_the_plan_fills_in_what_the_options_leave_open():
    plan = planned()
    assert plan == precopy.Plan(
        downtime_limit_ms=20,
        throttling=True,
        throttling_from_pass=5,
        throttling_asked_for=False,
        minimum_throttle_percent=20,
        peak_throttle_percent=99,
        target_passes=12,
        maximum_passes=30,
        relaxed_blackout_ms=1000,
        forced_blackout_ms=10_000,
        threshold_ms=None,
        stall_s=30.0,
        deadline_s=1800.0,
    )


def test_the_plan_follows_the_options():
    plan = planned(
        skip_throttling=True,
        throttling_scale_percent=50.0,
        minimum_throttle_percent=39,
        target_passes=4,
        throttling_from_pass=2,
        maximum_passes=8,
        target_blackout_ms=40,
        cancel_threshold_ms=300,
        cancel_if_blackout_exceeds=True,
    )
    assert (plan.throttling, plan.throttling_asked_for, plan.throttling_from_pass) == (False, True, 2)
    assert (plan.minimum_throttle_percent, plan.peak_throttle_percent) == (39, 69)
    assert (plan.target_passes, plan.maximum_passes) == (4, 8)
    assert (plan.downtime_limit_ms, plan.relaxed_blackout_ms, plan.threshold_ms) == (40, 300, 300)
    assert plan.forced_blackout_ms == 2_000_000


def test_a_maximum_below_the_usual_target_lowers_the_target_and_a_target_above_the_usual_maximum_raises_that():
    assert planned(maximum_passes=3).target_passes == 3
    assert planned(target_passes=50).maximum_passes == 50


def test_a_threshold_that_is_in_force_bounds_the_blackout_aimed_at():
    plan = planned(target_blackout_ms=500, cancel_threshold_ms=100, cancel_if_blackout_exceeds=True)
    assert (plan.downtime_limit_ms, plan.relaxed_blackout_ms) == (100, 100)
    assert planned(target_blackout_ms=5000).relaxed_blackout_ms == 5000


def test_a_transfer_begins_with_the_blackout_aimed_at_and_no_throttle():
    assert transfer(target_blackout_ms=7).tuning == Tuning(downtime_limit_ms=7, throttle_percent=0)


def test_throttling_begins_at_the_pass_asked_for_and_rises_to_its_peak_at_the_target():
    subject = transfer(throttling_from_pass=2, minimum_throttle_percent=20, target_passes=6, maximum_passes=9)
    decisions = passes(subject, range(1, 8))
    throttles = [one.tune.throttle_percent if one.tune else None for one in decisions]
    assert throttles == [None, 20, 39, 59, 79, 99, 99]
    assert decisions[1].rule is Rule.THROTTLING
    assert decisions[1].said == "pass 2: guest CPUs throttled by 20 %"
    assert decisions[0].progress.rule == ""
    assert decisions[1].progress.rule == "throttling"


def test_the_scale_lowers_the_peak():
    subject = transfer(
        throttling_from_pass=1, throttling_scale_percent=10.0, target_passes=2, maximum_passes=9
    )
    assert [d.tune.throttle_percent for d in passes(subject, [1, 2]) if d.tune] == [20, 27]


def test_a_start_at_or_after_the_target_is_throttled_at_the_peak_at_once():
    subject = transfer(throttling_from_pass=6, target_passes=6, target_blackout_ms=2000)
    assert passes(subject, [6])[0].tune.throttle_percent == 99


def test_throttling_that_is_skipped_never_begins():
    subject = transfer(skip_throttling=True, throttling_from_pass=1, maximum_passes=40)
    assert {d.tune.throttle_percent for d in passes(subject, range(1, 60)) if d.tune} == {0}


def test_unasked_a_guest_that_converges_is_left_alone_and_one_that_does_not_is_throttled():
    converging = transfer()
    for n in range(1, 11):
        decision = converging.on_stats(stats(n, n, (100 * MIB) >> n), now_s=n * 0.1)
        assert decision.tune is None
    stuck = transfer()
    decisions = passes(stuck, range(1, 8))
    assert [d.tune.throttle_percent if d.tune else 0 for d in decisions] == [0, 0, 0, 0, 20, 31, 42]


def test_a_throttle_is_never_lowered_and_polls_within_a_pass_change_nothing():
    subject = transfer(throttling_from_pass=1, target_passes=3, target_blackout_ms=5000)
    assert passes(subject, [1])[0].tune.throttle_percent == 20
    assert passes(subject, [1])[0].tune is None
    assert passes(subject, [3])[0].tune.throttle_percent == 99
    assert passes(subject, [2])[0].tune is None


def test_from_the_target_on_a_longer_blackout_is_accepted_twice_as_long_each_pass():
    subject = transfer(skip_throttling=True, target_passes=3, maximum_passes=50)
    decisions = passes(subject, range(1, 12))
    assert [d.tune.downtime_limit_ms if d.tune else None for d in decisions] == [
        None, None, 40, 80, 160, 320, 640, 1000, None, None, None,
    ]  # fmt: skip
    assert decisions[2].rule is Rule.TARGET_PASSES
    assert decisions[2].said == "pass 3: 3 passes were aimed at: blackout up to 40 ms accepted"


def test_two_rules_that_act_at_once_are_both_told():
    subject = transfer(throttling_from_pass=1, target_passes=1)
    decision = passes(subject, [1])[0]
    assert decision.rule is Rule.TARGET_PASSES
    assert decision.said == (
        "pass 1: guest CPUs throttled by 99 %; 1 passes were aimed at: blackout up to 40 ms accepted"
    )


def test_at_the_maximum_the_switchover_is_forced():
    subject = transfer(maximum_passes=4, skip_throttling=True)
    decisions = passes(subject, range(1, 7))
    assert decisions[3].tune == Tuning(2_000_000, 0)
    assert decisions[3].rule is Rule.MAXIMUM_PASSES
    assert decisions[3].said == "pass 4: at most 4 passes: switchover forced, blackout up to 2000000 ms"
    assert [d.tune for d in decisions[4:]] == [None, None]
    assert decisions[4].progress.rule == "maximum_passes"


def test_a_maximum_that_nobody_asked_for_does_not_force_a_blackout_of_minutes():
    subject = transfer()
    assert passes(subject, [30])[0].tune.downtime_limit_ms == 10_000
    longer = transfer(target_blackout_ms=60_000)
    assert passes(longer, [30])[0].tune.downtime_limit_ms == 60_000


def test_a_transfer_in_which_no_byte_moves_is_given_up():
    subject = transfer()
    subject.on_stats(stats(1, 1000), now_s=5.0)
    assert subject.on_stats(stats(1, 1000), now_s=34.9).end is None
    decision = subject.on_stats(stats(1, 1000), now_s=35.0)
    assert decision.end.outcome is Outcome.STALL
    assert decision.rule is Rule.STALL
    assert decision.said == decision.end.message
    assert decision.end.message.startswith("no byte has moved for 30.0 s, limits.stall_s is 30:")
    assert decision.progress.rule == "stall"


def test_a_transfer_past_its_deadline_is_given_up():
    bounds = dataclasses.replace(BOUNDS, transfer_deadline_s=2.0)
    subject = Precopy(precopy.plan(Options(), bounds, downtime_limit_ms=20), started_s=10.0)
    assert subject.on_stats(stats(1, 1), now_s=11.99).end is None
    decision = subject.on_stats(stats(1, 2), now_s=12.0)
    assert (decision.rule, decision.end.outcome) == (Rule.DEADLINE, Outcome.DEADLINE)
    assert decision.end.message.startswith("the transfer took 2.0 s and its deadline is 2 s:")


def test_at_the_switchover_a_blackout_that_would_be_too_long_is_refused_while_the_source_can_go_on():
    subject = transfer(cancel_if_blackout_exceeds=True, cancel_threshold_ms=500)
    subject.on_stats(stats(1, 0), now_s=1.0)
    subject.on_blackout(2.0)
    decision = subject.at_switchover(stats(2, 0, 100_000_000, bytes_per_s=200_000_000), now_s=2.1)
    assert decision.end.outcome is Outcome.BLACKOUT_THRESHOLD
    assert decision.rule is Rule.BLACKOUT_THRESHOLD
    assert decision.end.message == (
        "the blackout would take 600 ms (100000000 bytes left at 200000000 bytes/s), more than the 500 ms of "
        "blackout_time_threshold_for_cancelling_migration: the guest goes on here; raise the threshold, or move it "
        "when it writes less"
    )


def test_at_the_switchover_a_blackout_within_the_threshold_goes_on():
    subject = transfer(cancel_if_blackout_exceeds=True, cancel_threshold_ms=601)
    subject.on_blackout(2.0)
    assert subject.at_switchover(stats(2, 0, 100_000_000, bytes_per_s=200_000_000), now_s=2.1).end is None
    assert subject.at_switchover(stats(2, 0, 0), now_s=2.1).end is None


def test_without_its_switch_the_threshold_cancels_nothing():
    subject = transfer(cancel_threshold_ms=1)
    subject.on_blackout(1.0)
    assert subject.at_switchover(stats(2, 0, 1 << 40), now_s=2.0).end is None
    assert subject.on_stats(stats(2, 1), now_s=3.0).end is None


def test_if_nothing_ever_moved_the_blackout_would_last_for_ever():
    subject = transfer(cancel_if_blackout_exceeds=True)
    decision = subject.at_switchover(stats(1, 0, 1), now_s=0.0)
    assert (
        "the blackout would take for ever (1 bytes left at 0 bytes/s), more than the 2000 ms"
        in decision.end.message
    )


def test_a_blackout_that_has_become_too_long_is_ended_and_nothing_is_tuned_in_it():
    subject = transfer(cancel_if_blackout_exceeds=True, cancel_threshold_ms=500, maximum_passes=1)
    subject.on_blackout(1.0)
    within = subject.on_stats(stats(9, 1), now_s=1.5)
    assert (within.end, within.tune) == (None, None)
    decision = subject.on_stats(stats(9, 2), now_s=1.51)
    assert decision.end.outcome is Outcome.BLACKOUT_THRESHOLD
    assert decision.end.message.startswith(
        "the blackout has lasted 510 ms, more than the 500 ms of blackout_time_"
    )


def test_the_rate_is_measured_over_the_last_second_or_qemus_if_that_is_better():
    subject = transfer()
    for tenth in range(40):
        subject.on_stats(stats(1, tenth * (10 if tenth < 20 else 1000)), now_s=tenth / 10)
    assert subject.rate_bytes_per_s(stats(1)) == 10_000
    assert subject.rate_bytes_per_s(stats(1, bytes_per_s=50_000)) == 50_000


def test_progress_carries_the_numbers_and_an_estimate_of_the_blackout():
    subject = transfer()
    first = subject.on_stats(
        stats(1, 0, 1000, expected_blackout_ms=300, throttle_percent=0), now_s=0.0
    ).progress
    assert first.expected_blackout_ms == 300
    later = subject.on_stats(
        stats(2, 5, 1000, bytes_per_s=3000, dirty_bytes_per_s=4, throttle_percent=30), now_s=1.0
    ).progress
    assert dataclasses.astuple(later) == (2, 256 * MIB, 5, 1000, 4, 3000, 30, 334, "")


def test_the_shell_is_told_when_to_look_again():
    subject = transfer(cancel_if_blackout_exceeds=True, cancel_threshold_ms=100)
    assert subject.next_check_s(1.0) == 0.25
    assert subject.next_check_s(29.9) == pytest.approx(0.1)
    assert subject.next_check_s(99.0) == 0.0
    subject.on_blackout(1.0)
    assert subject.next_check_s(1.04) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("memory_mib", "cache_mib"), [(256, 128), (300, 128), (1, 1), (4096, 512), (1 << 20, 512)]
)
def test_the_cache_for_compression_is_a_power_of_two_up_to_half_the_memory(memory_mib, cache_mib):
    assert precopy.xbzrle_cache_bytes(Options(compression=True), memory_mib * MIB) == cache_mib * MIB
    assert precopy.xbzrle_cache_bytes(Options(), memory_mib * MIB) == 0


def played(options, *, working_set, dirty_bytes_per_s, bandwidth, latency_s=0.0, seconds_max=4000.0):
    """A model of QEMU's pre-copy and of a guest that writes: what becomes of it, in model time."""
    plan = precopy.plan(options, dataclasses.replace(BOUNDS, transfer_deadline_s=60.0), downtime_limit_ms=20)
    subject = Precopy(plan, started_s=0.0)
    now_s, sent, remaining, number, tuning = 0.0, 0, 256 * MIB, 1, subject.tuning
    while now_s < seconds_max:
        decision = subject.on_stats(
            TransferStats(number, 256 * MIB, sent, remaining, dirty_bytes_per_s, bandwidth), now_s=now_s
        )
        if decision.end:
            return decision.end.outcome, now_s, number, subject
        tuning = decision.tune or tuning
        if number > 1 and remaining * 1000 <= bandwidth * tuning.downtime_limit_ms:
            subject.on_blackout(now_s)
            last = subject.at_switchover(
                TransferStats(number, 256 * MIB, sent, remaining, dirty_bytes_per_s, bandwidth), now_s=now_s
            )
            return (last.end.outcome if last.end else Outcome.SUCCESS), now_s, number, subject
        took_s = min(remaining / bandwidth + latency_s, subject.next_check_s(now_s) or 0.25)
        moved = min(remaining, int(bandwidth * max(took_s - latency_s, 0)) + 1)
        sent, remaining, now_s = sent + moved, remaining - moved, now_s + took_s
        if remaining <= 0:
            written = (
                dirty_bytes_per_s * (100 - tuning.throttle_percent) // 100 * (moved / bandwidth + latency_s)
            )
            number, remaining = number + 1, int(min(working_set, written))
    return None, now_s, number, subject


UNLIMITED = {"working_set": 200 * MIB, "dirty_bytes_per_s": 8 << 30, "bandwidth": 128 * MIB}


def test_an_unlimited_dirtier_is_brought_over_by_throttling():
    outcome, _, number, subject = played(Options(throttling_from_pass=2, target_passes=6), **UNLIMITED)
    assert outcome is Outcome.SUCCESS
    assert number < 30
    assert subject.tuning.throttle_percent == 99


def test_an_unlimited_dirtier_that_may_not_be_throttled_is_forced_over_at_the_maximum_of_passes():
    outcome, _, number, subject = played(Options(skip_throttling=True, maximum_passes=5), **UNLIMITED)
    assert (outcome, number) == (Outcome.SUCCESS, 5)
    assert subject.tuning.downtime_limit_ms == 2_000_000


def test_an_unlimited_dirtier_whose_blackout_must_be_short_is_given_up_and_stays():
    options = Options(
        skip_throttling=True, maximum_passes=5, cancel_if_blackout_exceeds=True, cancel_threshold_ms=100
    )
    outcome, _, number, _ = played(options, **UNLIMITED)
    assert (outcome, number) == (Outcome.BLACKOUT_THRESHOLD, 5)


def test_an_unlimited_dirtier_on_a_slow_line_is_given_up_at_the_deadline():
    outcome, now_s, _, _ = played(
        Options(skip_throttling=True), working_set=200 * MIB, dirty_bytes_per_s=8 << 30, bandwidth=MIB
    )
    assert outcome is Outcome.DEADLINE
    assert now_s == pytest.approx(60, abs=0.3)


@given(
    working_set=st.integers(0, 256 * MIB),
    dirty_bytes_per_s=st.integers(0, 16 << 30),
    bandwidth=st.integers(1, 16 << 30),
    options=st.builds(
        Options,
        skip_throttling=st.booleans(),
        throttling_scale_percent=st.none() | st.floats(1, 100),
        minimum_throttle_percent=st.none() | st.integers(1, 99),
        throttling_from_pass=st.none() | st.integers(1, 40),
        maximum_passes=st.none() | st.integers(1, 60),
        target_blackout_ms=st.none() | st.integers(1, 2_000_000),
        cancel_threshold_ms=st.none() | st.integers(1, 10_000),
        cancel_if_blackout_exceeds=st.booleans(),
    ),
)
@settings(max_examples=80, deadline=None)
def test_every_guest_is_brought_over_or_given_up_within_the_limits(
    working_set, dirty_bytes_per_s, bandwidth, options
):
    outcome, now_s, _, subject = played(
        options, working_set=working_set, dirty_bytes_per_s=dirty_bytes_per_s, bandwidth=bandwidth
    )
    assert outcome in {Outcome.SUCCESS, Outcome.DEADLINE, Outcome.STALL, Outcome.BLACKOUT_THRESHOLD}
    assert now_s <= 60.5
    assert 0 <= subject.tuning.throttle_percent <= subject.plan.peak_throttle_percent <= 99
    assert 1 <= subject.tuning.downtime_limit_ms <= 2_000_000
