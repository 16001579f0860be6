"""The saga: what is called when, and what never is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import (
    Aborted,
    AlreadyThere,
    Blocked,
    Cancelled,
    IllegalMove,
    Rejected,
    SandshiftError,
    Unavailable,
)
from sandshift.fleet import saga as s
from sandshift.fleet.saga import FORWARD, TRANSFERS, UNWIND, Call, Mode, Outcome, Saga, Step
from sandshift.session.states import Side


def run(
    failures: Mapping[Step, SandshiftError], *, saga: Saga | None = None, last_first: bool = False
) -> tuple[Saga, list[Step]]:
    """Play a migration: every call succeeds at once, save `failures`. Transfers that nobody ends are cut by CANCEL."""
    saga = saga or Saga()
    called: list[Step] = []
    waiting: list[Step] = []
    while True:
        waiting.extend(saga.take_due())
        called.extend(step for step in waiting if step not in called)
        ready = [step for step in waiting if not _held(step, waiting, failures, saga)]
        if not ready:
            return saga, called
        step = ready[-1 if last_first else 0]
        waiting.remove(step)
        if step in failures:
            saga.failed(step, failures[step])
        else:
            saga.answered(step)


def _held(step: Step, waiting: list[Step], failures: Mapping[Step, SandshiftError], saga: Saga) -> bool:
    """A transfer whose peer failed hangs until somebody cancels it."""
    peer = Step(step.side.peer, step.call)
    return step in TRANSFERS and peer in failures and step not in failures and saga.mode is Mode.FORWARD


def test_all_goes_well_in_the_contracts_order() -> None:
    saga, called = run({})
    assert saga.outcome is Outcome.MOVED
    assert [str(step) for step in called] == [
        "PrepareAndExportSandbox on the source",
        "OpenDestination on the destination",
        "ImportSandbox on the destination",
        "PrepareSandbox on the destination",
        "Connect on the source",
        "CreateDuplicateSocket on the destination",
        "CreateDuplicateSocket on the source",
        "TransferSandbox on the destination",
        "TransferSandbox on the source",
        "FinalizeSandbox(RESUME) on the destination",
        "FinalizeSandbox(STOP) on the source",
        "Cleanup on the source",
        "Cleanup on the destination",
        "Report on the source",
        "Report on the destination",
        "CloseShim on the source",
    ]


def _at_the_transfer() -> Saga:
    saga = Saga(done=s.BEFORE_TRANSFER)
    assert set(saga.take_due()) == TRANSFERS
    return saga


def test_the_destination_resumes_as_soon_as_it_says_that_it_has_everything() -> None:
    saga = _at_the_transfer()
    saga.memory_complete()
    assert saga.take_due() == (s.DESTINATION_RESUME,)


def test_a_destination_that_answered_before_the_source_is_asked_again_before_it_resumes() -> None:
    saga = _at_the_transfer()
    saga.answered(s.DESTINATION_TRANSFER)  # as after 2 s in which nothing arrived
    assert saga.take_due() == ()
    saga.answered(s.SOURCE_TRANSFER)
    assert saga.take_due() == (s.DESTINATION_TRANSFER,)
    saga.answered(s.DESTINATION_TRANSFER)
    assert saga.take_due() == (s.DESTINATION_RESUME,)


def test_a_destination_that_says_that_it_has_everything_is_not_asked_again() -> None:
    saga = _at_the_transfer()
    saga.answered(s.DESTINATION_TRANSFER)
    saga.memory_complete()
    assert saga.take_due() == (s.DESTINATION_RESUME,)
    saga.answered(s.SOURCE_TRANSFER)
    saga.answered(s.DESTINATION_RESUME)
    assert saga.take_due() == (s.SOURCE_STOP,)


def test_a_source_that_fails_while_the_destination_resumes_changes_nothing_if_that_succeeds() -> None:
    saga = _at_the_transfer()
    saga.memory_complete()
    assert saga.take_due() == (s.DESTINATION_RESUME,)
    saga.failed(s.SOURCE_TRANSFER, Unavailable("the source's shim is gone"))
    assert saga.take_due() == ()
    saga.answered(s.DESTINATION_RESUME)
    assert saga.take_due() == (s.SOURCE_STOP,)
    assert saga.mode is Mode.FORWARD


def test_a_failed_transfer_is_cancelled_on_both_sides_and_wound_back() -> None:
    saga, called = run({s.DESTINATION_TRANSFER: Unavailable("QEMU died")})
    assert saga.outcome is Outcome.UNDONE
    assert called[called.index(s.SOURCE_TRANSFER) + 1 :] == [
        s.SOURCE_CANCEL,
        s.SOURCE_RESUME,
        s.DESTINATION_CANCEL,
        s.DESTINATION_STOP,
        s.SOURCE_CLEANUP,
        s.DESTINATION_CLEANUP,
        s.SOURCE_REPORT,
        s.DESTINATION_REPORT,
        s.DESTINATION_CLOSE,
    ]
    assert saga.failed_step == s.DESTINATION_TRANSFER
    assert saga.reason is not None
    assert saga.reason.message == "QEMU died"


def test_what_is_on_the_destination_is_not_discarded_before_the_source_is_known_to_run() -> None:
    saga, called = run(
        {s.SOURCE_TRANSFER: Unavailable("its VM died"), s.SOURCE_RESUME: IllegalMove("its VM is dead")}
    )
    assert saga.mode is Mode.RECOVER
    assert s.SOURCE_RESUME in called
    assert s.DESTINATION_CANCEL not in called


def test_a_source_that_refuses_the_export_is_left_alone() -> None:
    saga, called = run({s.EXPORT: Blocked("sandbox s-1 cannot move", [])})
    assert saga.outcome is Outcome.REFUSED
    assert called == [s.EXPORT]


def test_an_export_whose_answer_is_lost_is_wound_back_as_if_it_had_happened() -> None:
    _saga, called = run({s.EXPORT: Unavailable("the connection broke")})
    assert called == [s.EXPORT, s.SOURCE_CANCEL, s.SOURCE_RESUME, s.SOURCE_CLEANUP, s.SOURCE_REPORT]


def test_a_destination_that_cannot_be_started_leaves_the_source_as_it_was() -> None:
    saga, called = run({s.OPEN: Rejected("no such host")})
    assert saga.outcome is Outcome.UNDONE
    assert called == [s.EXPORT, s.OPEN, s.SOURCE_CANCEL, s.SOURCE_RESUME, s.SOURCE_CLEANUP, s.SOURCE_REPORT]


def test_a_resume_that_fails_is_never_answered_by_guessing() -> None:
    saga, called = run({s.DESTINATION_RESUME: Unavailable("no answer")})
    assert saga.mode is Mode.RECOVER
    assert called[-1] == s.DESTINATION_RESUME


def test_a_stop_that_fails_is_recovered_and_not_undone() -> None:
    saga, called = run({s.SOURCE_STOP: Unavailable("no answer")})
    assert saga.mode is Mode.RECOVER
    assert s.SOURCE_RESUME not in called


def test_a_cleanup_that_fails_is_a_warning_and_the_sandbox_has_moved() -> None:
    saga, _called = run({s.SOURCE_CLEANUP: Unavailable("gone")})
    assert saga.outcome is Outcome.MOVED
    assert saga.warnings == ["Cleanup on the source: gone"]
    assert saga.reason is None


def test_a_source_that_could_not_be_cleaned_up_is_not_closed() -> None:
    _saga, called = run({s.SOURCE_CLEANUP: Unavailable("gone")})
    assert s.SOURCE_CLOSE not in called


def test_a_shim_that_somebody_else_owns_is_not_closed() -> None:
    saga, called = run({}, saga=Saga(done=[s.SOURCE_CLOSE]))
    assert saga.outcome is Outcome.MOVED
    assert s.SOURCE_CLOSE not in called


def test_who_finds_that_another_coordinator_handed_the_socket_over_joins_the_transfer() -> None:
    saga, called = run({s.DESTINATION_SOCKET: AlreadyThere("the channel is there already")})
    assert saga.outcome is Outcome.MOVED
    assert s.SOURCE_SOCKET not in called


def test_a_person_can_turn_back_until_the_resume_is_asked_for() -> None:
    saga = _at_the_transfer()
    assert saga.cancel("interrupted")
    assert saga.take_due() == (s.SOURCE_CANCEL,)
    assert isinstance(saga.reason, Cancelled)


def test_nobody_can_turn_back_after_the_resume_was_asked_for() -> None:
    saga = _at_the_transfer()
    saga.memory_complete()
    saga.take_due()
    assert not saga.cancel("interrupted")
    assert saga.mode is Mode.FORWARD


def test_turning_back_waits_for_the_answer_of_a_call_that_is_under_way() -> None:
    saga = Saga(done=[s.OPEN])
    assert saga.take_due() == (s.EXPORT,)
    saga.cancel("interrupted")
    assert saga.take_due() == ()
    saga.answered(s.EXPORT)
    assert saga.take_due() == (s.SOURCE_CANCEL,)


def test_turning_back_from_an_export_that_is_then_refused_leaves_the_source_alone() -> None:
    saga = Saga(done=[s.OPEN])
    saga.take_due()
    saga.cancel("interrupted")
    saga.failed(s.EXPORT, IllegalMove("another session is active"))
    assert saga.take_due() == (s.DESTINATION_CLOSE,)


def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(IllegalMove, match=r"Cleanup on the source was answered, but nobody asked for it"):
        Saga().answered(s.SOURCE_CLEANUP)


STEPS = sorted(set(FORWARD) | set(UNWIND), key=str)
ERRORS = st.sampled_from([Unavailable("lost"), IllegalMove("not now"), Aborted("the guest was reset")])


@given(st.dictionaries(st.sampled_from(STEPS), ERRORS, max_size=6), st.booleans())
def test_whatever_fails_the_rules_hold(failures: dict[Step, SandshiftError], last_first: bool) -> None:
    saga, called = run(failures, last_first=last_first)
    resumed = s.DESTINATION_RESUME in called and s.DESTINATION_RESUME not in failures
    assert s.SOURCE_STOP not in called or resumed
    assert not (s.SOURCE_RESUME in called and s.DESTINATION_RESUME in called)
    assert not (s.DESTINATION_STOP in called and s.DESTINATION_RESUME in called)
    assert saga.mode in (Mode.RECOVER, Mode.ENDED)
    assert (saga.outcome is None) == (saga.mode is Mode.RECOVER)
    assert saga.pending <= TRANSFERS
    if saga.outcome in (Outcome.MOVED, Outcome.UNDONE):
        began = {Side.SOURCE: s.EXPORT, Side.DESTINATION: s.IMPORT}
        for side, first in began.items():
            if first in called and not isinstance(failures.get(first), IllegalMove | Aborted):
                assert Step(side, Call.CLEANUP) in called


@given(st.sampled_from(STEPS), st.booleans())
def test_a_person_who_turns_back_after_any_answer_ends_with_the_guest_on_the_source_or_moved(
    after: Step, last_first: bool
) -> None:
    saga = Saga()
    waiting: list[Step] = []
    called: list[Step] = []
    while True:
        due = saga.take_due()
        waiting.extend(due)
        called.extend(due)
        if not waiting:
            break
        step = waiting.pop(-1 if last_first else 0)
        saga.answered(step)
        if step == after:
            saga.cancel("interrupted")
    assert saga.outcome in Outcome
    assert (s.DESTINATION_RESUME in called) == (saga.outcome is Outcome.MOVED)
