"""From what containerd says of a pod to a sandbox, and how the Sandbox service takes it and tells of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from sandshift.errors import NotFound, NotSupported, Rejected
from sandshift.network_namespace import run_in_file
from sandshift.sandbox.model import NetworkCard
from sandshift.shim import log as shim_log
from sandshift.shim.creation import parse_creation
from sandshift.shim.parts import LateParts, Parts, PodShare, Wish
from sandshift.shim.pod import hosts_file, machine_size, pod_of_cri, pod_of_spec
from sandshift.shim.usage import Usage, usage_of
from sandshift.wire.containerd import cgroup_metrics_pb2, pod_pb2, sandbox_pb2
from sandshift.wire.sandshift import shim_pb2, state_pb2
from tests.shim.house import SANDBOX, FakeHost

MIB = 1 << 20
CARD = NetworkCard("net0", mac="52:54:00:ab:cd:ef", addresses=("10.77.0.2/24",))


def linux(**resources: int) -> pod_pb2.LinuxPodSandboxConfig:
    return pod_pb2.LinuxPodSandboxConfig(resources=pod_pb2.LinuxContainerResources(**resources))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (linux(), (0, 0)),
        (linux(memory_limit_in_bytes=64 * MIB), (192 * MIB, 0)),
        (linux(memory_limit_in_bytes=65 * MIB), (256 * MIB, 0)),
        (linux(cpu_quota=150_000, cpu_period=100_000), (0, 2)),
        (linux(cpu_quota=50_000), (0, 1)),
        (linux(cpu_quota=-1, memory_limit_in_bytes=-1), (0, 0)),
    ],
)
def test_a_machine_has_room_for_what_the_containers_may_use(
    config: pod_pb2.LinuxPodSandboxConfig, size: tuple[int, int]
) -> None:
    assert machine_size(config) == size


def test_an_overhead_takes_the_place_of_our_own_estimate() -> None:
    config = linux(memory_limit_in_bytes=200 * MIB, cpu_quota=100_000)
    config.overhead.memory_limit_in_bytes = 56 * MIB
    config.overhead.cpu_quota = 20_000
    assert machine_size(config) == (256 * MIB, 2)


def test_a_pod_is_what_cri_says() -> None:
    config = pod_pb2.PodSandboxConfig(
        metadata={"name": "shop"},
        dns_config={"servers": ["9.9.9.9"], "searches": ["a.b", "c"], "options": ["ndots:5"]},
        annotations={"one": "1", "two": "2"},
        linux={"sysctls": {"net.core.somaxconn": "9"}},
    )
    pod = pod_of_cri(
        "id1", config, network_namespace="/run/netns/x", annotations={"two": "3"}, host_resolv_conf=b"host"
    )
    assert (pod.model.sandbox_id, pod.model.hostname) == ("id1", "shop")
    assert pod.model.annotations == {"one": "1", "two": "3"}
    assert pod.wish == Wish(nameservers=("9.9.9.9",), network_namespace="/run/netns/x")
    assert pod.share == PodShare(
        resolv_conf=b"search a.b c\nnameserver 9.9.9.9\noptions ndots:5\n",
        sysctls={"net.core.somaxconn": "9"},
    )


def test_a_pod_without_dns_has_the_hosts() -> None:
    pod = pod_of_cri(
        "id1",
        pod_pb2.PodSandboxConfig(),
        network_namespace="/run/netns/x",
        annotations={},
        host_resolv_conf=b"host",
    )
    assert pod.share.resolv_conf == b"host"


def test_a_pod_of_the_hosts_network_is_refused_by_its_name() -> None:
    config = pod_pb2.PodSandboxConfig(metadata={"name": "shop"})
    with pytest.raises(
        NotSupported, match=r"pod shop: the host's network cannot be had in a VM: .*hostNetwork"
    ):
        pod_of_cri("id1", config, network_namespace="", annotations={}, host_resolv_conf=b"")


def test_a_container_of_the_hosts_network_is_refused_by_its_name() -> None:
    listed = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    with pytest.raises(NotSupported, match="container one: the host's network cannot be had in a VM"):
        pod_of_spec("one", {"linux": {"namespaces": listed}}, {})


@pytest.mark.parametrize(
    ("namespaces", "path"),
    [
        ([{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}], "/run/netns/x"),
        ([{"type": "network", "path": "/proc/7/ns/net"}], ""),
        ([{"type": "network"}], ""),
        ([], ""),
    ],
)
def test_a_container_that_is_run_alone_brings_its_network(
    namespaces: list[dict[str, str]], path: str
) -> None:
    pod = pod_of_spec("one", {"hostname": "h", "linux": {"namespaces": namespaces}}, {"a": "b"})
    assert (pod.model.hostname, pod.model.annotations) == ("h", {"a": "b"})
    assert pod.wish == Wish(network_namespace=path)


def test_a_pod_finds_itself_in_its_hosts_file() -> None:
    assert hosts_file("shop", (CARD,)) == (
        b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n10.77.0.2 shop\n"
    )


def creation(options: object, prefix: str = "", **more: object) -> sandbox_pb2.CreateSandboxRequest:
    message = AnyMessage(type_url=prefix + options.DESCRIPTOR.full_name, value=options.SerializeToString())
    return sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX, options=message, **more)


@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/"])
def test_types_come_bare_from_containerd_and_with_a_prefix_from_protobuf(prefix: str) -> None:
    cri = parse_creation(creation(pod_pb2.PodSandboxConfig(hostname="a"), prefix, netns_path="/run/netns/x"))
    ours = parse_creation(creation(shim_pb2.SandboxOptions(hostname="b"), prefix))
    assert (cri.model.hostname, ours.model.hostname) == ("a", "b")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            creation(state_pb2.NetworkCard()),
            "is neither sandshift.v1.SandboxOptions nor runtime.v1.PodSandboxConfig",
        ),
        (
            creation(
                shim_pb2.SandboxOptions(network_cards=[state_pb2.NetworkCard(id="n")]),
                netns_path="/run/netns/x",
            ),
            "options.network_cards and netns_path are both given",
        ),
        (
            sandbox_pb2.CreateSandboxRequest(
                options=AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff")
            ),
            "options: cannot be read as runtime.v1.PodSandboxConfig",
        ),
    ],
)
def test_what_cannot_be_a_sandbox_is_refused_by_field(
    request_: sandbox_pb2.CreateSandboxRequest, message: str
) -> None:
    with pytest.raises(Rejected, match=message):
        parse_creation(request_)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[FakeHost]:
    host = FakeHost(tmp_path, "host")
    await host.start()
    yield host
    await host.stop()
    for process in list(host.world.processes.values()):
        process.die()


async def test_a_pods_guest_has_the_cards_of_its_network(host: FakeHost) -> None:
    host.taps.pods["/run/netns/x"] = (CARD,)
    client = await host.client()
    await client.sandbox.create_sandbox(
        creation(pod_pb2.PodSandboxConfig(hostname="shop"), netns_path="/run/netns/x")
    )
    await client.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))
    status = await client.shim.status(shim_pb2.StatusRequest())
    assert [card.addresses for card in status.network_cards] == [["10.77.0.2/24"]]
    assert status.life == "ready"


async def test_a_pod_with_the_annotation_waits_to_receive(host: FakeHost) -> None:
    client = await host.client()
    annotations = {"io.sandshift.migration.destination": "true"}
    await client.sandbox.create_sandbox(
        creation(pod_pb2.PodSandboxConfig(annotations=annotations), netns_path="/run/netns/x")
    )
    await client.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))
    request = sandbox_pb2.SandboxStatusRequest(sandbox_id=SANDBOX)
    status = await client.sandbox.sandbox_status(request)
    assert (status.state, status.info["sandshift.life"]) == ("SANDBOX_READY", "awaiting")
    metrics = await client.sandbox.sandbox_metrics(sandbox_pb2.SandboxMetricsRequest(sandbox_id=SANDBOX))
    assert metrics.metrics.id == SANDBOX
    found = cgroup_metrics_pb2.Metrics.FromString(metrics.metrics.data.value)
    assert metrics.metrics.data.type_url == "io.containerd.cgroups.v2.Metrics"
    assert found.memory.usage == 0
    with pytest.raises(ttrpc.StatusError, match="is not this shim's sandbox"):
        await client.sandbox.sandbox_metrics(sandbox_pb2.SandboxMetricsRequest(sandbox_id="other"))


def test_a_process_uses_memory_and_one_that_is_gone_nothing() -> None:
    mine = usage_of(os.getpid())
    assert mine.resident_bytes > MIB
    assert mine.threads >= 1
    assert usage_of(-1) == Usage()


def test_parts_are_loaded_once_and_late() -> None:
    loaded: list[str] = []

    def load() -> Parts:
        loaded.append("parts")
        return Parts(vmm=None, taps=None, machines=None, connect_guest=None)  # type: ignore[arg-type]

    parts = LateParts(load)
    assert parts.clock_us() > 0
    assert loaded == []
    assert (parts.packer, parts.arrival_pause_s) == (None, 0.5)
    assert loaded == ["parts"]


def test_the_log_goes_to_containerds_fifo_while_it_reads_and_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="No such device"):
        shim_log.FifoHandler(str(tmp_path / "log"))
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    handler = shim_log.FifoHandler(str(tmp_path / "log"))
    record = shim_log.logging.LogRecord("x", 20, "", 0, "said %d", (7,), None)
    handler.emit(record)
    assert os.read(reader, 100) == b"said 7\n"
    os.close(reader)
    handler.emit(record)


def test_a_namespace_without_a_file_is_said_so() -> None:
    with pytest.raises(NotFound, match="network namespace /run/netns/nope does not exist"):
        run_in_file("/run/netns/nope", os.getpid)
    assert run_in_file("", os.getpid) == os.getpid()


async def test_what_a_pod_shares_is_known_to_the_next_shim(host: FakeHost) -> None:
    client = await host.client()
    config = pod_pb2.PodSandboxConfig(
        dns_config={"servers": ["9.9.9.9"]}, linux={"sysctls": {"net.core.somaxconn": "9"}}
    )
    await client.sandbox.create_sandbox(creation(config, netns_path="/run/netns/x"))
    await host.stop()
    await host.start()
    assert host.server is not None
    assert host.server.sandbox.pod_share == PodShare(
        resolv_conf=b"nameserver 9.9.9.9\n", sysctls={"net.core.somaxconn": "9"}
    )
