"""The set-up that ./run does: what it refuses, and how it finds Debian's backports without naming a host."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: str, os_release: Path | None = None, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if os_release:
        environment["SANDSHIFT_OS_RELEASE"] = str(os_release)
    if path:
        environment["PATH"] = path
    return subprocess.run(
        [ROOT / "run", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def os_release(folder: Path, **values: str) -> Path:
    file = folder / "os-release"
    file.write_text("".join(f'{key}="{value}"\n' for key, value in values.items()))
    return file


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ID": "fedora", "VERSION_ID": "42"}, "fedora 42"),
        ({"ID": "debian", "VERSION_ID": "11", "VERSION_CODENAME": "bullseye"}, "debian 11"),
        ({"ID": "ubuntu", "VERSION_ID": "24.04", "VERSION_CODENAME": "noble"}, "ubuntu 24.04"),
        ({"NAME": "Something"}, "unknown 0"),
    ],
    ids=["fedora", "debian-11", "ubuntu-24.04", "nameless"],
)
def test_an_unsupported_distribution_is_one_line_that_names_the_supported_ones(
    tmp_path: Path, values: dict[str, str], named: str
) -> None:
    answer = run("demo", os_release=os_release(tmp_path, **values))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr == (
        f"run: {named} is not supported; supported are Debian 12 (with backports), Debian 13 and newer, "
        "Ubuntu 25.04 and newer\n"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"ID": "debian", "VERSION_ID": "12", "VERSION_CODENAME": "bookworm"},
        {"ID": "debian", "VERSION_ID": "13", "VERSION_CODENAME": "trixie"},
        {"ID": "debian", "VERSION_CODENAME": "forky"},
        {"ID": "ubuntu", "VERSION_ID": "25.04", "VERSION_CODENAME": "plucky"},
        {"ID": "ubuntu", "VERSION_ID": "26.10"},
    ],
    ids=["debian-12", "debian-13", "debian-testing", "ubuntu-25.04", "ubuntu-26.10"],
)
def test_the_supported_distributions_pass(tmp_path: Path, values: dict[str, str]) -> None:
    script = 'command=test; . scripts/setup/say.sh; . scripts/setup/system.sh; distribution; echo "$distribution_id"'
    answer = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=ROOT,
        env={**os.environ, "SANDSHIFT_OS_RELEASE": str(os_release(tmp_path, **values))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.stdout, answer.stderr) == (values["ID"] + "\n", "")


def test_an_unknown_command_is_one_line_that_says_where_the_known_ones_are() -> None:
    answer = run("frobnicate")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == 'run: there is no command "frobnicate"; ./run help lists them\n'


def test_an_unknown_bench_lists_the_benches() -> None:
    answer = run("bench", "nothing")
    assert answer.returncode == 1
    assert answer.stderr.startswith('run: there is no bench "nothing"; there are:')


def test_help_goes_to_stdout_and_names_every_command() -> None:
    answer = run("help")
    assert answer.returncode == 0
    for command in (
        "demo",
        "test fast",
        "test full",
        "bench NAME",
        "fuzz ttrpc",
        "explore",
        "sim",
        "conformance",
        "faults",
    ):
        assert f"\n  {command}" in answer.stdout


def backports(kind: str, source: str, folder: Path) -> tuple[int, str]:
    file = folder / "source"
    file.write_text(source)
    answer = subprocess.run(
        [
            "awk",
            "-v",
            "from=bookworm",
            "-v",
            "to=bookworm-backports",
            "-f",
            ROOT / "scripts" / "setup" / f"suite-{kind}.awk",
            file,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stderr == ""
    return answer.returncode, answer.stdout


def test_backports_keep_the_machines_own_mirror_and_key_of_a_deb822_source(tmp_path: Path) -> None:
    source = """\
# a comment
Types: deb deb-src
# another
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://mirror.example/debian
 http://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
Trusted: yes
"""
    assert backports("deb822", source, tmp_path) == (
        0,
        """\
