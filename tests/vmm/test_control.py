"""QEMU's words for how a VM stands, as ours."""

from __future__ import annotations

import pytest

from sandshift.errors import Unavailable
from sandshift.shim.migration.destination import HAS_RUN
from sandshift.vmm.control import Control
from sandshift.vmm.machine import RunState

WORDS = {
    "prelaunch": RunState.PRELAUNCH,
    "running": RunState.RUNNING,
    "paused": RunState.PAUSED,
    "save-vm": RunState.PAUSED,
    "inmigrate": RunState.INMIGRATE,
    "restore-vm": RunState.INMIGRATE,
    "finish-migrate": RunState.FINISH_MIGRATE,
    "postmigrate": RunState.POSTMIGRATE,
    "shutdown": RunState.SHUTDOWN,
    "guest-panicked": RunState.GUEST_PANICKED,
    "internal-error": RunState.INTERNAL_ERROR,
    "io-error": RunState.IO_ERROR,
    "watchdog": RunState.WATCHDOG,
    "debug": RunState.DEBUG,
    "suspended": RunState.SUSPENDED,
    "a state of the future": RunState.INTERNAL_ERROR,
}
"""Source: qapi/run-state.json, RunState; colo is not used."""


class OneAnswer:
    """A conversation in which only query-status is asked."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def execute(self, command: str, _arguments: object = None) -> object:
        assert command == "query-status"
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def control(answer: object, *, alive: bool = True) -> Control:
    return Control("box", OneAnswer(answer), lambda: alive)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", WORDS)
async def test_every_state_of_qemu_has_its_own_meaning(word: str) -> None:
    assert await control({"status": word, "running": word == "running"}).run_state() is WORDS[word]


async def test_an_answer_that_is_none_is_no_state_to_start_from() -> None:
    assert await control([]).run_state() is RunState.INTERNAL_ERROR


async def test_a_qemu_that_is_gone_is_dead_and_one_that_is_silent_is_not() -> None:
    silent = Unavailable("no answer within 10 s")
    assert await control(silent, alive=False).run_state() is RunState.DEAD
    with pytest.raises(Unavailable, match="no answer"):
        await control(silent).run_state()


def test_a_guest_that_stopped_by_itself_is_not_taken_for_one_that_never_ran() -> None:
    """Else a destination whose shim was killed in the start could give the right back for a guest that has run."""
    never = {RunState.PRELAUNCH, RunState.PAUSED, RunState.INMIGRATE, RunState.DEAD}
    left = {RunState.FINISH_MIGRATE, RunState.POSTMIGRATE}
    assert set(RunState) - never - left == HAS_RUN
