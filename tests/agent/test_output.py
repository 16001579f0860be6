"""Output by offset, kept until acknowledged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandshift.agent.output import STREAM_BYTES_MAX, STREAM_BYTES_MIN, Budget, OutputBuffer

STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 200_000)),
    st.tuples(st.just("acknowledge"), st.integers(0, 300_000)),
    st.tuples(st.just("read"), st.integers(0, 300_000)),
)


@given(st.lists(STEPS, max_size=40), st.integers(1, 150_000))
def test_reading_from_any_kept_offset_gives_what_was_written_there(steps, read_bytes):
    buffer = OutputBuffer(Budget())
    written = bytearray()
    for step, value in steps:
        if step == "append":
            data = bytes((len(written) + place * 7) % 251 for place in range(min(value, 5000))) * (
                value // 5000 + 1
            )
            buffer.append(data)
            written += data
        elif step == "acknowledge":
            buffer.acknowledge(min(buffer.acknowledged + value, buffer.end))
        else:
            offset = min(buffer.acknowledged + value, buffer.end)
            got = buffer.read(offset, read_bytes)
            assert got == written[offset : offset + len(got)]
            assert len(got) == min(read_bytes, buffer.end - offset)
    assert buffer.end == len(written)


def test_many_small_pieces_cost_few_chunks():
    buffer = OutputBuffer(Budget())
    for _ in range(10_000):
        buffer.append(b"ten bytes\n")
    assert len(buffer._chunks) == 2
    assert buffer.read(0, 1 << 20) == b"ten bytes\n" * 10_000


def test_a_piece_handed_out_does_not_change_when_more_comes():
    buffer = OutputBuffer(Budget())
    buffer.append(b"first")
    got = buffer.read(0, 100)
    buffer.append(b"second")
    assert got == b"first"
    assert buffer.read(5, 100) == b"second"


def test_an_acknowledgement_from_the_future_or_the_past_does_nothing():
    buffer = OutputBuffer(Budget())
    buffer.append(b"abcdef")
    buffer.acknowledge(3)
    buffer.acknowledge(1)
    buffer.acknowledge(100)
    assert buffer.acknowledged == 3
    assert buffer.read(3, 10) == b"def"


def test_full_is_full_until_enough_is_acknowledged():
    buffer = OutputBuffer(Budget())
    buffer.append(bytes(STREAM_BYTES_MAX))
    assert buffer.is_full
    buffer.acknowledge(1)
    assert not buffer.is_full


def test_when_all_streams_together_hold_too_much_each_keeps_little():
    budget = Budget(bytes_max=3 * STREAM_BYTES_MIN)
    one, two = OutputBuffer(budget), OutputBuffer(budget)
    one.append(bytes(2 * STREAM_BYTES_MIN))
    assert not one.is_full
    two.append(bytes(STREAM_BYTES_MIN))
    assert one.is_full
    assert two.is_full
    one.acknowledge(1)
    assert not two.is_full
    assert budget.used_bytes == 3 * STREAM_BYTES_MIN - 1
