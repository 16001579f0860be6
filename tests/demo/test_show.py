"""What a person sees while the demo runs, at a terminal and elsewhere."""

from __future__ import annotations

import pytest

from sandshift.cli.demo.show import showing
from sandshift.fleet.result import Progress, Update
from sandshift.session.ids import Side

MIB = 1 << 20


def notification(phase: str, progress: Progress | None = None) -> Update:
    return Update(Side.SOURCE, phase, "SUCCESS", at_ms=1.0, unix_us=0, progress=progress)


@pytest.mark.parametrize("drawn", [True, False])
def test_every_step_is_told_in_order(drawn, capsys):
    with showing(drawn=drawn) as show:
        show.step("making two hosts")
        show.step("moving it")
        for number in (1, 2):
            show.update(
                notification(
                    "TRANSFER_IN_PROGRESS",
                    Progress(number, 256 * MIB, 90 * MIB, 30 * MIB, 20 * MIB, 500 * MIB, 0, 12),
                )
            )
        show.update(notification("BLACKOUT_STARTED"))
    told = capsys.readouterr()
    assert told.out == "", "stdout belongs to the summary"
    assert -1 < told.err.index("making two hosts") < told.err.rindex("moving it")
    if drawn:
        assert "pass 2, 90 MiB sent, 30 MiB left, written at 20 MiB/s" in told.err
    else:
        assert told.err.splitlines()[-1].endswith("source: blackout started")


def test_a_show_without_a_step_stays_empty(capsys):
    with showing(drawn=True) as show:
        show.update(notification("SETUP_DONE"))
    assert "source" not in capsys.readouterr().err
