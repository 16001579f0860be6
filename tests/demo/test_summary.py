"""The last word to a person: says what was found, and says it plainly when something is wrong."""

from __future__ import annotations

from dataclasses import replace

from sandshift.cli.demo.capture import Seen
from sandshift.cli.demo.proof import Guest, MemoryCheck, conversation, figures
from sandshift.cli.demo.show import progress_note
from sandshift.cli.demo.summary import summary
from sandshift.fleet.result import Progress
from tests.demo.test_proof import answers, good


def test_a_proven_move_reads_like_this():
    assert summary(figures(good())).splitlines() == [
        "A running virtual machine moved from host A to host B, with its memory, its processes and its connections.",
        "",
        "  moved       180 MiB in 4 passes, 900 ms in all",
        (
            "  stood still 12 ms by both QEMUs' own stamps; the client's longest wait between two answers was 40 ms (9 ms"
            " before the move)"
        ),
        "  connection  one TCP connection throughout: 100 numbers came, 49 of them after the move, 0 lost, 0 repeated",
        "  memory      80,000 page checks while and after it was rewritten at 20 MiB/s: all right",
        "  same guest  boot abc before and after; up 5.0 s, then 9.0 s",
        (
            "  encrypted   190 MiB captured between the hosts hold no page of the memory; with encryption off the same"
            " capture found 25,600 pages"
        ),
        "  machine     QEMU 10.0.2, tcg, 256 MiB",
        "",
        "Proven: nothing was lost.",
    ]


def test_every_thing_that_is_wrong_is_told():
    broken = replace(
        good(),
        memory=MemoryCheck(25600, 80000, 17, 3, 20 << 20),
        conversation=conversation(
            answers(1, 2, 4), moved_ns=0, unanswered=0, failure="Connection reset by peer"
        ),
        after=Guest("other", 1.0),
        seen=Seen(20000, 190 << 20, 3, 1),
    )
    text = summary(figures(broken))
    for words in [
        "the TCP connection BROKE",
        "1 lost",
        "17 pages WRONG",
        "boot abc before, other after",
        "hold 1 page of the memory (3 packets missed)",
        "NOT proven:",
        "  - pages of the pattern are wrong",
        "what failed: Connection reset by peer",
    ]:
        assert words in text
    assert "Proven" not in text


def test_a_move_that_did_not_end_is_not_called_one():
    failed = replace(good(), move=replace(good().move, total_ms=0.0, failure="TransferSandbox: refused"))
    assert summary(figures(failed)).startswith("The sandbox did not move.")
    assert "what failed: TransferSandbox: refused" in summary(figures(failed))


def test_progress_is_told_in_a_few_words():
    progress = Progress(2, 256 << 20, 90 << 20, 30 << 20, 20 << 20, 500 << 20, 0, 12)
    assert progress_note(progress) == "pass 2, 90 MiB sent, 30 MiB left, written at 20 MiB/s"
