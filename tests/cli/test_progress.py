"""What a person is shown while a sandbox moves."""

from __future__ import annotations

import pytest

from sandshift.cli.progress import Drawing, phase_text, progress_text
from sandshift.fleet.result import Progress, Update
from sandshift.session.states import Side

MIB = 1 << 20


def progress(**changes: int) -> Progress:
    given = {
        "pass_number": 3,
        "bytes_total": 256 * MIB,
        "bytes_transferred": 187 * MIB,
        "bytes_remaining": 12 * MIB,
        "dirty_bytes_per_s": 20 * MIB,
        "bytes_per_s": 412 * MIB,
        "throttle_percent": 0,
        "expected_blackout_ms": 30,
    }
    return Progress(**(given | changes))


def update(phase: str, state: str = "SUCCESS", side: Side = Side.SOURCE, **more: object) -> Update:
    return Update(side, phase, state, at_ms=1.0, unix_us=0, **more)  # type: ignore[arg-type]


def test_progress_is_one_line_of_numbers() -> None:
    assert (
        progress_text(progress())
        == "pass 3 · 187.0 MiB sent · 12.0 MiB left · 412.0 MiB/s · 20.0 MiB/s dirty"
    )


def test_a_guest_that_is_slowed_down_is_told() -> None:
    assert progress_text(progress(dirty_bytes_per_s=0, throttle_percent=40)).endswith(
        "412.0 MiB/s · guest slowed by 40 %"
    )


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (update("BLACKOUT_STARTED"), "the guest has stopped on the source"),
        (
            update("BLACKOUT_EXITED", side=Side.DESTINATION, blackout_ms=31),
            "the guest runs on the destination, after 31 ms",
        ),
        (update("DONE"), ""),
        (
            update("FAILED", "DESTINATION_FAILED", message="QEMU died"),
            "source: failed (destination failed): QEMU died",
        ),
    ],
)
def test_phases_are_told_in_words(told: Update, text: str) -> None:
    assert phase_text(told) == text


def test_nothing_is_drawn_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with Drawing(title="s-1: a to b", watched=False) as drawing:
        drawing.show(update("BLACKOUT_STARTED"))
    assert capfd.readouterr() == ("", "")


def test_what_is_drawn_never_goes_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with Drawing(title="s-1: a to b", watched=True) as drawing:
        drawing.show(update("TRANSFER_IN_PROGRESS", progress=progress()))
        drawing.show(update("BLACKOUT_STARTED"))
    assert capfd.readouterr().out == ""
