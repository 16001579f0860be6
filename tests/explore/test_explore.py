"""A small run of the search in the fast tests; `./run explore` does the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandshift.session import right
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Side, State
from tests.explore.__main__ import ALL, FIRST, GUARD_PATIENCE_STATES
from tests.explore.facts import Bounds, Violation, pack, unpack
from tests.explore.guards import GUARDS, Guard
from tests.explore.search import Found, search
from tests.explore.side import CURRENT, STALE, Faults, Flow, Local, Shim, Vm, canonical_frame, first_local
from tests.explore.walk import replay, walk_for
from tests.explore.world import Rules, World

ROOT = Path(__file__).parents[2]
STATES_MAX = 15_000
FAST_GUARD_STATES_MAX = 12_000
"""Guards that are found later than this are left to `./run explore`."""


def world(bounds: Bounds) -> World:
    return World(bounds, Rules(Faults(bounds.cost)))


@pytest.mark.parametrize("bounds", [Bounds(0, 0, 0), Bounds(1, 1, 1)], ids=str)
def test_the_nearest_states_hold(bounds: Bounds) -> None:
    found = search(world(bounds), states_max=STATES_MAX)
    assert found.violations == []
    assert found.states > STATES_MAX
    assert found.recoveries == 2 * STATES_MAX
    assert found.calls_max <= 7


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_first_sets_hold_whole() -> None:
    for one in FIRST:
        found = search(one.world(), destination_refuses=one.going_back)
        assert found.violations == [], one.name


def test_the_sets_of_section_11_are_among_all() -> None:
    bounds = {(one.bounds.crashes, one.bounds.deaths, one.bounds.refusals, one.going_back) for one in ALL}
    assert {(0, 0, 0, False), (1, 0, 1, False), (1, 1, 1, False), (1, 1, 0, True), (2, 0, 1, False)} <= bounds


QUICK = [
    "HELD sent before its fsync",
    "RELEASED sent before its fsync",
    "the destination starts on a time-out",
    "the source resumes on a time-out",
    "the source takes the end of the channel for an abort after RELEASED",
    "the source destroys without the destination's HELD",
    "STOP in HELD destroys without RETURNING",
    "STARTING written after the start",
    "receipts not bound to their session",
    "RELEASED before the own VM has completed",
    "READY taken for a refusal in RELEASED",
    "Cancel in RELEASED writes KEPT",
    "LOST is told as REFUSED",
]
"""Found within the first few thousand states."""


@pytest.mark.parametrize("guard", [g for g in GUARDS if g.name in QUICK], ids=lambda g: g.name)
def test_a_dropped_guard_is_found(guard: Guard) -> None:
    found = search(World(guard.bounds, guard.rules()), states_max=FAST_GUARD_STATES_MAX)
    assert found.violations, guard.name
    assert found.violations[0].events


def test_every_quick_guard_is_one() -> None:
    assert set(QUICK) <= {guard.name for guard in GUARDS}


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.name)
def test_every_dropped_guard_is_found(guard: Guard) -> None:
    found = search(World(guard.bounds, guard.rules()), patience_states=GUARD_PATIENCE_STATES)
    assert bool(found.violations) is guard.can_be_found


def test_all_seventeen_guards_of_section_11_are_there_and_more() -> None:
    assert sum(guard.can_be_found for guard in GUARDS) >= 17
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)


def test_the_page_in_docs_names_every_guard_and_every_set() -> None:
    page = (ROOT / "docs/explanation/right-to-run.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {guard.name for guard in GUARDS if guard.can_be_found} <= rows
    for one in ALL:
        bounds = f"{one.bounds.crashes}, {one.bounds.deaths}, {one.bounds.refusals}"
        assert any(row.startswith(bounds) for row in rows), one.name


def test_a_counterexample_is_the_shortest_and_reads_as_a_story() -> None:
    guard = next(guard for guard in GUARDS if guard.name == "the destination starts on a time-out")
    told = str(_found(guard).violations[0]).splitlines()
    assert told == [
        "  1. all memory is at the destination, the source's VM has stopped the guest",
        (
            "  2. FinalizeSandbox(RESUME) on the source; it writes KEPT; it sends KEPT; THE GUEST STARTS; OK; "
            "too late: its VM had handed everything over"
        ),
        "  3. the destination notices that the memory is complete; it writes READY",
        "  4. FinalizeSandbox(RESUME) on the destination",
        "  5. the destination waits no longer; it writes STARTING, RUNNING; it sends RUNNING; THE GUEST STARTS; OK",
        "   => two runners",
    ]


def _found(guard: Guard) -> Found:
    return search(World(guard.bounds, guard.rules()), patience_states=GUARD_PATIENCE_STATES)


def test_random_walks_hold_and_repeat_by_their_seed() -> None:
    walked = walk_for(2.0, first_seed=1)
    assert walked.violations == []
    assert walked.steps > 1000
    assert replay(7).steps == replay(7).steps > 0


class TestTheSearchSees:
    """What it is built on: that it does notice, and that what it merges is the same."""

    def test_two_runners(self) -> None:
        here = world(Bounds(0, 0, 0))
        facts = unpack(here.first())
        local = here.local_id(1, _held())
        with pytest.raises(Violation, match="two runners"):
            list(here.successors(pack(facts._replace(destination=local, destination_fresh=1))))

    def test_a_start_without_the_right_on_disk(self) -> None:
        shim = Shim(Side.DESTINATION, Faults(Bounds(0, 0, 0).cost, _starts_first))
        outcomes = shim.outcomes(_held(), right.CallMade(Call.RESUME), Flow.DONE)
        assert ("violation", "the destination starts the guest in HELD") in outcomes[0].ops

    def test_an_answer_to_an_earlier_question_is_not_the_current_one(self) -> None:
        frame = Statement(Cell.RELEASED, Ask.TELL, 4)
        assert canonical_frame(frame, Side.SOURCE, asked_now=4).ask_number == CURRENT
        assert canonical_frame(frame, Side.SOURCE, asked_now=5).ask_number == STALE

    def test_every_fault_of_a_start(self) -> None:
        shim = Shim(Side.DESTINATION, Faults(Bounds(1, 1, 1).cost))
        outcomes = shim.outcomes(_held(), right.CallMade(Call.RESUME), Flow.DONE)
        cells = {(outcome.local.disk.cell, outcome.local.vm) for outcome in outcomes}
        assert {
            (Cell.RUNNING, Vm.RUNNING),
            (Cell.HELD, Vm.STOPPED),
            (Cell.LOST, Vm.GONE),
            (Cell.STARTING, Vm.STOPPED),
            (Cell.STARTING, Vm.PAUSED),
        } <= cells

    def test_states_survive_packing(self) -> None:
        here = world(Bounds(1, 1, 1))
        for _, state in here.successors(here.first()):
            assert pack(unpack(state)) == state

    def test_the_first_local_is_the_middle_of_the_transfer(self) -> None:
        assert first_local(Side.SOURCE).vm == Vm.RUNNING
        assert first_local(Side.DESTINATION).disk.cell is Cell.NONE


def _held() -> Local:
    record = right.Record(Side.DESTINATION, "s", Cell.HELD, State.TRANSFER_COMPLETED, complete=True)
    return Local(right.restored_party(record), record, Vm.STOPPED, kept=False)


def _starts_first(party: right.Party, event: right.RightEvent) -> tuple[right.Party, tuple[right.Step, ...]]:
    after, steps = right.handle(party, event)
    return after, steps[::-1]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_command_prints_figures_that_a_machine_can_read() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.explore", "--json", "--guards-only", "--walks", "1"],
        cwd=ROOT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures = json.loads(done.stdout)
    assert {"states", "bounds", "violations", "guards", "guards_found"} <= figures.keys()
    assert figures["guards"] == figures["guards_found"] >= 17
