import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.session import blackout as rules
from sandshift.session.blackout import DestinationSaw, DestinationStamps, Method, SourceSays, SourceStamps

T0_US = 1_750_000_000_000_000
SAYS = SourceSays(stopped_at_us=T0_US, stopped_for_us=6_000)


def test_a_blackout_is_added_up_of_what_each_host_measured():
    saw = DestinationSaw(loaded_at_us=T0_US + 5_900, resumed_at_us=T0_US + 9_100, round_trip_us=200)
    assert rules.measure(SAYS, saw) == rules.Blackout(9_100, 2_100, Method.PIECES)
    assert rules.measure(SAYS, saw).duration_ms == 9


@pytest.mark.parametrize("shift_us", [0, 3_600_000_000, -3_600_000_000, 40_000])
def test_a_clock_that_is_wrong_changes_nothing(shift_us):
    saw = DestinationSaw(T0_US + 5_900 + shift_us, T0_US + 9_100 + shift_us, 200)
    assert rules.measure(SAYS, saw).duration_us == 9_100
    assert rules.clock_skew_us(SAYS, saw) == shift_us


@given(
    before_us=st.integers(200_000, 10_000_000),
    way_us=st.integers(0, 100_000),
    back_us=st.integers(0, 100_000),
    late_us=st.integers(0, 2_000),
    after_us=st.integers(0, 10_000_000),
    shift_us=st.integers(-(10**12), 10**12),
)
def test_the_true_blackout_is_never_further_off_than_the_error_that_is_given(
    before_us, way_us, back_us, late_us, after_us, shift_us
):
    loaded_us = T0_US + before_us
    saw = DestinationSaw(
        loaded_us + shift_us, loaded_us + after_us + shift_us, round_trip_us=way_us + back_us
    )
    measured = rules.measure(SourceSays(T0_US, before_us + way_us + late_us), saw)
    true_us = before_us + after_us
    assert measured.method is Method.PIECES
    assert abs(measured.duration_us - true_us) <= measured.error_us + 1


def test_a_shim_that_missed_its_vm_s_completion_leaves_only_the_two_clocks():
    saw = DestinationSaw(loaded_at_us=0, resumed_at_us=T0_US + 50_000)
    assert rules.measure(SAYS, saw) == rules.Blackout(50_000, None, Method.CLOCKS)
    early = DestinationSaw(loaded_at_us=0, resumed_at_us=T0_US - 1)
    assert rules.measure(SAYS, early) == rules.Blackout(0, None, Method.CLOCKS)
    assert rules.clock_skew_us(SAYS, saw) is None


def test_what_nobody_saw_is_not_known():
    nothing = SourceSays(0, 0)
    assert rules.measure(SAYS, DestinationSaw(5, 0)) == rules.Blackout(0, None, Method.UNKNOWN)
    assert rules.measure(nothing, DestinationSaw(0, 9)) == rules.Blackout(0, None, Method.UNKNOWN)
    assert rules.measure(nothing, DestinationSaw(4_000, 9_000)) == rules.Blackout(5_000, None, Method.UNKNOWN)
    assert rules.clock_skew_us(nothing, DestinationSaw(4, 9)) is None


def test_a_clock_that_was_set_back_in_the_middle_does_not_make_a_negative_piece():
    saw = DestinationSaw(loaded_at_us=T0_US + 9_000, resumed_at_us=T0_US + 8_000)
    assert rules.measure(SAYS, saw) == rules.Blackout(8_000, None, Method.CLOCKS)


def test_clocks_that_differ_are_a_sentence_for_the_report():
    assert rules.skew_warning(None) == ""
    assert rules.skew_warning(1_000_000) == ""
    assert (
        rules.skew_warning(-1_500_000)
        == "the destination's clock is 1.5 s behind the source's: set both by NTP"
    )
    assert rules.skew_warning(2_000_000).startswith("the destination's clock is 2.0 s ahead of the source's")


def test_the_blackout_is_split_into_pieces_none_of_which_crosses_the_clocks():
    source = SourceStamps(stopped_us=1_000, continued_us=2_500, memory_sent_us=6_500, completed_us=7_000)
    destination = DestinationStamps(completed_us=900, starting_us=4_900, resumed_us=5_150)
    assert dataclasses.astuple(rules.split(source, destination)) == (1.5, 4.0, 0.5, 4.0, 0.25, 1_000, 5_150)
    assert dataclasses.astuple(rules.split(source)) == (1.5, 4.0, 0.5, None, None, 1_000, None)
    assert dataclasses.astuple(rules.split(destination=destination)) == (
        *(None, None, None, 4.0, 0.25),
        *(None, 5_150),
    )


def test_memory_and_device_state_that_cannot_be_told_apart_are_one_piece():
    pieces = rules.split(SourceStamps(stopped_us=1_000, continued_us=2_000, completed_us=7_000))
    assert (pieces.last_pass_ms, pieces.device_state_ms) == (5.0, None)