Types: deb
Suites: bookworm-backports
Components: main
URIs: http://mirror.example/debian
 http://second.example/debian
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
Trusted: yes
""",
    )


@pytest.mark.parametrize(
    "source",
    [
        "Types: deb\nURIs: http://a.example\nSuites: bookworm\nComponents: main\nEnabled: no\n",
        "Types: deb-src\nURIs: http://a.example\nSuites: bookworm\nComponents: main\n",
        "Types: deb\nURIs: http://a.example\nSuites: bookworm-updates\nComponents: main\n",
        "Types: deb\nURIs: http://a.example\nSuites: bookworm\nComponents: stable\n",
        "",
    ],
    ids=["disabled", "source-only", "updates-only", "third-party", "empty"],
)
def test_a_deb822_source_without_debian_bookworm_gives_no_backports(tmp_path: Path, source: str) -> None:
    assert backports("deb822", source, tmp_path) == (1, "")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "deb http://m.example/debian bookworm main",
            "deb http://m.example/debian bookworm-backports main\n",
        ),
        (
            "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm contrib main",
            "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm-backports main\n",
        ),
    ],
    ids=["plain", "with-options"],
)
def test_backports_keep_the_machines_own_mirror_of_a_one_line_source(
    tmp_path: Path, line: str, wanted: str
) -> None:
    source = f"# deb http://commented.example bookworm main\ndeb-src http://s.example bookworm main\n{line}\n"
    assert backports("oneline", source, tmp_path) == (0, wanted)


def test_a_one_line_source_of_another_suite_gives_no_backports(tmp_path: Path) -> None:
    assert backports("oneline", "deb http://m.example/debian bookworm-security main\n", tmp_path) == (1, "")


def sourced(script: str) -> subprocess.CompletedProcess[str]:
    """A few lines of sh with the set-up's functions at hand."""
    return subprocess.run(
        ["sh", "-eu", "-c", f"command=demo; . scripts/setup/say.sh; . scripts/setup/system.sh; {script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_with_json_a_set_up_that_refuses_is_one_object(tmp_path: Path) -> None:
    answer = run("demo", "--json", os_release=os_release(tmp_path, ID="fedora", VERSION_ID="42"))
    assert answer.returncode == 1
    told = json.loads(answer.stdout)
    assert (told["ok"], told["code"]) == (False, "FAILED_PRECONDITION")
    assert told["error"].startswith("fedora 42 is not supported")
    assert answer.stderr == f"run: {told['error']}\n"


def test_what_a_set_up_quotes_is_json_all_the_same() -> None:
    answer = sourced("json=yes; exec 3>&1; die 'it said \"no\\way\"'")
    assert json.loads(answer.stdout)["error"] == 'it said "no\\way"'


def test_a_folder_that_cannot_be_written_is_one_line_with_its_remedy() -> None:
    answer = sourced("STATE=/proc/not/writable; need fast")
    assert answer.returncode == 1
    assert answer.stderr == (
        "run: /proc/not/writable cannot be written here (did root make it?): run this as root,"
        f" or remove {ROOT}//proc/not/writable\n"
    )


def test_a_full_disk_is_one_line_with_both_numbers(tmp_path: Path) -> None:
    answer = sourced(f"room_for {tmp_path}/not/there/yet 999999999 'the guest image'")
    assert answer.returncode == 1
    assert answer.stderr.startswith(
        f"run: the guest image needs 999999999 MiB under {tmp_path}/not/there/yet and "
    )
    assert answer.stderr.endswith(" MiB are free: make room there\n")
    assert answer.stderr.count("\n") == 1


def test_a_failing_program_of_the_set_up_is_one_line_with_its_last_complaint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "sh -c 'echo reading; echo E: no route to the mirror; echo bye; exit 7'"
    answer = sourced(f'quietly {log} "apt-get update failed" {program}')
    assert answer.returncode == 1
    assert answer.stderr == f'run: apt-get update failed: "E: no route to the mirror" (all of it: {log})\n'


def test_only_packages_whose_program_or_file_is_missing_are_asked_for() -> None:
    answer = sourced("missing_packages sh:dash no-such-program:one /no/such/file:two /etc/passwd:base-passwd")
    assert answer.stdout == "one two "


@pytest.mark.parametrize(
    ("have", "want", "is_enough"),
    [
        ("12", "12", True),
        ("11", "12", False),
        ("25.04", "25.04", True),
        ("24.10", "25.04", False),
        ("26.04", "25.04", True),
    ],
)
def test_versions_are_compared_by_number(have: str, want: str, is_enough: bool) -> None:
    assert (sourced(f"version_at_least {have} {want}").returncode == 0) is is_enough


def test_a_second_set_up_waits_for_the_first() -> None:
    (ROOT / ".cache" / "setup").mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        ["flock", ROOT / ".cache" / "setup" / "lock", "sh", "-c", "echo held; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        waiting = subprocess.Popen(
            [ROOT / "run", "shell", "-c", "echo in"],
            env={**os.environ, "SHELL": "/bin/sh"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == "run: another ./run is installing something here: waiting\n"
        holder.stdin.close()
        out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (0, "in\n")
