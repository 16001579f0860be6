"""The pod benchmark's arithmetic: output is held to what the writer says, byte by byte."""

from __future__ import annotations

from bench._pod_moves import BLOCK, PIECE_BYTES, Checked, check, written_before
from bench.pod import told


def talk(first: int, count: int, *, cs: int = 100) -> bytes:
    """What the writer says: each piece `cs` hundredths of a second after the one before."""
    return b"".join(b"%08d %09d\n" % (number, number * cs) + BLOCK for number in range(first, first + count))


def test_output_that_is_whole_is_counted_and_nothing_else() -> None:
    assert check(talk(0, 3)) == Checked(3 * PIECE_BYTES, 0, 0)
    assert check(talk(0, 3)[:-7]) == Checked(3 * PIECE_BYTES - 7, 0, 0)
    assert check(b"") == Checked(0, 0, 0)


def test_a_missing_piece_and_missing_bytes_are_loss() -> None:
    assert check(talk(0, 1) + talk(2, 1)).lost == PIECE_BYTES
    data = talk(0, 3)
    assert check(data[:1000] + data[1001:]).lost > 0


def test_a_piece_that_comes_twice_is_a_repetition() -> None:
    assert check(talk(0, 2) + talk(1, 1)) == Checked(3 * PIECE_BYTES, 0, PIECE_BYTES)


def test_what_was_written_before_the_stop_and_read_after_it_was_in_the_guest() -> None:
    data = talk(0, 5)
    assert written_before(data, 0, 250) == 2 * PIECE_BYTES
    assert written_before(data, PIECE_BYTES, 250) == PIECE_BYTES
    assert written_before(data, 3 * PIECE_BYTES, 250) == 0


def test_the_figures_are_told_in_words() -> None:
    text = told(
        {
            "rounds": 3,
            "first_output_ms": {"ours": 980.0, "runc": 130.0},
            "first_output_split_ms": {"vm": 200.0},
            "pod_move": {
                "total_ms": 3000.0,
                "blackout_ms": 70.0,
                "bytes_checked": 10,
                "bytes_unacknowledged_at_stop": 5,
                "bytes_lost": 0,
                "bytes_repeated": 0,
            },
            "stdout_mb_per_s": 50.0,
            "stdout_cpu_ms_per_mb": 20.0,
        }
    )
    assert "ours 980 ms, runc 130 ms (medians of 3)" in text
    assert "10 bytes checked, 5 of them in the guest when it stopped, 0 lost, 0 repeated" in text
