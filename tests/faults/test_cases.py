"""The matrix as data: how much of it there is, and what it promises."""

from __future__ import annotations

import pytest

from sandshift.session.statement import Cell
from sandshift.session.states import Side
from tests.faults.cases import CASES, Case, Promise, Victim, loses_qemu, promise, sample
from tests.faults.steps import STEPS, Memory, Step, There

RUNS, OPERATOR, LOST = Promise.RUNS, Promise.OPERATOR, Promise.LOST


def test_there_are_more_than_enough_cases_and_no_two_are_the_same() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150


def test_both_shims_die_at_every_step_at_which_they_exist() -> None:
    missing = [
        (step.name, victim)
        for step in STEPS
        for victim, there in (
            (Victim.SOURCE_SHIM, There.SOURCE_SHIM),
            (Victim.DESTINATION_SHIM, There.DESTINATION_SHIM),
        )
        if there in step.there and Case(step, victim) not in CASES
    ]
    assert missing == []


def test_every_victim_dies_in_every_stage_of_a_move_in_which_it_exists() -> None:
    deaths = {(case.victim, case.step.source, case.step.destination) for case in CASES}
    for victim in Victim:
        assert (victim, Cell.OPEN, Cell.NONE) in deaths
        assert (victim, Cell.OPEN, Cell.READY) in deaths
        assert (victim, Cell.RELEASED, Cell.STARTING) in deaths
        assert (victim, Cell.RELEASED, Cell.RUNNING) in deaths


def at(source: Cell, destination: Cell, memory: Memory = Memory.RECORDED, *, told: bool = False) -> Step:
    return Step("a step", Side.SOURCE, "a point", source, destination, memory, held_is_told=told)


@pytest.mark.parametrize(
    ("step", "victim", "promised"),
    [
        (at(Cell.OPEN, Cell.NONE, Memory.PART), Victim.SOURCE_QEMU, {LOST}),
        (at(Cell.OPEN, Cell.NONE, Memory.PART), Victim.DESTINATION_QEMU, {RUNS}),
        (at(Cell.OPEN, Cell.NONE, Memory.WHOLE), Victim.SOURCE_BOTH, {OPERATOR}),
        (at(Cell.OPEN, Cell.READY), Victim.SOURCE_QEMU, {RUNS}),
        (at(Cell.OPEN, Cell.READY), Victim.DESTINATION_BOTH, {RUNS}),
        (at(Cell.RELEASED, Cell.READY), Victim.SOURCE_QEMU, {RUNS}),
        (at(Cell.RELEASED, Cell.HELD), Victim.DESTINATION_QEMU, {RUNS}),
        (at(Cell.RELEASED, Cell.HELD, told=True), Victim.DESTINATION_QEMU, {RUNS, LOST}),
        (at(Cell.RELEASED, Cell.STARTING), Victim.DESTINATION_QEMU, {OPERATOR}),
        (at(Cell.RELEASED, Cell.STARTING), Victim.SOURCE_QEMU, {RUNS}),
        (at(Cell.GONE, Cell.HELD), Victim.DESTINATION_QEMU, {LOST}),
        (at(Cell.GONE, Cell.STARTING), Victim.DESTINATION_QEMU, {LOST}),
        (at(Cell.RELEASED, Cell.RUNNING), Victim.DESTINATION_QEMU, {LOST}),
        (at(Cell.RELEASED, Cell.RUNNING), Victim.SOURCE_QEMU, {RUNS}),
    ],
)
def test_what_is_promised_is_what_the_durable_words_allow(
    step: Step, victim: Victim, promised: set[Promise]
) -> None:
    assert promise(step, victim) == promised


def test_where_no_qemu_dies_one_runner_is_promised_and_nobody_is_asked() -> None:
    assert {case.promises for case in CASES if loses_qemu(case.victim) is None} == {frozenset({RUNS})}


def test_a_sample_is_the_same_for_the_same_seed_and_has_every_victim() -> None:
    chosen = sample(12, seed=3)
    assert chosen == sample(12, seed=3) != sample(12, seed=4)
    assert {case.victim for case in chosen} == set(Victim)
    assert len({case.step for case in chosen}) == 12
    assert set(sample(10_000, seed=3)) == set(CASES)
