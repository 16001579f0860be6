from __future__ import annotations

import logging

import pytest

from sandshift.shim.stopwatch import Stopwatch


def test_laps_are_told_in_one_line_that_can_be_read_by_a_machine(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([10.0, 10.25, 10.2505])
    watch = Stopwatch(lambda: next(times))
    watch.lap("vm")
    watch.lap("agent")
    with caplog.at_level(logging.INFO):
        watch.tell("sandbox s")
    assert caplog.messages == ['sandbox s: started, ms: {"vm": 250.0, "agent": 0.5}']
