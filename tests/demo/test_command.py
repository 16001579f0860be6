"""The command: what it refuses, and that a signal ends it cleanly. The move itself: test_demo_vm.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from sandshift.cli.demo.command import demo, until_signalled
from sandshift.cli.demo.lab import open_lab
from sandshift.cli.demo.scenario import Demo, failure_of, memory_of
from sandshift.cli.demo.settings import Settings
from sandshift.cli.demo.show import Lines
from sandshift.cli.demo.topology import NAMESPACE_PREFIX
from sandshift.errors import Aborted, Cancelled, NotSupported, Rejected
from sandshift.fleet.result import MigrationResult
from sandshift.fleet.saga import Outcome
from tests.needs import needs_root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dirty-rate", "0"], "dirty rate 0 MiB/s is outside 1 to 4096 MiB/s"),
        (["--working-set", "99999"], "working set 99999 MiB is outside 1 to 16384 MiB"),
        (["--memory", "64"], "memory 64 MiB is outside 128 to 65536 MiB"),
        (["--working-set", "200"], "a working set of 200 MiB needs a guest of at least 328 MiB"),
    ],
)
def test_an_option_out_of_range_is_one_line_with_the_range(arguments, message):
    ran = CliRunner().invoke(demo, arguments)
    assert ran.exit_code == 1
    assert ran.stderr.startswith("sandshift: ")
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr


def test_with_json_an_error_is_one_object_too():
    ran = CliRunner().invoke(demo, ["--json", "--memory", "64"])
    assert ran.exit_code == 1
    told = json.loads(ran.stdout)
    assert told["code"] == "INVALID_ARGUMENT"
    assert told["ok"] is False
    assert told["error"] == told["failure"] == "memory 64 MiB is outside 128 to 65536 MiB"
    assert ran.stderr == f"sandshift: {told['error']}\n"


def test_without_root_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    ran = CliRunner().invoke(demo, ["--cache", str(tmp_path)])
    assert ran.exit_code == 1
    assert ran.stderr == (
        "sandshift: two hosts on one machine are network namespaces, which only root can make: run it as root\n"
    )


def test_without_tun_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("sandshift.cli.demo.scenario.TUN", Path("/dev/net/nothing"))
    with pytest.raises(NotSupported, match="modprobe tun"):
        Demo(Settings(), Lines()).check_machine()


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_takes_the_lab_down_and_ends_as_interrupted(number, tmp_path):
    made = []

    class Waiting(Demo):
        async def run(self):
            async with open_lab(labs_folder=tmp_path / "labs") as lab:
                made.append(lab)
                os.kill(os.getpid(), number)
                await asyncio.Event().wait()

    with pytest.raises(Cancelled, match="interrupted; everything that the demo made is gone"):
        await until_signalled(Waiting(Settings(), Lines()))
    assert list(Path("/run/netns").glob(f"{NAMESPACE_PREFIX}{made[0].topology.lab_id}-*")) == []
    assert not made[0].folder.exists()


def result(outcome: Outcome, **more) -> MigrationResult:
    return MigrationResult("demo", "s", "host-a", "host-b", outcome, **more)


def test_a_move_that_did_not_happen_says_which_call_failed_and_why():
    assert failure_of(result(Outcome.MOVED)) == ""
    undone = result(Outcome.UNDONE, failed_call="PrepareSandbox on the destination", reason=Rejected("no"))
    assert failure_of(undone) == "PrepareSandbox on the destination: no"
    assert failure_of(result(Outcome.UNDECIDED)) == "the move ended undecided"


def test_only_a_report_of_a_whole_check_counts_as_one():
    with pytest.raises(Aborted, match="'status', which is no report of a whole check"):
        memory_of({"event": "status", "pages": 1, "pages_checked": 1}, 0)
