"""ttrpc.deadlines: never early, late by little, and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ttrpc.deadlines import RESOLUTION_S, Deadlines


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)), max_size=30))
def test_nothing_is_early_and_nothing_later_than_its_width(timeouts: list[tuple[float, float]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    due = {}
    for number, (now_s, timeout_s) in enumerate(timeouts):
        due[number] = now_s + timeout_s, timeout_s
        deadlines.add(number, now_s + timeout_s, now_s)
    while (next_s := deadlines.next_due_s()) is not None:
        expired = deadlines.expire(next_s)
        assert expired
        for number in expired:
            due_s, timeout_s = due.pop(number)
            assert due_s - 1e-6 <= next_s <= due_s + 2 * RESOLUTION_S + timeout_s / 250
    assert due == {}


def test_what_was_discarded_does_not_expire_and_its_bucket_is_passed_over() -> None:
    deadlines: Deadlines[str] = Deadlines()
    first = deadlines.add("first", 1.0, 0.0)
    deadlines.add("second", 2.0, 0.0)
    deadlines.discard("first", first)
    assert deadlines.next_due_s() == 2.0
    assert deadlines.expire(1.5) == []
    assert deadlines.expire(2.0) == ["second"]
    assert deadlines.next_due_s() is None
    deadlines.discard("first", first)


def test_calls_that_come_and_go_for_an_hour_leave_few_buckets() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for second in range(3600):
        for call in range(10):
            bucket = deadlines.add(call, second + call / 10 + 3600.0, second + call / 10)
            deadlines.discard(call, bucket)
    assert len(deadlines._buckets) < 2000


def test_those_that_share_a_bucket_expire_together() -> None:
    deadlines: Deadlines[int] = Deadlines()
    assert deadlines.add(1, 0.001, 0.0) == deadlines.add(2, 0.009, 0.0)
    assert deadlines.expire(0.0) == []
    assert sorted(deadlines.expire(0.01)) == [1, 2]
