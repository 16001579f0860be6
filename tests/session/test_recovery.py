"""The good orchestrator: what it calls, in which order, and when it leaves the decision to a human."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sandshift.session import right
from sandshift.session.recovery import (
    Answer,
    Ending,
    Invoke,
    Look,
    Order,
    Pause,
    Result,
    Verdict,
    View,
    diagnose,
    goes_forward,
    recover,
)
from sandshift.session.statement import Cell
from sandshift.session.states import Action, Call, Side, State
from tests.session.example_shell import Shim, cut, pair, settle


def view(cell: Cell, state: State = State.TRANSFER_COMPLETED, **more: object) -> View:
    return View(cell, state, f"receipt of {cell.name}".encode(), **more)  # type: ignore[arg-type]


def drive(answer: Callable[[Order], Answer]) -> tuple[Verdict, list[str]]:
    """Run the procedure; `answer` stands for both hosts. Also returns the calls, "D.RESUME(receipt of ...)"."""
    procedure, calls, given = recover(), [], None
    while True:
        try:
            order = procedure.send(given)
        except StopIteration as done:
            return done.value, calls
        if isinstance(order, Invoke):
            carried = order.receipt.decode(errors="replace") if isinstance(order.receipt, bytes) else "-"
            calls.append(f"{order.side.name[0]}.{order.call.name}({carried})")
        given = answer(order)


def over(source: Shim, destination: Shim) -> Callable[[Order], Answer]:
    """Both example shims as the hosts that the orchestrator talks to."""

    def answer(order: Order) -> Answer:
        if isinstance(order, Pause):
            settle(source)
            return None
        shim = source if order.side is Side.SOURCE else destination
        if isinstance(order, Look):
            if shim.vm == "dead" and shim.party.vm_alive:
                shim.feed(right.VmDied())
            record = shim.party.record
            return View(record.cell, record.state, shim.receipt, shim.party.vm_alive, record.action)
        assert isinstance(order, Invoke)
        receipt = order.receipt
        assert receipt is None or isinstance(receipt, bytes)
        refusal = shim.call(order.call, receipt).refusal
        if refusal is None:
            return Result.OK
        return Result.UNANSWERED if refusal.kind.__name__ == "Unavailable" else Result.REFUSED

    return answer


def test_from_open_and_ready_it_goes_back_the_source_first() -> None:
    source, destination = pair()
    verdict, calls = drive(over(source, destination))
    assert verdict == Verdict(Ending.BACK)
    assert [call.partition("(")[0] for call in calls] == [
        "S.RESUME",
        "D.STOP",
        "S.CLEANUP",
        "D.CLEANUP",
    ]
    assert (source.vm, destination.vm) == ("running", "dead")


def test_from_held_it_goes_forward_the_destination_first() -> None:
    source, destination = pair()
    cut(source)
    source.call(Call.STOP, destination.receipt)
    destination.starts.append(right.StartRefused("busy"))
    destination.call(Call.RESUME, source.receipt)
    assert (source.party.cell, destination.party.cell) == (Cell.RELEASED, Cell.HELD)
    verdict, calls = drive(over(source, destination))
    assert verdict == Verdict(Ending.FORWARD)
    assert [call.partition("(")[0] for call in calls] == ["D.RESUME", "S.STOP", "S.CLEANUP", "D.CLEANUP"]
    assert (source.vm, destination.vm) == ("dead", "running")


def test_from_held_it_goes_back_if_the_destination_does_not_start() -> None:
    source, destination = pair()
    cut(source)
    source.call(Call.STOP, destination.receipt)
    destination.starts.extend([right.StartRefused("busy")] * 9)
    verdict, calls = drive(over(source, destination))
    assert verdict == Verdict(Ending.BACK)
    assert (source.vm, destination.vm) == ("running", "dead")
    assert len(calls) <= 7


def test_a_transfer_under_way_is_cancelled_the_source_first() -> None:
    source, destination = pair(complete=False)
    verdict, calls = drive(over(source, destination))
    assert verdict == Verdict(Ending.BACK)
    assert [call.partition("(")[0] for call in calls][:2] == ["S.CANCEL", "D.CANCEL"]
    assert (source.vm, destination.vm) == ("running", "dead")


def test_run_again_after_the_end_it_calls_nothing_but_says_how_it_ended() -> None:
    source, destination = pair()
    drive(over(source, destination))
    verdict, calls = drive(over(source, destination))
    assert verdict == Verdict(Ending.BACK)
    assert calls == []


def test_receipts_are_carried_and_the_second_is_read_after_the_first_call() -> None:
    said = {Side.SOURCE: view(Cell.RELEASED), Side.DESTINATION: view(Cell.READY)}

    def answer(order: Order) -> Answer:
        if isinstance(order, Look):
            return said[order.side]
        if isinstance(order, Invoke) and order.call is Call.RESUME:
            said[Side.DESTINATION] = view(Cell.RUNNING, State.FINALIZED, action=Action.RESUME)
        return Result.OK if isinstance(order, Invoke) else None

    verdict, calls = drive(answer)
    assert verdict.ending is Ending.FORWARD
    assert calls[:2] == ["D.RESUME(receipt of RELEASED)", "S.STOP(receipt of RUNNING)"]


@pytest.mark.parametrize(
    ("source", "destination", "forward"),
    [
        (Cell.OPEN, Cell.READY, False),
        (Cell.OPEN, Cell.HELD, True),
        (Cell.RELEASED, Cell.READY, True),
        (Cell.RELEASED, Cell.STARTING, True),
        (Cell.RELEASED, Cell.RUNNING, True),
        (Cell.RELEASED, Cell.RETURNING, False),
        (Cell.RELEASED, Cell.REFUSED, False),
        (Cell.KEPT, Cell.READY, False),
        (Cell.KEPT, Cell.RETURNING, False),
        (Cell.GONE, Cell.READY, True),
        (Cell.GONE, Cell.RETURNING, True),
        (Cell.GONE, Cell.REFUSED, False),
        (None, Cell.HELD, True),
        (None, Cell.READY, False),
        (Cell.OPEN, None, False),
    ],
)
def test_forward_or_back(source: Cell | None, destination: Cell | None, forward: bool) -> None:
    assert goes_forward(source and view(source), destination and view(destination)) is forward


@pytest.mark.parametrize(
    ("source", "destination", "ending", "force"),
    [
        (view(Cell.RELEASED), view(Cell.LOST, vm_alive=False), Ending.OPERATOR, Side.SOURCE),
        (view(Cell.RELEASED), None, Ending.OPERATOR, Side.SOURCE),
        (None, view(Cell.READY), Ending.OPERATOR, Side.DESTINATION),
        (None, view(Cell.RETURNING), Ending.OPERATOR, Side.DESTINATION),
        (view(Cell.KEPT, State.FAILED, vm_alive=False), view(Cell.READY), Ending.OPERATOR, Side.DESTINATION),
        (view(Cell.KEPT, vm_alive=False), view(Cell.REFUSED), Ending.CRASHED, None),
        (view(Cell.RELEASED), view(Cell.RUNNING, vm_alive=False), Ending.CRASHED, None),
        (view(Cell.RELEASED), view(Cell.HELD), Ending.UNFINISHED, None),
        (view(Cell.GONE), view(Cell.REFUSED, vm_alive=False), Ending.CRASHED, None),
        (view(Cell.GONE), view(Cell.LOST, vm_alive=False), Ending.CRASHED, None),
        (view(Cell.GONE), view(Cell.HELD), Ending.UNFINISHED, None),
        (None, None, Ending.UNFINISHED, None),
    ],
)
def test_what_needs_an_operator_is_section_9(
    source: View | None, destination: View | None, ending: Ending, force: Side | None
) -> None:
    verdict = diagnose(source, destination)
    assert (verdict.ending, verdict.force) == (ending, force)
    assert verdict.why


def test_with_the_sources_vm_dead_before_completion_a_ready_destination_is_left_alone() -> None:
    source, destination = pair(complete=False)
    destination.feed(right.MemoryComplete())
    cut(source)
    source.vm = "dead"
    verdict, calls = drive(over(source, destination))
    assert verdict.ending is Ending.OPERATOR
    assert verdict.force is Side.DESTINATION
    assert destination.party.cell is Cell.READY
    assert destination.vm == "stopped"
    assert not any(call.startswith("D.") for call in calls)


def test_a_host_that_never_answers_leaves_the_other_side_as_it_is() -> None:
    def answer(order: Order) -> Answer:
        if isinstance(order, Look):
            return view(Cell.RELEASED) if order.side is Side.SOURCE else None
        return Result.UNANSWERED if isinstance(order, Invoke) else None

    verdict, calls = drive(answer)
    assert verdict.ending is Ending.OPERATOR
    assert "prove that host off" in verdict.why
    assert {call.partition("(")[0] for call in calls} == {"S.RESUME"}
    assert len(calls) == 3
