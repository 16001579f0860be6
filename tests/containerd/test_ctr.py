"""`ctr` on a real containerd, old and new: without pods, one container brings its sandbox with it."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd.conftest import needs_kind
from tests.containerd.cri import IMAGE
from tests.containerd.daemon import (
    KINDS,
    RUNTIME,
    Containerd,
    containerd,
    eventually,
    short_folder,
)
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]


@pytest.fixture(scope="module", params=KINDS)
def daemon(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    needs_kind(request.param)
    with short_folder() as folder, containerd(request.param, folder) as made:
        yield made


def run(daemon: Containerd, name: str, *command: str, **more: bool) -> subprocess.CompletedProcess[bytes]:
    return daemon.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, name, *command, **more)


def leftovers(daemon: Containerd) -> list[str]:
    return [str(path) for path in (daemon.folder / "s").glob("*/*/shim.pid")]


def test_a_container_says_what_it_says_and_its_exit_code_is_ctrs(daemon: Containerd) -> None:
    ran = run(daemon, "says", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (ran.returncode, ran.stdout) == (7, b"out\n"), daemon.log()
    assert b"err\n" in ran.stderr
    eventually(lambda: not leftovers(daemon))


def test_it_runs_in_a_machine_of_its_own(daemon: Containerd) -> None:
    ran = run(daemon, "kernel", "uname", "-r")
    assert ran.stdout.decode().strip() not in {"", os.uname().release}


def test_what_is_piped_in_comes_out_again(daemon: Containerd) -> None:
    data = os.urandom(300_000).hex().encode()
    ran = daemon.ctr("run", "--rm", "--runtime", RUNTIME, IMAGE, "pipe", "cat", stdin=data)
    assert ran.stdout == data


def test_exec_kill_and_what_is_listed(daemon: Containerd) -> None:
    daemon.ctr("run", "-d", "--runtime", RUNTIME, IMAGE, "long", "sleep", "1000")
    try:
        listed = daemon.ctr("task", "ls").stdout.decode()
        assert [listed.split("\n")[1].split()[index] for index in (0, 2)] == ["long", "RUNNING"]
        said = daemon.ctr(
            "task", "exec", "--exec-id", "e1", "long", "sh", "-c", "echo in; exit 4", check=False
        )
        assert (said.returncode, said.stdout) == (4, b"in\n")
        processes = daemon.ctr("task", "exec", "--exec-id", "e2", "long", "ps").stdout
        assert b"sleep 1000" in processes
        daemon.ctr("task", "pause", "long")
        assert b"PAUSED" in daemon.ctr("task", "ls").stdout
        daemon.ctr("task", "resume", "long")
        daemon.ctr("task", "metrics", "long")
        daemon.ctr("task", "kill", "-s", "9", "long")
        eventually(lambda: b"STOPPED" in daemon.ctr("task", "ls").stdout)
    finally:
        daemon.ctr("task", "rm", "-f", "long", check=False)
        daemon.ctr("container", "rm", "long", check=False)
    eventually(lambda: not leftovers(daemon))


def test_a_terminal_is_one_inside_too_and_has_the_size_of_ours(daemon: Containerd) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "rows", "33", "cols", "101"], stdin=theirs, check=True)
    process = subprocess.Popen(
        daemon.ctr_command(
            "run",
            "--rm",
            "-t",
            "--runtime",
            RUNTIME,
            IMAGE,
            "tty",
            "sh",
            "-c",
            "tty; until stty size | grep -qx '33 101'; do sleep 0.1; done; stty size",
        ),
        env=daemon.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(4096):
                said += piece
        except OSError:
            pass  # The other end is closed: EIO. Source: pty(7).
    assert process.wait(30) == 0, said
    # ctr leaves its own terminal's OPOST on, so that the container's "\r\n" becomes "\r\r\n" with every runtime.
    assert said.replace(b"\r", b"").split(b"\n")[:2] == [b"/dev/pts/0", b"33 101"]


def test_two_run_side_by_side(daemon: Containerd) -> None:
    running = [
        subprocess.Popen(
            daemon.ctr_command(
                "run", "--rm", "--runtime", RUNTIME, IMAGE, f"side{number}", "sh", "-c", f"exit {number}"
            ),
            env=daemon.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in (11, 12)
    ]
    said = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [11, 12], said


def test_a_rootfs_is_left_as_it_was_found(daemon: Containerd, tmp_path: Path) -> None:
    run(daemon, "writes", "sh", "-c", "echo x > /etc/passwd")
    assert run(daemon, "reads", "cat", "/etc/passwd").stdout == b"root:x:0:0:root:/root:/bin/sh\n"


def test_the_hosts_network_is_refused_by_name(daemon: Containerd) -> None:
    ran = daemon.ctr(
        "run", "--rm", "--net-host", "--runtime", RUNTIME, IMAGE, "host-net", "true", check=False
    )
    assert ran.returncode == 1
    assert b"container host-net: the host's network cannot be had in a VM" in ran.stderr
    eventually(lambda: not leftovers(daemon))


@pytest.fixture
def cabled() -> Iterator[str]:
    """A network namespace with an interface, as CNI or a person leaves it."""
    name, far = (f"ctd-{end}{os.getpid()}" for end in "nf")
    for each in (name, far):
        subprocess.run(["ip", "netns", "add", each], check=True)
    for command in (
        f"link add eth0 type veth peer name far0 netns {far}",
        "address add 10.79.0.5/24 dev eth0",
        "link set eth0 up",
        "route add 10.80.0.0/16 via 10.79.0.1",
    ):
        subprocess.run(["ip", "-n", name, *command.split()], check=True)
    yield name
    for each in (name, far):
        subprocess.run(["ip", "netns", "delete", each], check=False)


def test_a_container_that_is_given_a_network_has_its_interface_in_the_machine(
    daemon: Containerd, cabled: str
) -> None:
    ran = daemon.ctr(
        "run", "--rm", "--with-ns", f"network:/run/netns/{cabled}", "--runtime", RUNTIME, IMAGE, "cabled",
        "sh", "-c", "ip -o -4 address; ip route",
    )  # fmt: skip
    said = ran.stdout.decode()
    assert "inet 10.79.0.5/24" in said
    assert "10.80.0.0/16 via 10.79.0.1 dev eth0" in said
