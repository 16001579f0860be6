"""ttrpc.inbox: bounded, and overfull until it is half empty again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttrpc.inbox import Inbox, InboxLimits


def test_messages_come_out_in_order_and_then_there_is_none() -> None:
    inbox = Inbox(InboxLimits())
    assert [inbox.put(b"a"), inbox.put(b"")] == [False, False]
    assert [inbox.take(), inbox.take(), inbox.size_bytes] == [b"a", b"", 0]
    with pytest.raises(IndexError):
        inbox.take()


@pytest.mark.parametrize("limits", [InboxLimits(messages_max=4), InboxLimits(bytes_max=40)])
def test_above_a_limit_it_is_overfull_until_it_is_down_to_half(limits: InboxLimits) -> None:
    inbox = Inbox(limits)
    assert [inbox.put(bytes(10)) for _ in range(6)] == [False] * 4 + [True] * 2
    states = []
    while inbox.messages:
        inbox.take()
        states.append(inbox.overfull)
    assert states == [True, True, True, False, False, False]


@given(st.lists(st.none() | st.binary(max_size=20)))
def test_it_knows_its_size_whatever_is_put_and_taken(steps: list[bytes | None]) -> None:
    inbox = Inbox(InboxLimits(messages_max=3, bytes_max=30))
    for step in steps:
        if step is not None:
            inbox.put(step)
        elif inbox.messages:
            inbox.take()
        assert inbox.size_bytes == sum(map(len, inbox.messages))
        if inbox.size_bytes > 30 or len(inbox.messages) > 3:
            assert inbox.overfull


def test_clearing_forgets_everything() -> None:
    inbox = Inbox(InboxLimits(messages_max=0))
    inbox.put(b"abc")
    inbox.clear()
    assert (inbox.size_bytes, list(inbox.messages), inbox.overfull) == (0, [], False)
