"""Command lines that are wrong: one line that names the option, the value and what is allowed; status 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandshift import VERSION
from sandshift.cli.main import COMMANDS
from tests.cli.conftest import Sandshift


def test_the_help_lists_every_command_and_loads_none_of_them() -> None:
    script = (
        "import sys\nfrom sandshift.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'ttrpc', 'google', 'rich', 'asyncio', 'msgspec'} & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_has_help(sandshift: Sandshift, command: str) -> None:
    ended = sandshift(command, "--help")
    assert ended.status == 0
    assert ended.stdout.startswith(f"Usage: sandshift {command}")


WRONG = [
    (["fly"], "No such command 'fly'."),
    (["run", "--memory", "10"], "Invalid value for '--memory': 10 is outside 96.0 MiB to 1.0 TiB"),
    (
        ["migrate", "s", "--to", "EMPTY", "--timeout", "nan"],
        "Invalid value for '--timeout': nan is not a finite number",
    ),
    (["migrate", "s", "--to", "EMPTY", "--wait-for-containers", "nan"], "nan is not a finite number"),
    (["migrate", "s", "--to", "EMPTY", "--throttle-scale", "nan"], "nan is not a finite number"),
    (["conformance", "--source", "a", "--destination", "b", "--limit", "=5"], "'=5' is not NAME=NUMBER"),
    (
        ["conformance", "--source", "a", "--destination", "b", "--limit", "stall_s=inf"],
        "'stall_s=inf' is not",
    ),
    (["run", "--memory", "lots"], "'--memory': 'lots' is not a size: write 512, 512M or 1.5G"),
    (["run", "--vcpus", "0"], "Invalid value for '--vcpus': 0 is not in the range 1<=x<=64."),
    (["run", "--id", "a/b"], "Invalid value for --id: 'a/b' must be letters and digits"),
    (["run", "--id", ""], "Invalid value for --id: is empty"),
    (["run", "--address", "10.9.0.50"], "'--address': 10.9.0.50 has no prefix length: write 10.9.0.50/24"),
    (["run", "--address", "10.9.0/24"], "'--address': 10.9.0/24 is not an address with prefix length"),
    (["run", "--gateway", "10.9.0.1"], "--gateway needs --address"),
    (
        ["run", "--address", "10.9.0.50/24", "--gateway", "10.8.0.1"],
        "Invalid value for --gateway: 10.8.0.1 is in the network of none of 10.9.0.50/24",
    ),
    (["run", "--mac", "52:54:00:5a:00:50"], "--mac and --mtu need --address"),
    (["run", "--address", "10.9.0.5/24", "--mac", "53:54:00:5a:00:50"], "is a group address"),
    (["run", "--address", "10.9.0.5/24", "--mac", "nonsense"], "nonsense is not a MAC address"),
    (["run", "--env", "A", "--", "true"], "'--env': 'A' is not NAME=VALUE"),
    (["run", "--cwd", "/"], "--env and --cwd are for the process: give its command after --"),
    (["run", "--config", "/not/there"], "'--config': /not/there is not a file"),
    (["ls", "--namespace", "a b"], "Invalid value for --namespace: 'a b' must be letters and digits"),
    (["stop"], "Missing argument 'SANDBOX...'."),
    (["stop", "s-1", "--timeout", "-1"], "'--timeout': -1 is not in the range 0<=x<=3600."),
    (["logs", "s-1", "--stream", "stdin"], "'--stream': 'stdin' is not one of"),
    (["migrate", "s-1"], "Missing option '--to'."),
    (["migrate", "s-1", "--to", __file__, "--session", ""], "session_id"),
    (
        ["migrate", "s-1", "--to", __file__, "--timeout", "0"],
        "'--timeout': 0.0 is not in the range 0<x<=86400.0.",
    ),
    (["migrate", "s-1", "--to", __file__, "--throttle-scale", "101"], "101.0 is not in the range 1<=x<=100."),
    (
        ["migrate", "s-1", "--to", "EMPTY", "--target-passes", "5", "--max-passes", "3"],
        "--target-passes 5 is greater than --max-passes 3",
    ),
    (
        ["migrate", "s-1", "--to", "EMPTY", "--no-throttle", "--throttle-min", "10"],
        "--no-throttle contradicts the other --throttle options",
    ),
    (["session", "force-resume", "s-1"], "Missing option '--session'."),
    (["process", "run", "s-1"], "Missing argument '-- COMMAND...'."),
    (["report"], "Missing argument 'SESSION'."),
    (["image", "build", "--sources", "/not/there"], "'--sources': /not/there is not a file"),
    (["ls", "--config", "x" * 5000], "cannot be looked at: File name too long"),
    (["run", "--memory", "9" * 400], "'--memory': a number of 400 digits is too large for a size"),
    (["logs", "s-1", "\udcff"], "word 3 of the command line, '\ufffd', is not UTF-8"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words[:3]) for words, _ in WRONG])
def test_a_wrong_command_line_is_one_line_and_status_2(
    sandshift: Sandshift, tmp_path: Path, words: list[str], message: str
) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    ended = sandshift(*(str(empty) if word == "EMPTY" else word for word in words))
    assert ended.status == 2
    assert message in ended.stderr
    assert ended.stderr.startswith("sandshift: ")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_wrong_command_line_with_json_is_also_one_document(sandshift: Sandshift) -> None:
    ended = sandshift("run", "--json", "--vcpus", "0")
    assert ended.status == 2
    assert json.loads(ended.stdout) == {
        "error": "Invalid value for '--vcpus': 0 is not in the range 1<=x<=64.",
        "code": "INVALID_ARGUMENT",
    }


def test_a_configuration_that_is_wrong_names_file_and_key(sandshift: Sandshift, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[vm]\nmemory_mib = 7\n")
    ended = sandshift("ls", "--config", path)
    assert ended.status == 1
    assert ended.stderr == f"sandshift: configuration {path}: vm.memory_mib = 7 is outside 96 to 1048576\n"


def test_a_number_that_python_does_not_read_is_a_wrong_configuration(
    sandshift: Sandshift, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[vm]\nmemory_mib = {'9' * 5000}\n")
    ended = sandshift("ls", "--config", path)
    assert ended.status == 1
    assert ended.stderr.startswith(f"sandshift: configuration {path} is not TOML: ")


def program(script: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    start = f"import sys; from sandshift.cli.main import main; {script}"
    return subprocess.run(
        [sys.executable, "-c", start], stderr=subprocess.PIPE, text=True, timeout=60, check=False, **more
    )


def test_a_stdout_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[places]\nrun_dir = "{tmp_path}/run"\n')
    with Path("/dev/full").open("w") as full:
        ended = program(f"main(['ls', '--json', '--config', {str(path)!r}])", stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "sandshift: the system: No space left on device\n"


def test_a_file_whose_name_is_no_text_is_named_all_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "SANDSHIFT_CONFIG": "/not/th\udcffere"}
    ended = program("main(['ls', '--json'])", stdout=subprocess.PIPE, env=environment)
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["error"].startswith("configuration /not/th\ufffdere cannot be read")
    assert "Traceback" not in ended.stderr


def test_an_interrupt_before_a_command_has_begun_is_a_document_too() -> None:
    script = "from sandshift.cli import main as m; m._check_words = lambda _words: (_ for _ in ()).throw(KeyboardInterrupt); m.main(['ls', '--json'])"
    ended = program(script, stdout=subprocess.PIPE)
    assert ended.returncode == 130
    assert json.loads(ended.stdout) == {"error": "interrupted", "code": "CANCELLED"}
    assert ended.stderr == "sandshift: interrupted\n"


def test_a_place_that_this_user_may_not_look_at_is_no_host_without_sandboxes(
    sandshift: Sandshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "config.toml"
    path.write_text(f'[places]\nrun_dir = "{tmp_path}/run"\n')

    def refuses(folder: object = ".") -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))  # root may look everywhere

    monkeypatch.setattr(os, "listdir", refuses)
    monkeypatch.setattr(os, "scandir", refuses)
    ended = sandshift("ls", "--config", path)
    assert ended.status == 1
    assert ended.stderr == f"sandshift: {tmp_path}/run: Permission denied\n"


def test_verbose_adds_the_whole_story(sandshift: Sandshift, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("nonsense")
    ended = sandshift("ls", "--config", path, "--verbose")
    assert ended.status == 1
    assert ended.stderr.startswith(f"sandshift: configuration {path} is not TOML")
    assert "Traceback" in ended.stderr


def test_the_version_is_told(sandshift: Sandshift) -> None:
    assert sandshift("--version").stdout == f"sandshift, version {VERSION}\n"
