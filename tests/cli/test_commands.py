"""The commands against scripted shims: what they print, what they ask, how they end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
from pathlib import Path

import pytest

import ttrpc
from sandshift.session.statement import Cell
from sandshift.session.states import Side
from sandshift.wire.sandshift import shim_pb2
from tests.cli.conftest import Farm, Sandshift
from tests.fleet.fake_shims import SANDBOX

REFUSED = ttrpc.StatusError(ttrpc.Code.FAILED_PRECONDITION, "machine.cpu: no avx2; choose another model")


# run and stop


def test_run_starts_a_sandbox_and_its_process(sandshift: Sandshift, farm: Farm) -> None:
    ended = sandshift(
        "run", "--config", farm.config("a"), "--id", SANDBOX, "--memory", "512M", "--address", "10.9.0.50/24",
        "--gateway", "10.9.0.1", "--json", "--", "/bin/counter", "--port", "7",
    )  # fmt: skip
    assert ended.status == 0
    assert ended.document["id"] == SANDBOX
    assert ended.document["state"] == "running"
    assert ended.document["process"] == {"id": "main", "pid": 7}
    shim = farm.world.shim("a")
    assert shim.processes == {"main": ["/bin/counter", "--port", "7"]}
    assert shim.options.memory_bytes == 512 << 20
    assert list(shim.options.network_cards[0].addresses) == ["10.9.0.50/24"]
    assert shim.options.network_cards[0].gateway == "10.9.0.1"


def test_run_prints_the_id_that_it_chose(sandshift: Sandshift, farm: Farm) -> None:
    ended = sandshift("run", "--config", farm.config("a"))
    assert ended.status == 0
    assert ended.stdout.startswith("s-")
    assert ("a", ended.stdout.strip()) in farm.world.shims


@pytest.mark.parametrize("output", ["--json", "--verbose"])
def test_an_interrupted_run_leaves_nothing_and_says_so(
    sandshift: Sandshift, farm: Farm, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    async def interrupted(*_: object, **__: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("sandshift.cli.run.run_process", interrupted)
    ended = sandshift("run", "--config", farm.config("a"), "--id", SANDBOX, output, "--", "true")
    assert ended.status == 130
    assert ended.stderr == "sandshift: interrupted\n"
    told = '{"error": "interrupted", "code": "CANCELLED"}\n'
    assert ended.stdout == (told if output == "--json" else "")
    assert farm.world.shims == {}


def test_run_refuses_an_id_that_is_taken_and_leaves_its_sandbox_alone(
    sandshift: Sandshift, farm: Farm
) -> None:
    farm.run_sandbox()
    ended = sandshift("run", "--config", farm.config("a"), "--id", SANDBOX, "--json")
    assert ended.status == 1
    assert ended.document["code"] == "ALREADY_EXISTS"
    assert ended.stderr == (
        "sandshift: host a has a sandbox s-1 already: stop it with 'sandshift stop s-1' there, or choose another id\n"
    )
    assert farm.world.runners == ["a"]


@pytest.mark.parametrize("call", ["a CreateSandbox", "a StartSandbox", "a RunProcess"])
def test_a_run_that_fails_leaves_nothing(sandshift: Sandshift, farm: Farm, call: str) -> None:
    farm.world.fail(
        call, ttrpc.StatusError(ttrpc.Code.RESOURCE_EXHAUSTED, "512 MiB are not free on this host")
    )
    ended = sandshift("run", "--config", farm.config("a"), "--id", SANDBOX, "--", "true")
    assert ended.status == 1
    assert ended.stderr == "sandshift: 512 MiB are not free on this host\n"
    assert farm.world.shims == {}


def test_a_run_on_a_host_that_cannot_run_sandboxes_leaves_nothing(sandshift: Sandshift, farm: Farm) -> None:
    refusal = ttrpc.StatusError(
        ttrpc.Code.FAILED_PRECONDITION, "this host cannot run sandboxes: qemu: is not installed"
    )
    farm.world.fail("a StartSandbox", refusal)
    ended = sandshift("run", "--config", farm.config("a"), "--id", SANDBOX)
    assert ended.stderr == "sandshift: this host cannot run sandboxes: qemu: is not installed\n"
    assert farm.world.shims == {}


def test_stop_ends_sandboxes_and_goes_on_after_one_that_is_not_there(
    sandshift: Sandshift, farm: Farm
) -> None:
    farm.run_sandbox()
    ended = sandshift("stop", "--config", farm.config("a"), "nobody", SANDBOX, "--timeout", "3", "--json")
    assert ended.status == 1
    assert [(each["id"], each["stopped"]) for each in ended.document] == [("nobody", False), (SANDBOX, True)]
    assert ended.stderr == (
        "sandshift: sandbox nobody on host a does not exist; 'sandshift ls' shows those that do\n"
    )
    assert "a StopSandbox 3" in farm.world.called
    assert farm.world.shims == {}


def test_a_sandbox_that_is_moving_is_not_stopped(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()._begin("move-1", Side.SOURCE, "Transferring", Cell.OPEN)
    ended = sandshift("stop", "--config", farm.config("a"), SANDBOX)
    assert ended.status == 1
    assert "is in migration session 'move-1' (Transferring): finish or undo it" in ended.stderr
    assert farm.world.runners == ["a"]


# ls, logs, process


def test_ls_shows_every_sandbox_in_a_table(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox("a")
    farm.run_sandbox("b")._begin("move-1", Side.SOURCE, "SourceExported", Cell.OPEN)
    ended = sandshift("ls", "--config", farm.config("a"), "--also", farm.config("b"))
    assert ended.status == 0
    assert ended.stdout == (
        "ID    STATE     HOST   MEMORY      ADDRESSES      SESSION\n"
        "s-1   running   a      256.0 MiB   10.9.0.50/24   -\n"
        "s-1   running   b      256.0 MiB   10.9.0.50/24   move-1 (SourceExported)\n"
    )


def test_ls_of_an_empty_host_is_an_empty_array(sandshift: Sandshift, farm: Farm) -> None:
    assert sandshift("ls", "--config", farm.config("a"), "--json").document == []


def test_ls_lists_a_sandbox_whose_shim_is_dead_and_says_what_to_do(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    path = farm.world.host("a").config.shim_socket("default", SANDBOX)
    farm.do(shim.die())
    leave_dead_socket(path)
    ended = sandshift("ls", "--config", farm.config("a"))
    assert ended.status == 0
    assert "s-1   no answer   a" in ended.stdout
    assert "'sandshift session resume s-1' starts it again" in ended.stderr


def leave_dead_socket(path: Path) -> None:
    """What a shim that was killed leaves: a socket that nobody listens on."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_logs_go_byte_for_byte_to_stdout_and_stderr(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    shim.processes["main"] = ["true"]
    shim.output["main"] = [(1, b"one\n"), (2, b"wrong\n"), (1, b"two")]
    ended = sandshift("logs", "--config", farm.config("a"), SANDBOX)
    assert (ended.stdout, ended.stderr) == ("one\ntwo", "wrong\n")


