"""From what containerd says of a pod to a sandbox: its name, machine, network and what its containers share. Pure.

With CRI a whole PodSandboxConfig comes with CreateSandbox; without containerd's Sandbox API there is only the first
container's OCI spec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sandshift.errors import NotSupported
from sandshift.sandbox.model import NetworkCard, Sandbox
from sandshift.shim.parts import PodShare, Wish

if TYPE_CHECKING:
    from sandshift.wire.containerd import pod_pb2

MIB: Final = 1 << 20
MEMORY_STEP_BYTES: Final = 64 * MIB
"""Machines come in steps of this size, so that one template serves many pods."""
OVERHEAD_BYTES: Final = 128 * MIB
"""What the guest's kernel, agent and root file system take, where the pod's runtime class names no overhead of its own."""
DEFAULT_CPU_PERIOD_US: Final = 100_000
"""Source: CFS bandwidth control, Documentation/scheduler/sched-bwc.rst."""
HOSTNAME_CHARS_MAX: Final = 64
"""Source: linux/utsname.h, __NEW_UTS_LEN."""
HOSTS_NETWORK: Final = (
    "the host's network cannot be had in a VM: run it with a network of its own (without hostNetwork, --net-host), "
    "or with another runtime"
)
LOCALHOST: Final = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


@dataclass(frozen=True, slots=True)
class Pod:
    model: Sandbox
    wish: Wish
    share: PodShare


def pod_of_cri(
    sandbox_id: str,
    config: pod_pb2.PodSandboxConfig,
    *,
    network_namespace: str,
    annotations: Mapping[str, str],
    host_resolv_conf: bytes,
) -> Pod:
    """A pod as CRI describes it.

    Args:
        network_namespace: the file of the namespace in which CNI has made the pod's network; empty: the pod is to have the
            host's, for which containerd asks no CNI.
        annotations: beside those of `config`.
        host_resolv_conf: what a pod without a DNS configuration gets, as with other runtimes.

    Raises:
        NotSupported: it is a pod of the host's network.
    """
    if not network_namespace:
        raise NotSupported(f"pod {config.metadata.name or sandbox_id}: {HOSTS_NETWORK}")
    name = config.hostname or config.metadata.name or sandbox_id
    memory_bytes, vcpus = machine_size(config.linux)
    return Pod(
        Sandbox(
            sandbox_id,
            hostname=name[:HOSTNAME_CHARS_MAX],
            annotations={**config.annotations, **annotations},
        ),
        Wish(
            memory_bytes=memory_bytes,
            vcpus=vcpus,
            nameservers=tuple(config.dns_config.servers),
            network_namespace=network_namespace,
        ),
        PodShare(
            resolv_conf=_resolv_conf(config.dns_config) or host_resolv_conf,
            sysctls=dict(config.linux.sysctls),
        ),
    )


def machine_size(linux: pod_pb2.LinuxPodSandboxConfig) -> tuple[int, int]:
    """Memory in bytes and virtual CPUs for a pod: its overhead and what its containers may use. 0: nothing is said."""
    memory_bytes = linux.resources.memory_limit_in_bytes
    if memory_bytes > 0:
        memory_bytes += max(linux.overhead.memory_limit_in_bytes, 0) or OVERHEAD_BYTES
        memory_bytes = _up(memory_bytes, MEMORY_STEP_BYTES) * MEMORY_STEP_BYTES
    quota_us = linux.resources.cpu_quota
    if quota_us > 0:
        quota_us += max(linux.overhead.cpu_quota, 0)
    return max(memory_bytes, 0), _up(max(quota_us, 0), linux.resources.cpu_period or DEFAULT_CPU_PERIOD_US)


def _up(value: int, step: int) -> int:
    return -(-value // step)


def pod_of_spec(sandbox_id: str, spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Pod:
    """A pod that consists of what its first container's OCI spec says: its hostname and its network namespace, if any.

    Raises:
        NotSupported: its namespaces are listed and a network's is not among them, which asks for the host's.
    """
    listed = _namespaces(spec)
    if listed and all(one.get("type") != "network" for one in listed):
        raise NotSupported(f"container {sandbox_id}: {HOSTS_NETWORK}")
    name = str(spec.get("hostname") or sandbox_id)
    return Pod(
        Sandbox(sandbox_id, hostname=name[:HOSTNAME_CHARS_MAX], annotations=dict(annotations)),
        Wish(network_namespace=network_namespace_of(spec)),
        PodShare(),
    )


def network_namespace_of(spec: Mapping[str, Any]) -> str:
    """The file of the network namespace that an OCI spec names; empty: none, or that of a process of the host."""
    for namespace in _namespaces(spec):
        if namespace.get("type") == "network":
            path = str(namespace.get("path") or "")
            return "" if path.startswith("/proc/") else path
    return ""


def _namespaces(spec: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (spec.get("linux") or {}).get("namespaces") or ()


def hosts_file(hostname: str, cards: tuple[NetworkCard, ...]) -> bytes:
    """/etc/hosts of a pod: itself by its addresses."""
    addresses = [address.partition("/")[0] for card in cards for address in card.addresses]
    return (LOCALHOST + "".join(f"{address} {hostname}\n" for address in addresses)).encode()


def _resolv_conf(dns: pod_pb2.DNSConfig) -> bytes:
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines).encode()
