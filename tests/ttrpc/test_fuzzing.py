"""The fuzzer of tests/fuzz with a small budget: it runs, it finds nothing, and it would find something."""

from __future__ import annotations

import asyncio

import pytest

from tests.fuzz import planted, sockets
from tests.fuzz.guided import Edges, Finding, Fuzzer
from tests.fuzz.targets import SEEDS, Broken, ask, must, serve
from tests.fuzz.ttrpc import explore


def test_the_core_holds_its_rules_under_a_small_budget() -> None:
    assert explore(400, seed=2).inputs == 400


def test_a_server_is_unharmed_by_garbage_on_its_sockets() -> None:
    assert asyncio.run(sockets.attack([*SEEDS, b"\xff" * 30] * 4, seed=3)) == 4 * (len(SEEDS) + 1)


def test_every_planted_bug_still_has_its_line() -> None:
    assert len({plant.name: modules for plant, modules in planted.each()}) == len(planted.PLANTS) == 12


def test_the_bug_that_kills_gos_server_is_found_by_a_seed_of_plain_traffic() -> None:
    plant = next(plant for plant in planted.PLANTS if "kills the server (Go)" in plant.name)
    modules = planted.planted(plant)
    late_data = SEEDS[0][:10] + bytes((1, 3, 1, 0, 2, 3, 1, 2, 3))
    serve(late_data)
    with pytest.raises(AttributeError):
        serve(late_data, modules)


def test_new_lines_are_noticed_once_and_findings_name_their_input() -> None:
    edges = Edges([ask.__code__.co_filename])
    assert edges.run(ask, SEEDS[-2]) > 0
    assert edges.run(ask, SEEDS[-2]) == 0
    with pytest.raises(Finding, match="Broken: no; input 00"):
        edges.run(lambda _: must(condition=False, rule="no"), b"\0")
    with pytest.raises(Broken):
        must(condition=False, rule="no")


def test_a_search_can_be_replayed_from_its_seed() -> None:
    one, two = (Fuzzer(lambda _: None, Edges(()), SEEDS, seed=5) for _ in range(2))
    assert [one.next_input() for _ in range(50)] == [two.next_input() for _ in range(50)]