def test_logs_as_json_are_one_document_with_the_exit_code(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    shim.processes["main"] = ["true"]
    shim.output["main"] = [(1, b"one\n")]
    ended = sandshift("logs", "--config", farm.config("a"), SANDBOX, "-f", "--json")
    assert ended.document == {
        "sandbox": SANDBOX,
        "process": "main",
        "exited": True,
        "exit_code": 3,
        "output": [{"stream": 1, "offset": 0, "text": "one\n"}],
    }


def test_logs_of_several_processes_ask_for_a_name(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox().processes |= {"p-2": ["b"], "p-1": ["a"]}
    ended = sandshift("logs", "--config", farm.config("a"), SANDBOX)
    assert ended.status == 1
    assert ended.stderr == "sandshift: sandbox s-1 has several processes: name one of p-1, p-2\n"


def test_processes_are_started_and_listed(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    started = sandshift(
        "process", "run", "--config", farm.config("a"), "--id", "p-1", SANDBOX, "--", "sleep", "9"
    )
    assert (started.status, started.stdout) == (0, "p-1\n")
    listed = sandshift("process", "ls", "--config", farm.config("a"), SANDBOX)
    assert listed.stdout == "PROCESS   PID   STATE   COMMAND\np-1       7     runs    sleep 9\n"


# migrate


def test_migrate_moves_and_tells_the_numbers(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    ended = sandshift("migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"))
    assert ended.status == 0
    lines = ended.stdout.splitlines()
    assert lines[0] == "s-1 runs on host b"
    assert lines[2:] == ["  blackout   31 ms", "  passes     2", "  moved      1.0 MiB"]
    assert ended.stderr.startswith("session s-1-")
    assert farm.world.runners == ["b"]


def test_migrate_as_json_is_one_document(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    ended = sandshift(
        "migrate",
        "--config",
        farm.config("a"),
        SANDBOX,
        "--to",
        farm.config("b"),
        "--max-passes",
        "4",
        "--json",
    )
    assert ended.document["outcome"] == "moved"
    assert ended.document["blackout_ms"] == 31
    assert ended.document["calls"][-1]["call"] == "CloseShim"
    assert ended.stderr == ""


def test_a_move_that_is_refused_says_that_nothing_has_changed(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    farm.world.fail("source PrepareAndExportSandbox", REFUSED)
    ended = sandshift("migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--json")
    assert ended.status == 1
    assert ended.document["outcome"] == "refused"
    assert ended.document["error"] == "machine.cpu: no avx2; choose another model"
    assert ended.stderr == (
        "sandshift: sandbox s-1 was not moved and nothing has changed on host a: PrepareAndExportSandbox on the source:"
        " machine.cpu: no avx2; choose another model\n"
    )


def test_a_move_that_fails_says_where_the_sandbox_is(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    farm.world.fail("destination PrepareSandbox", REFUSED)
    ended = sandshift("migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"))
    assert ended.status == 1
    assert (
        "sandshift: sandbox s-1 was not moved and runs on host a: PrepareSandbox on the destination: "
        in ended.stderr
    )
    assert farm.world.runners == ["a"]


def test_a_session_that_a_person_must_decide_is_status_3(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    shim._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.RELEASED)
    shim.vm_state = "paused"
    farm.world.gone_hosts.add("b")
    ended = sandshift(
        "migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--session", "move-1"
    )
    assert ended.status == 3
    assert "prove that host off, then force RESUME on the source" in ended.stderr


def test_migrate_again_with_the_session_finishes_it(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    farm.world.fail("source PrepareAndExportSandbox", ttrpc.StatusError(ttrpc.Code.UNAVAILABLE, "gone"))
    words = (
        "migrate",
        "--config",
        farm.config("a"),
        SANDBOX,
        "--to",
        farm.config("b"),
        "--session",
        "move-7",
    )
    assert sandshift(*words).status == 1
    assert sandshift(*words).status == 0
    assert farm.world.runners == ["b"]
    assert sandshift(*words, "--json").document["outcome"] == "moved"


def test_check_names_every_blocker_of_both_sides_and_moves_nothing(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    shim.preflight_answer = shim_pb2.PreflightResponse(
        blockers=[shim_pb2.Blocker(subject="qemu.version", problem="is 7.2", remedy="install 9.0")],
        warnings=["the hosts' clocks differ by 3 s"],
    )
    ended = sandshift("migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--check")
    assert ended.status == 1
    assert ended.stdout == (
        "sandbox s-1 cannot move to host b:\n"
        "  source: qemu.version: is 7.2; install 9.0\n"
        "  warning: the hosts' clocks differ by 3 s\n"
    )
    assert farm.world.runners == ["a"]
    assert list(farm.world.shims) == [("a", SANDBOX)]


def test_check_of_a_sandbox_that_can_move_is_ok(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    ended = sandshift(
        "migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--check", "--json"
    )
    assert ended.document == {"ok": True, "blockers": [], "warnings": []}


def test_check_says_that_the_destination_has_the_id_already(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox("a")
    farm.run_sandbox("b")
    ended = sandshift(
        "migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--check", "--json"
    )
    assert [(each["side"], each["subject"]) for each in ended.document["blockers"]] == [
        ("destination", "destination.shim")
    ]
    assert farm.world.runners == ["a", "b"]


# session and report


def test_session_show_tells_both_sides(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox("a")._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.OPEN)
    farm.run_sandbox("b")._begin("move-1", Side.DESTINATION, "TransferCompleted", Cell.READY)
    farm.world.shim("a").vm_state = farm.world.shim("b").vm_state = "paused"
    ended = sandshift("session", "show", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"))
    assert ended.stdout == (
        "HOST   SIDE          SESSION   STATE               RIGHT TO RUN   VM       REASON\n"
        "a      source        move-1    TransferCompleted   OPEN           paused   -\n"
        "b      destination   move-1    TransferCompleted   READY          paused   -\n"
    )


def test_session_show_of_nothing_is_an_error(sandshift: Sandshift, farm: Farm) -> None:
    ended = sandshift("session", "show", "--config", farm.config("a"), SANDBOX, "--json")
    assert ended.status == 1
    assert ended.document["sides"][0]["problem"].startswith("sandbox s-1 on host a does not exist")


def test_session_resume_brings_a_dead_shim_back(sandshift: Sandshift, farm: Farm) -> None:
    shim = farm.run_sandbox()
    shim._begin("move-1", Side.SOURCE, "Transferring", Cell.OPEN)
    farm.do(shim.die())
    ended = sandshift("session", "resume", "--config", farm.config("a"), SANDBOX, "--json")
    assert ended.document["sides"][0]["state"] == "Transferring"
    assert shim.serving


def test_force_resume_asks_nobody_who_is_not_there(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.RELEASED)
    ended = sandshift("session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1")
    assert ended.status == 2
    assert "the destination may be running this guest" in ended.stderr
    assert "--yes-i-know-that-two-guests-may-run" in ended.stderr
    ended = sandshift(
        "session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1", "--json"
    )
    assert (ended.status, ended.document["code"]) == (2, "INVALID_ARGUMENT")
    assert farm.world.called == []


def test_force_resume_names_session_and_cell_to_the_shim(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.RELEASED)
    ended = sandshift(
        "session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1",
        "--yes-i-know-that-two-guests-may-run", "--json",
    )  # fmt: skip
    assert ended.document == {
        "sandbox": SANDBOX,
        "session": "move-1",
        "forced": True,
        "cell_before": "RELEASED",
    }
    assert farm.world.called == ["a ForceResume move-1 RELEASED"]


@pytest.mark.parametrize(
    ("cell", "why"),
    [(Cell.OPEN, "the source holds the right already"), (Cell.RUNNING, "this side runs the guest")],
)
def test_force_resume_is_refused_where_there_is_nothing_to_force(
    sandshift: Sandshift, farm: Farm, cell: Cell, why: str
) -> None:
    farm.run_sandbox()._begin("move-1", cell.side, "TransferCompleted", cell)
    ended = sandshift(
        "session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1",
        "--yes-i-know-that-two-guests-may-run",
    )  # fmt: skip
    assert ended.status == 1
    assert why in ended.stderr
    assert farm.world.called == []


def test_a_report_is_shown_as_an_outline_and_as_json(sandshift: Sandshift, farm: Farm) -> None:
    document = {"outcome": "success", "encrypted": True, "passes": [{"pass": 1, "bytes": 7}], "warnings": []}
    farm.run_sandbox().report_json = json.dumps(document).encode()
    words = ("report", "--config", farm.config("a"), "move-1")
    assert sandshift(*words).stdout == (
        "outcome: success\nencrypted: yes\npasses:\n  - pass: 1\n    bytes: 7\nwarnings: -\n"
    )
    assert sandshift(*words, "--json").document == document


def test_a_report_that_is_not_there_says_where_else_to_look(sandshift: Sandshift, farm: Farm) -> None:
    ended = sandshift("report", "--config", farm.config("a"), "move-1")
    assert ended.status == 1
    assert ended.stderr.startswith("sandshift: host a has no report of session 'move-1'; ask the other host")
    assert farm.world.shims == {}


class Terminal(io.StringIO):
    """A person at a terminal who types this."""

    def isatty(self) -> bool:
        return True


def test_a_person_must_type_the_session_id_to_force(
    sandshift: Sandshift, farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.run_sandbox()._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.RELEASED)
    words = ("session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1")
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    refused = sandshift(*words)
    assert refused.status == 1
    assert "DANGER: the destination may be running this guest" in refused.stderr
    assert refused.stderr.endswith("sandshift: that is not the session id: nothing was done\n")
    assert farm.world.called == []
    monkeypatch.setattr("sys.stdin", Terminal("move-1\n"))
    forced = sandshift(*words)
    assert forced.status == 0
    assert forced.stdout == "s-1 runs on host a: forced, and written down in session move-1\n"
    assert farm.world.called == ["a ForceResume move-1 RELEASED"]


class Interrupting(Terminal):
    """Ctrl-C comes while they look at the question; what they type afterwards is the right answer."""

    def readline(self, size: int | None = -1, /) -> str:
        signal.raise_signal(signal.SIGINT)
        return super().readline(-1 if size is None else size)


def test_ctrl_c_at_the_question_of_force_resume_sends_nothing(
    sandshift: Sandshift, farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.run_sandbox()._begin("move-1", Side.SOURCE, "TransferCompleted", Cell.RELEASED)
    monkeypatch.setattr("sys.stdin", Interrupting("move-1\n"))
    # Tests that run in the background of a script are born with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = sandshift(
            "session", "force-resume", "--config", farm.config("a"), SANDBOX, "--session", "move-1"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == 130
    assert ended.stderr.endswith("sandshift: interrupted\n")
    assert farm.world.called == []


def test_verbose_shows_the_end_of_the_log_of_the_shim_that_failed(sandshift: Sandshift, farm: Farm) -> None:
    farm.run_sandbox()
    log = farm.world.host("b").config.sandbox_run_dir("default", SANDBOX) / "shim.log"

    def fail() -> None:
        log.write_text("a traceback of the shim\nKeyError: 7\n")
        raise ttrpc.StatusError(ttrpc.Code.UNKNOWN, "an internal error")

    farm.world.fail("destination PrepareSandbox", fail)
    ended = sandshift("migrate", "--config", farm.config("a"), SANDBOX, "--to", farm.config("b"), "--verbose")
    assert ended.status == 1
    assert (
        f"the shim of sandbox s-1 on host b met what nobody foresaw (an internal error): its log {log}"
        " ends with 'KeyError: 7', and --verbose shows more\n"
    ) in ended.stderr
    assert "a traceback of the shim" in ended.stderr
