import pytest

from sandshift.errors import Aborted, Cancelled, Damaged, Defect, TimedOut, Unavailable
from sandshift.session import phases
from sandshift.session.phases import Outcome, Phase, PhaseState, Told
from sandshift.session.states import Side
from sandshift.wire.migration import options_pb2

# Contract 4.9, word for word: outcome, source before the blackout, source after, destination.
CONTRACT = {
    "success": ("DONE/SUCCESS", "DONE/SUCCESS", "DONE/SUCCESS"),
    "cancelled": ("FAILED/CANCELLED", "FAILED/CANCELLED", "DONE/CANCELLED"),
    "guest": (
        "FAILED/GUEST_INITIATED_CANCELLATION",
        "FAILED/GUEST_INITIATED_CANCELLATION",
        "DONE/SOURCE_FAILED",
    ),
    "source": ("FAILED/SOURCE_FAILED", "DONE/SOURCE_FAILED", "DONE/SOURCE_FAILED"),
    "destination": ("FAILED/DESTINATION_FAILED", "DONE/DESTINATION_FAILED", "FAILED/DESTINATION_FAILED"),
}
ROWS = {
    Outcome.SUCCESS: ("success", "success", 0),
    Outcome.CANCELLED: ("cancelled", "cancelled", 1),
    Outcome.GUEST_RESET: ("guest", "guest", 10),
    Outcome.BLACKOUT_THRESHOLD: ("cancelled", "cancelled", 10),
    Outcome.DEADLINE: ("cancelled", "cancelled", 4),
    Outcome.STALL: ("cancelled", "cancelled", 4),
    Outcome.SOCKET_WAIT: ("source", "destination", 4),
    Outcome.PEER_LOST: ("destination", "source", 14),
    Outcome.OWN_VM_FAILED: ("source", "destination", 14),
    Outcome.CHECKSUM: ("destination", "destination", 15),
    Outcome.DEFECT: ("source", "destination", 13),
}


def said(told):
    return f"{told.phase.name}/{told.state.name}"


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_is_told_as_the_contract_says_on_both_sides(outcome):
    by_source, by_destination, code = ROWS[outcome]
    assert said(phases.ending(outcome, Side.SOURCE, in_blackout=False)) == CONTRACT[by_source][0]
    assert said(phases.ending(outcome, Side.SOURCE, in_blackout=True)) == CONTRACT[by_source][1]
    for in_blackout in (False, True):
        told = phases.ending(outcome, Side.DESTINATION, in_blackout=in_blackout)
        assert said(told) == CONTRACT[by_destination][2]
    assert {phases.code(outcome, side) for side in Side} == {code}


def test_what_the_caller_asked_for_is_never_told_as_a_failure_of_the_source():
    for in_blackout in (False, True):
        for side in Side:
            assert (
                phases.ending(Outcome.CANCELLED, side, in_blackout=in_blackout).state is PhaseState.CANCELLED
            )


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome.CANCELLED, Cancelled),
        (Outcome.GUEST_RESET, Aborted),
        (Outcome.BLACKOUT_THRESHOLD, Aborted),
        (Outcome.SOCKET_WAIT, TimedOut),
        (Outcome.DEADLINE, TimedOut),
        (Outcome.STALL, TimedOut),
        (Outcome.PEER_LOST, Unavailable),
        (Outcome.OWN_VM_FAILED, Unavailable),
        (Outcome.CHECKSUM, Damaged),
        (Outcome.DEFECT, Defect),
    ],
)
def test_a_waiting_transfer_ends_with_the_error_for_its_caller(outcome, kind):
    raised = phases.error(outcome, Side.SOURCE, "why")
    assert type(raised) is kind
    assert raised.message == "why"


def test_a_transfer_that_succeeded_ends_without_an_error():
    assert phases.error(Outcome.SUCCESS, Side.DESTINATION, "") is None


def test_numbers_are_those_of_the_wire():
    for phase in Phase:
        assert phase.proto == phase.value
        assert options_pb2.Phase.Name(phase.proto) == f"PHASE_{phase.name}"
    for state in PhaseState:
        assert state.proto == state.value
    assert len(Phase) + 1 == len(options_pb2.Phase.keys())
    assert len(PhaseState) + 1 == len(options_pb2.PhaseState.keys())


def test_every_ending_is_terminal():
    for row in phases.ENDINGS.values():
        assert {row.source_before.phase, row.source_after.phase, row.destination.phase} <= phases.TERMINAL


def test_a_recovery_succeeds_or_fails():
    assert phases.recovery(succeeded=True) == Told(Phase.RECOVERY_DONE, PhaseState.SUCCESS)
    assert phases.recovery(succeeded=False) == Told(Phase.RECOVERY_DONE, PhaseState.RECOVERY_FAILED)
