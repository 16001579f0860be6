"""The legality table is the contract's, cell by cell; moves lead where the contract says and nowhere else."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import AlreadyThere, IllegalMove, Rejected
from sandshift.session import states_page
from sandshift.session.states import (
    BEFORE_COMPLETION,
    LEGALITY,
    MOVES,
    Action,
    Call,
    Column,
    Event,
    Outcome,
    Side,
    Standing,
    State,
    advance,
    check,
    check_session_id,
    column,
)

CONTRACT = """
| state | PrepareAndExport | Import | Task.Create (annotated) | PrepareSandbox | CreateDuplicateSocket | Transfer | Finalize SRC RESUME, DST STOP | Finalize SRC STOP | Finalize DST RESUME | Cancel | Cleanup | Notifications |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| Idle | + | + | FP | FP | FP | FP | FP | FP | FP | FP | = | FP |
| SourceExported | = same blob, same options; else FP | FP | FP | FP | + | + waits | + | FP | - | + | FP | + |
| DestinationImported | FP | = same id and config; else FP | + | + | FP | FP | + | - | FP | + | FP | + |
| DestinationPrepared | FP | FP | FP | = | + | + waits | + | - | FP | + | FP | + |
| SocketWaiting | FP | FP | FP | FP | + | + joins | + | FP | FP | + | FP | + |
| SocketReady | FP | FP | FP | FP | AE | + | + | FP | FP | + | FP | + |
| Transferring | FP | FP | FP | FP | AE | + joins | + | FP | FP | + | FP | + |
| TransferCompleted | FP | FP | FP | FP | AE | = | + by right to run | + by right to run | + by right to run | + | FP | + |
| Cancelling | FP | FP | FP | FP | FP | FP | + joins, then | FP | FP | + joins | FP | + |
| Cancelled | FP | FP | FP | FP | FP | FP | + by right to run | + by right to run | + by right to run | = | + | + |
| Failed | FP | FP | FP | FP | FP | FP | + by right to run | + by right to run | + by right to run | = | + | + |
| Finalized | FP | FP | FP | FP | FP | FP | = same action, else FP | same | same | FP | + | + |
"""
"""Contract, section 3, word for word."""

SESSION = "s-1"
PAGE = Path(__file__).parents[2] / "docs/reference/migration-states.md"


def _contract_cells() -> dict[tuple[str, str], str]:
    heads, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in CONTRACT.strip().splitlines()
    ]
    said = {(row[0], head): cell for row in rows for head, cell in zip(heads[1:], row[1:], strict=True)}
    return {key: "= same action, else FP" if cell == "same" else cell for key, cell in said.items()}


def _standings() -> list[Standing]:
    """Every state with the sides that can be in it and, in Finalized, both actions."""
    only = {
        State.SOURCE_EXPORTED: [Side.SOURCE],
        State.DESTINATION_IMPORTED: [Side.DESTINATION],
        State.DESTINATION_PREPARED: [Side.DESTINATION],
        State.IDLE: [None],
    }
    return [
        Standing(state, "" if state is State.IDLE else SESSION, side, action)
        for state in State
        for side in only.get(state, list(Side))
        for action in (list(Action) if state is State.FINALIZED else [None])
    ]


STANDINGS = _standings()


def test_the_table_is_the_contracts_cell_by_cell() -> None:
    ours = {
        (state.value, head.value): outcome.value
        for state, row in LEGALITY.items()
        for head, outcome in row.items()
    }
    assert ours == _contract_cells()
    assert len(ours) == 12 * 12


@pytest.mark.parametrize(
    "standing", STANDINGS, ids=lambda s: f"{s.state.value}-{s.side and s.side.word}-{s.action}"
)
@pytest.mark.parametrize("call", Call)
def test_check_does_what_the_table_says(standing: Standing, call: Call) -> None:
    said = LEGALITY[standing.state][column(call, standing.side)]
    session_id = None if call is Call.CREATE_TASK else SESSION
    if said is Outcome.SAME_ACTION:
        said = Outcome.NO_EFFECT if call.action is standing.action else Outcome.ILLEGAL
    if said is Outcome.EXISTS:
        with pytest.raises(
            AlreadyThere, match=f"session 's-1' is {standing.state.value}: it already has its socket"
        ):
            check(call, standing, session_id)
    elif said.refuses:
        with pytest.raises(IllegalMove) as refused:
            check(call, standing, session_id)
        assert call.value in refused.value.message
        expected = "no active session" if standing.state is State.IDLE else standing.state.value
        assert expected in refused.value.message
    else:
        assert check(call, standing, session_id) is said


@pytest.mark.parametrize("standing", [s for s in STANDINGS if s.state is not State.IDLE])
@pytest.mark.parametrize("call", [call for call in Call if call is not Call.CREATE_TASK])
def test_another_sessions_id_is_rejected_and_both_are_named(standing: Standing, call: Call) -> None:
    with pytest.raises(Rejected) as rejected:
        check(call, standing, "s-2")
    assert "'s-2'" in rejected.value.message
    assert "'s-1'" in rejected.value.message


@pytest.mark.parametrize("call", [call for call in Call if call is not Call.CREATE_TASK])
def test_an_empty_session_id_is_rejected_in_every_state(call: Call) -> None:
    for standing in STANDINGS:
        with pytest.raises(Rejected, match="session_id has 0 bytes; it must have 1 to 256"):
            check(call, standing, "")


@pytest.mark.parametrize("bad", ["a\nb", "a\x00", "\u202e", "x" * 257, "ü" * 129, "\ud800", "a\u2028b"])
def test_session_ids_are_printable_and_at_most_256_bytes(bad: str) -> None:
    with pytest.raises(Rejected, match="session_id"):
        check_session_id(bad)


@pytest.mark.parametrize("good", ["a", "x" * 256, "ü" * 128, "with space/and:anything", "漢字"])
def test_any_printable_text_is_a_session_id(good: str) -> None:
    check_session_id(good)


def test_a_refusal_names_session_state_call_and_what_the_state_takes() -> None:
    with pytest.raises(IllegalMove) as refused:
        check(Call.CLEANUP, Standing(State.TRANSFERRING, SESSION, Side.SOURCE), SESSION)
    assert refused.value.message == (
        "session 's-1' is Transferring, which does not take Cleanup; it takes TransferSandbox, "
        "FinalizeSandbox(RESUME), Cancel, Notifications"
    )


def test_the_other_action_is_refused_once_finalized_and_the_first_is_named() -> None:
    with pytest.raises(
        IllegalMove, match=r"is Finalized with STOP, which does not take FinalizeSandbox\(RESUME\)"
    ):
        check(Call.RESUME, Standing(State.FINALIZED, SESSION, Side.SOURCE, Action.STOP), SESSION)


class TestTheLastEndedSession:
    def ended(self, action: Action, *, cancelled: bool = False) -> Standing:
        return Standing(State.IDLE, SESSION, Side.SOURCE, action, cancelled)

    def test_may_be_finalized_again_with_the_same_action(self) -> None:
        assert check(Call.STOP, self.ended(Action.STOP), SESSION) is Outcome.NO_EFFECT

    def test_is_not_finalized_with_the_other_action(self) -> None:
        with pytest.raises(IllegalMove, match=r"no active session.*'s-1' has ended with STOP"):
            check(Call.RESUME, self.ended(Action.STOP), SESSION)

    def test_may_be_cleaned_again(self) -> None:
        assert check(Call.CLEANUP, self.ended(Action.STOP), SESSION) is Outcome.NO_EFFECT

    def test_may_be_cancelled_again_if_it_was(self) -> None:
        assert check(Call.CANCEL, self.ended(Action.RESUME, cancelled=True), SESSION) is Outcome.NO_EFFECT
        with pytest.raises(IllegalMove, match="no active session"):
            check(Call.CANCEL, self.ended(Action.RESUME), SESSION)

    def test_is_remembered_for_its_own_id_only(self) -> None:
        with pytest.raises(IllegalMove, match="no active session"):
            check(Call.STOP, self.ended(Action.STOP), "s-2")

    def test_does_not_stand_in_the_way_of_the_next(self) -> None:
        for call in (Call.PREPARE_AND_EXPORT, Call.IMPORT):
            assert check(call, self.ended(Action.STOP), "s-2") is Outcome.PROCEED


def test_every_state_can_be_reached_from_idle() -> None:
    reached, edge = {State.IDLE}, [State.IDLE]
    while edge:
        here = edge.pop()
        for (state, _), after in MOVES.items():
            if state is here and after not in reached:
                reached.add(after)
                edge.append(after)
    assert reached == set(State)


def test_every_state_leads_back_to_idle() -> None:
    back, grown = {State.IDLE}, True
    while grown:
        grown = False
        for (state, _), after in MOVES.items():
            if after in back and state not in back:
                back.add(state)
                grown = True
    assert back == set(State)


def test_a_move_that_is_not_in_the_table_is_illegal() -> None:
    for state, event in itertools.product(State, Event):
        if (state, event) not in MOVES:
            with pytest.raises(IllegalMove, match=f"a session that is {state.value} cannot become"):
                advance(state, event)


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_events_in_any_order_never_lead_from_finalized_anywhere_but_idle(events: list[Event]) -> None:
    state = State.FINALIZED
    for event in events:
        try:
            state = advance(state, event)
        except IllegalMove:
            continue
        assert state is State.IDLE
        return


def test_before_completion_are_the_states_in_which_a_finalize_to_go_back_cancels_first() -> None:
    for state in State:
        proceeds = LEGALITY[state][Column.FINALIZE_BACK] is Outcome.PROCEED
        assert proceeds is (state in BEFORE_COMPLETION)


def test_the_page_in_docs_is_printed_from_the_tables() -> None:
    assert PAGE.read_text() == states_page.page()


def test_the_pages_table_is_the_contracts() -> None:
    lines = [
        line
        for line in states_page.legality_table().splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    said = {(row[0], head): cell for row in rows[1:] for head, cell in zip(rows[0][1:], row[1:], strict=True)}
    assert said == _contract_cells()


def test_the_diagram_has_every_move_once() -> None:
    diagram = states_page.diagram()
    for (state, event), after in MOVES.items():
        assert any(
            line.strip().startswith(f"{state.value} --> {after.value}:") and event.value in line
            for line in diagram.splitlines()
        ), (state, event)
