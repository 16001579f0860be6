"""What the evidence proves, and above all what takes `ok` away."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sandshift.cli.demo.capture import Seen
from sandshift.cli.demo.client import Answer
from sandshift.cli.demo.proof import (
    Control,
    Evidence,
    Guest,
    MemoryCheck,
    Move,
    conversation,
    figures,
    longest_silence_ms,
    reasons_against,
)

MS = 1_000_000
ISSUE_KEYS = {
    "ok",
    "accelerator",
    "qemu_version",
    "memory_bytes",
    "total_ms",
    "blackout_ms",
    "client_gap_ms",
    "bytes_transferred",
    "passes",
    "tcp_connection_survived",
    "memory_verified",
    "pages_checked",
    "pages_stale",
    "encrypted",
    "boot_id_before",
    "boot_id_after",
}


def answers(*numbers: int, nonces: bool = True) -> list[Answer]:
    """Answers to these numbers, 5 ms apart, each 1 ms after its request."""
    return [Answer(n, nonces, i * 5 * MS, i * 5 * MS + MS) for i, n in enumerate(numbers)]


def good() -> Evidence:
    return Evidence(
        move=Move("tcg", "10.0.2", 256 << 20, 900.0, 12.0, 180 << 20, 4, "tls-psk"),
        conversation=conversation(answers(*range(1, 101)), moved_ns=250 * MS, unanswered=0, failure=""),
        client_gap_ms=40.0,
        quiet_gap_ms=9.0,
        memory=MemoryCheck(25600, 80000, 0, 3, 20 << 20),
        dirty_bytes_per_s_wanted=20 << 20,
        before=Guest("abc", 5.0),
        after=Guest("abc", 9.0),
        seen=Seen(20000, 190 << 20, 0, 0),
        control=Control(Seen(20000, 190 << 20, 0, 25600), 180 << 20),
    )


def with_move(**changes) -> Evidence:
    return replace(good(), move=replace(good().move, **changes))


def with_memory(**changes) -> Evidence:
    return replace(good(), memory=replace(good().memory, **changes))


def with_talk(*numbers: int, nonces: bool = True, **changes) -> Evidence:
    options = {"moved_ns": 5 * MS, "unanswered": 0, "failure": "", **changes}
    return replace(good(), conversation=conversation(answers(*numbers, nonces=nonces), **options))


def test_a_whole_move_is_ok_and_its_json_has_the_promised_keys():
    made = figures(good())
    assert made["ok"] is True
    assert made["reasons"] == []
    assert set(made) >= ISSUE_KEYS
    assert json.loads(json.dumps(made)) == made


def test_without_the_control_a_whole_move_is_ok_too():
    assert figures(replace(good(), control=None))["ok"] is True


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (with_move(failure="TransferSandbox on the source"), "a step failed"),
        (with_move(total_ms=0.0), "the move did not end"),
        (with_move(blackout_ms=0.0), "the blackout is not known"),
        (with_move(blackout_ms=901.0), "the blackout is not known"),
        (with_move(bytes_transferred=0), "no memory was transferred"),
        (with_move(passes=1), "memory was not copied in at least two passes"),
        (with_move(encryption="off"), "the channel is not proven to be encrypted"),
        (with_memory(pages_stale=1), "pages of the pattern are wrong"),
        (with_memory(pages_checked=25599), "not every page was checked"),
        (with_memory(pages=0, pages_checked=0), "the guest's memory is not verified"),
        (with_memory(bytes_per_s=(10 << 20) - 1), "the writer did not reach half of its rate"),
        (with_talk(1, 2, 4), "counter values were lost"),
        (with_talk(1, 2, 2, 3), "counter values were repeated"),
        (with_talk(1, 3, 2), "counter values were repeated"),
        (with_talk(1, 2, 3, nonces=False), "counter values were repeated"),
        (with_talk(1, 2, 3, unanswered=1), "the client's TCP connection did not survive"),
        (with_talk(1, 2, 3, failure="reset"), "the client's TCP connection did not survive"),
        (with_talk(1, 2, 3, moved_ns=99 * MS), "the counter did not answer after the move"),
        (with_talk(), "the counter did not answer after the move"),
        (replace(good(), seen=Seen(20000, 190 << 20, 0, 1)), "the channel is not proven to be encrypted"),
        (replace(good(), seen=Seen(20000, 190 << 20, 1, 0)), "the channel is not proven to be encrypted"),
        (replace(good(), seen=Seen(200, 10 << 20, 0, 0)), "the channel is not proven to be encrypted"),
        (
            replace(good(), control=Control(Seen(20000, 190 << 20, 0, 0), 180 << 20)),
            "the capture did not find the pattern even with encryption off",
        ),
        (replace(good(), control=Control(Seen(1, 1, 0, 1), 1, "refused")), "a step failed"),
        (replace(good(), after=Guest("other", 9.0)), "the guest booted again"),
        (replace(good(), before=Guest("", 5.0), after=Guest("", 9.0)), "the guest booted again"),
        (replace(good(), after=Guest("abc", 4.0)), "the guest's uptime did not go on"),
    ],
)
def test_each_thing_that_can_be_wrong_takes_ok_away_and_is_named(evidence, reason):
    made = figures(evidence)
    assert made["ok"] is False
    assert reason in made["reasons"]


def test_ok_can_be_computed_again_from_what_was_printed():
    printed = json.loads(json.dumps(figures(with_talk(1, 2, 4))))
    assert reasons_against(printed) == printed["reasons"]
    printed["counter_lost"] = 0
    assert reasons_against(printed) == []


def test_figures_with_nothing_in_them_prove_nothing():
    assert len(reasons_against({})) >= 10


def test_a_silence_is_measured_from_answer_to_answer_around_the_move():
    record = [Answer(i, True, 0, at * MS) for i, at in enumerate([0, 5, 100, 105, 150, 155, 400])]
    assert longest_silence_ms(record, from_ns=50 * MS, to_ns=152 * MS) == 95.0
    assert longest_silence_ms(record, from_ns=103 * MS, to_ns=152 * MS) == 45.0
    assert longest_silence_ms(record, from_ns=160 * MS, to_ns=500 * MS) == 245.0


def test_a_silence_that_never_ended_counts_until_the_end():
    record = [Answer(1, True, 0, 10 * MS)]
    assert longest_silence_ms(record, from_ns=5 * MS, to_ns=300 * MS) == 290.0
    assert longest_silence_ms([], from_ns=5 * MS, to_ns=300 * MS) == 295.0
