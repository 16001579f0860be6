"""Two containerds in two network namespaces are two hosts: a pod of three containers moves between them by CRI."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from dataclasses import dataclass, field

import pytest

from sandshift.net import run_in
from tests.containerd.daemon import eventually
from tests.containerd.hosts import ADDRESS, DESTINATION, SOURCE, Host, migrate, open_host
from tests.containerd.network import Hosts
from tests.containerd.pod import NOT_READY, READY, RUNNING, Pod
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(400), needs_root]

PORT = 7000
COUNT = "n=0; while true; do n=$((n+1)); echo line $n; test $((n % 50)) = 0 && usleep 20000; done"
UNTIL_STOPPED = (
    "n=0; until test -e /tmp/stop; do n=$((n+1)); echo line $n; usleep 20000; done; echo stopped; exit 21"
)
MOVE_S = 120


@dataclass
class Caller:
    """A client that says numbers over one TCP connection and hears each again, from before the move to after it."""

    namespace: str
    heard: list[bytes] = field(default_factory=list)
    failure: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        connection = eventually(self._connected)
        self._thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
        self._thread.start()
        eventually(lambda: len(self.heard) > 3)

    def _connected(self) -> socket.socket | None:
        connection = run_in(self.namespace, socket.socket)
        connection.settimeout(30)
        try:
            connection.connect((ADDRESS, PORT))
        except OSError:
            connection.close()
            return None
        return connection

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rwb") as stream:
                number = 0
                while not self._stop.wait(0.02):
                    number += 1
                    stream.write(b"%d\n" % number)
                    stream.flush()
                    self.heard.append(stream.readline())
        except OSError as error:
            self.failure = str(error)

    def end(self) -> list[int]:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(40)
        return [int(line) for line in self.heard]


def exec_session(pod: Pod, container: str, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        pod.daemon.ctr_command("task", "exec", "--exec-id", "e1", container, *command),
        env=pod.daemon.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def moved(source: Pod, destination: Pod, twins: dict[str, str]) -> None:
    """The whole move. `twins`: containers of the source and those at the destination that stand for them."""
    process = migrate(source, destination)
    try:
        eventually(
            lambda: destination.info().get("migration.state") == "DestinationImported" or process.poll()
        )
        if process.poll() is None:
            for twin in twins.values():
                destination.cri.start_container(container_id=twin)
        said = process.communicate(timeout=MOVE_S)
    finally:
        process.kill()
    assert process.returncode == 0, f"{said}\n{source.daemon.log()[-3000:]}\n{destination.daemon.shim_logs()}"


def counted(texts: list[str]) -> list[int]:
    return [int(found[1]) for text in texts if (found := re.fullmatch(r"line (\d+)", text))]


def test_a_pod_of_three_containers_moves_while_a_client_talks_to_it(a: Host, b: Host, network: Hosts) -> None:
    source = a.pod("shop")
    names = {
        "server": source.run("server", "nc", "-ll", "-p", str(PORT), "-e", "cat"),
        "count": source.run("count", "sh", "-c", COUNT),
        "idle": source.run("idle", "sh", "-c", "trap 'exit 33' TERM; while true; do sleep 1; done"),
    }
    source.ask(names["idle"], "sh", "-c", "echo kept > /tmp/note")
    session = exec_session(source, names["idle"], "sh", "-c", UNTIL_STOPPED)
    caller = Caller(network.client)
    caller.begin()
    eventually(lambda: len(source.log("count")) > 1000)

    destination = b.pod("shop", annotations=DESTINATION)
    assert destination.state() == READY
    twins = {
        container: destination.make(name, "true", annotations={SOURCE: container})
        for name, container in names.items()
    }
    moved(source, destination, twins)

    before = len(caller.heard)
    eventually(lambda: len(caller.heard) > before + 20)
    heard = caller.end()
    assert caller.failure == ""
    assert heard == list(range(1, len(heard) + 1))

    there = {name: twins[container] for name, container in names.items()}
    assert destination.ask(there["idle"], "cat", "/tmp/note").stdout == b"kept\n"
    eventually(lambda: len(destination.log("count")) > 1000)
    assert {destination.status(twin).state for twin in twins.values()} == {RUNNING}
    destination.daemon.ctr("task", "metrics", there["count"])

    for container in names.values():
        assert source.ended(container) == 255
    said = session.communicate(timeout=30)[0]
    assert session.returncode == 255
    goes_on = exec_session(destination, there["idle"], "true")
    # Its output goes on to whoever asks for the session by its id; what it runs was decided on the source.
    destination.ask(there["idle"], "touch", "/tmp/stop")
    said += goes_on.communicate(timeout=30)[0]
    assert goes_on.returncode == 21
    *numbered, last = said.decode().splitlines()
    assert last == "stopped"
    assert numbered == [f"line {number}" for number in range(1, len(numbered) + 1)]
    eventually(lambda: source.state() == NOT_READY)
    first, second = ([text for _, text in pod.log("count")] for pod in (source, destination))
    lines = joined(first, second)
    assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]

    destination.cri.stop_container(container_id=there["idle"], timeout=10)
    assert destination.status(there["idle"]).exit_code == 33
    source.end()
    destination.end()
    assert source.daemon.ctr("task", "ls").stdout.split()[3:] == []


def joined(first: list[str], second: list[str]) -> list[str]:
    """What both said, a line that was cut in two made whole again: each containerd ends the last that it has."""
    if second and not (
        first and re.fullmatch(r"line \d+", first[-1]) and re.fullmatch(r"line \d+", second[0])
    ):
        return [*first[:-1], first[-1] + second[0], *second[1:]]
    if int(second[0].split()[1]) != int(first[-1].split()[1]) + 1:
        return [*first[:-1], first[-1] + second[0], *second[1:]]
    return first + second


def test_another_address_at_the_destination_is_a_blocker_that_names_both(a: Host, network: Hosts) -> None:
    with open_host("other", network.b, network.address_b, "10.78.0.51") as other:
        source, destination = a.pod("stays"), other.pod("stays", annotations=DESTINATION)
        process = migrate(source, destination)
        said = process.communicate(timeout=MOVE_S)[1].decode()
        assert process.returncode == 1
        assert f"the guest has {ADDRESS}/24, this host's network gives 10.78.0.51/24" in said
        assert source.state() == READY
        destination.end()
        source.end()
