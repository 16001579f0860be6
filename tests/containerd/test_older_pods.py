"""Pods on containerd 1.6 and 1.7, which have no Sandbox API: CRI's own container and the pod's, grouped into one machine."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.containerd.conftest import cabled_host, needs_kind
from tests.containerd.cri import Cri, pod_config
from tests.containerd.daemon import Containerd, eventually
from tests.containerd.pod import NOT_READY, READY, RUNNING, Pod
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

OF_THE_HOSTS_NETWORK = bytes.fromhex("4206 1204 0a02 0802")
"""linux.security_context.namespace_options.network = NODE, which our cri.proto does not name. Source: CRI's api.proto, fields 8, 2,
1 and 1."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture(params=["old", "middle"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    needs_kind(request.param)
    with cabled_host(request.param) as made:
        yield made


@pytest.fixture
def cri(daemon: Containerd) -> Iterator[Cri]:
    client = Cri(daemon.socket)
    yield client
    client.close()


def shims(daemon: Containerd) -> list[str]:
    return [path.parent.name for path in (daemon.folder / "s").glob("*/*/shim.pid")]


def test_a_pod_is_one_machine_and_outlives_its_containerd_and_one_of_the_hosts_network_is_refused(
    daemon: Containerd, cri: Cri
) -> None:
    pod = Pod(daemon, cri, pod_config("older", logs=daemon.folder / "logs", hostname="older-host"))
    pod.begin()
    assert pod.state() == READY
    stays = pod.run("stays", "sleep", "1000")
    says = pod.run("says", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert shims(daemon) == [pod.id]
    assert pod.ended(says) == 42
    assert sorted(pod.log("says")) == [("stderr", "err"), ("stdout", "out")]
    assert f"inet {pod.address()}/24".encode() in pod.ask(stays, "ip", "-o", "-4", "address").stdout
    assert pod.ask(stays, "hostname").stdout == b"older-host\n"
    machine = pod.ask(stays, "cat", BOOT_ID).stdout

    daemon.kill()
    daemon.start()
    eventually(lambda: pod.state() == READY)
    assert pod.status(stays).state == RUNNING
    answer = pod.ask(stays, "sh", "-c", f"cat {BOOT_ID}; echo err >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (machine, b"err\n", 5)

    pod.cri.stop_container(container_id=stays, timeout=1)
    assert pod.status(stays).exit_code in {137, 143}
    pod.cri.stop_pod_sandbox(pod_sandbox_id=pod.id)
    eventually(lambda: pod.state() == NOT_READY)
    pod.end()
    eventually(lambda: not shims(daemon))

    of_the_host = pod_config("host-net", logs=daemon.folder / "logs")
    of_the_host.MergeFromString(OF_THE_HOSTS_NETWORK)
    with pytest.raises(grpc.RpcError) as refused:
        cri.run_pod_sandbox(config=of_the_host, runtime_handler="sandshift")
    assert "the host's network cannot be had in a VM" in refused.value.details()
    eventually(lambda: not shims(daemon))
