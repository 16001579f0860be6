"""Pods as kubelet makes them, on containerd 2.1 or newer with our shim as the sandboxer."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandshift.net import run_in
from tests.containerd.cri import Cri, pod_config
from tests.containerd.daemon import Containerd, eventually, kill_process
from tests.containerd.pod import NOT_READY, READY, RUNNING, Pod
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]


@pytest.fixture
def make_pod(pods: Containerd, cri: Cri) -> Iterator[Callable[..., Pod]]:
    made: list[Pod] = []

    def make(name: str, **more: Any) -> Pod:
        pod = Pod(pods, cri, pod_config(name, logs=pods.folder / "logs", **more))
        made.append(pod)
        pod.begin()
        return pod

    yield make
    for pod in made:
        pod.end()


def test_containers_of_a_pod_share_its_name_its_network_and_its_files(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod(
        "share",
        hostname="share-host",
        dns_config={"servers": ["192.0.2.53"], "searches": ["svc.local"], "options": ["ndots:5"]},
        linux={"sysctls": {"net.ipv4.ip_unprivileged_port_start": "80"}},
    )
    web = pod.run(
        "web", "sh", "-c", "mkdir /tmp/www; echo hello > /tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www"
    )
    look = pod.run("look", "sleep", "1000")
    assert pod.ask(look, "hostname").stdout == b"share-host\n"
    assert pod.ask(look, "cat", "/etc/resolv.conf").stdout == (
        b"search svc.local\nnameserver 192.0.2.53\noptions ndots:5\n"
    )
    assert f"{pod.address()} share-host\n".encode() in pod.ask(look, "cat", "/etc/hosts").stdout
    assert pod.ask(look, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").stdout == b"80\n"
    assert eventually(lambda: pod.ask(look, "wget", "-qO-", "http://127.0.0.1/").stdout) == b"hello\n"
    assert b"tmpfs" in pod.ask(look, "sh", "-c", "grep ' /dev/shm ' /proc/mounts").stdout
    pod.ask(look, "sh", "-c", "echo seen > /dev/shm/note")
    assert pod.ask(web, "cat", "/dev/shm/note").stdout == b"seen\n"
    assert pod.ask(look, "ls", "/tmp").stdout == b""


def test_the_pods_address_is_the_guests_and_answers_from_the_host(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod("net")
    pod.run("echo", "sh", "-c", "while true; do echo reached | nc -l -p 7000; done")

    def reached() -> bytes:
        connection = run_in(pod.daemon.network_namespace, socket.socket)
        with connection:
            connection.settimeout(2)
            try:
                connection.connect((pod.address(), 7000))
                return connection.recv(100)
            except OSError:
                return b""

    assert eventually(reached) == b"reached\n"


UNIQUE = (
    "cat /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address; hostname; head -c 32 /dev/urandom | md5sum | cut -c 1-32; "
    "ip -o -4 address show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'"
)


def test_two_pods_of_one_template_share_nothing_that_must_be_unique(make_pod: Callable[..., Pod]) -> None:
    """Boot id, card, hostname, randomness and address; the machine id is compared in tests/image/test_guest_vm.py."""
    pods = [make_pod("twin-one"), make_pod("twin-two")]
    seen = [pod.ask(pod.run("look", "sleep", "1000"), "sh", "-c", UNIQUE).stdout.split() for pod in pods]
    assert [len(words) for words in seen] == [5, 5]
    assert [words[4].decode() for words in seen] == [pod.address() for pod in pods]
    assert not set(seen[0]) & set(seen[1])


def test_logs_exit_codes_and_terminals(make_pod: Callable[..., Pod]) -> None:
    pod = make_pod("logs")
    both = pod.run("both", "sh", "-c", "echo one; echo two >&2; exit 42")
    assert pod.ended(both) == 42
    assert sorted(pod.log("both")) == [("stderr", "two"), ("stdout", "one")]
    terminal = pod.run("terminal", "sh", "-c", "tty", tty=True)
    assert pod.ended(terminal) == 0
    assert [text.rstrip("\r") for _, text in pod.log("terminal")] == ["/dev/pts/0"]
    keeps = pod.run("keeps", "sleep", "1000")
    answer = pod.ask(keeps, "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 5)
    pod.cri.stop_container(container_id=keeps, timeout=1)
    assert pod.status(keeps).exit_code in {137, 143}


def test_a_pod_gets_a_machine_for_what_its_containers_may_use(make_pod: Callable[..., Pod]) -> None:
    resources = {"memory_limit_in_bytes": 200 << 20, "cpu_quota": 150_000, "cpu_period": 100_000}
    pod = make_pod("size", linux={"resources": resources, "overhead": {"memory_limit_in_bytes": 100 << 20}})
    arguments = [part.decode() for part in Path(f"/proc/{pod.vm_pid()}/cmdline").read_bytes().split(b"\0")]
    assert arguments[arguments.index("-m") + 1] == f"{320 << 10}k"
    assert arguments[arguments.index("-smp") + 1] == "cpus=2"


def test_a_killed_containerd_finds_its_pods_ready_and_the_exit_codes_of_what_ended_meanwhile(
    make_pod: Callable[..., Pod],
) -> None:
    pod = make_pod("survives")
    stays = pod.run("stays", "sleep", "1000")
    ends = pod.run("ends", "sh", "-c", "while ! test -e /dev/shm/end; do sleep 0.1; done; exit 9")
    pod.ask(stays, "sh", "-c", "(sleep 2; touch /dev/shm/end) >/dev/null 2>&1 &")
    pod.daemon.kill()
    pod.daemon.start()
    eventually(lambda: pod.state() == READY)
    assert pod.ended(ends) == 9
    assert pod.status(stays).state == RUNNING
    assert pod.ask(stays, "echo", "here").stdout == b"here\n"
    later = pod.run("later", "sh", "-c", "exit 3")
    assert pod.ended(later) == 3


def test_a_killed_shim_takes_its_machine_along_and_the_pod_can_be_removed(
    make_pod: Callable[..., Pod],
) -> None:
    pod = make_pod("killed")
    container = pod.run("one", "sleep", "1000")
    machine = pod.vm_pid()
    kill_process(pod.shim_pid())
    eventually(lambda: pod.state() == NOT_READY)
    assert pod.ended(container) == 255
    eventually(lambda: state_of(machine) in {"", "Z"})
    assert not (pod.daemon.folder / "s" / "k8s.io" / pod.id / "vm").exists()


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
