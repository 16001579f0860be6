"""containerd's OCI spec of a container -> the spec for runc in the guest. Pure.

In the guest the pod has the whole kernel to itself, so the pod's namespaces are the guest's own and nothing of the host's
exists: its paths, devices, security labels and CPU numbers. What means the same in the guest stays as it is, what has no
meaning there is left out, and what would have a meaning that cannot be had is refused by name, with a remedy.

What only the agent knows (the root's path, the control group, sources of binds) is set by the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from sandshift.errors import Rejected
from sandshift.sandbox.binds import split_mounts

POD_PID_NAMESPACE: Final = "/run/sandshift/pod/pid"
"""What the agent makes the pod's own process namespace known by."""
SPEC_BYTES_MAX: Final = 1 << 20
"""Of a spec for the guest."""
CONTAINER_TYPE_ANNOTATION: Final = "io.kubernetes.cri.container-type"
"""Of a pod's sandbox container it says "sandbox"."""
_OWN: Final = frozenset({"mount", "pid", "cgroup"})
"""Kinds of namespaces that a container may have of its own in the guest."""
_OF_THE_POD: Final = frozenset({"network", "ipc", "uts"})
"""Those that are the guest's for every container."""
_ALWAYS: Final = ({"type": "mount"}, {"type": "cgroup"}, {"type": "pid", "path": POD_PID_NAMESPACE})
"""What a container has if its spec names none: what would be the host's own is the pod's, never the agent's."""
_DEVICES_OF_EVERY: Final = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
)
"""What a container has without asking."""
_NAMED_MAX: Final = 3
_SYSCTLS: Final = ("net.", "fs.mqueue.", "kernel.msg", "kernel.sem", "kernel.shm", "kernel.shm_rmid_forced")
"""Kernel settings that belong to a namespace; runc takes no others. Source: runc libcontainer/configs/validate."""
_LABELS: Final = ("apparmorProfile", "selinuxLabel")
_MEMORY: Final = ("limit", "reservation", "checkBeforeUpdate")
"""The guest has no swap, and the rest is of control groups before version 2."""
_CPU: Final = ("shares", "quota", "period", "burst", "idle")
"""CPU and node numbers are the host's; real-time budgets are of control groups before version 2."""
_RESOURCES: Final = ("memory", "cpu", "pids", "hugepageLimits", "unified", "devices")
_LINUX: Final = (
    "seccomp",
    "rootfsPropagation",
    "maskedPaths",
    "readonlyPaths",
    "personality",
)
"""Of the section `linux`: what stays as it is."""


@dataclass(frozen=True, slots=True)
class PodShare:
    """What a container's spec has to fit in with."""

    hostname: str = ""
    """The guest's."""
    pids: frozenset[int] = frozenset()
    """The inits of the pod's containers, as pids of the guest: a spec may ask for the process namespace of one."""


def guest_spec(spec: Mapping[str, Any], *, pod: PodShare) -> bytes:
    """The spec that the agent is given, as JSON.

    Its mounts are those of `split_mounts`: the caller brings in what that lists.

    Raises:
        Rejected: it is no spec, or asks for what cannot be had in a VM: names the field, the value and a remedy.
    """
    _refuse_foreign(spec)
    process = _section("process", spec.get("process"))
    root, linux, annotations = (_part(spec, name) for name in ("root", "linux", "annotations"))
    namespaces = _namespaces(linux, pod, keeps_uts=_wants_own_hostname(spec, linux, pod))
    fitted: dict[str, Any] = {
        "ociVersion": spec.get("ociVersion", "1.0.2"),
        "process": _process(process),
        "root": {"path": "rootfs", "readonly": bool(root.get("readonly"))},
        "mounts": [one for one in split_mounts(spec).stay if not _is_pods_shm(one, linux)],
        "annotations": annotations,
        "linux": _linux(linux, namespaces),
    }
    if any(one["type"] == "uts" for one in namespaces):
        fitted["hostname"] = spec["hostname"]
    encoded = msgspec.json.encode(fitted)
    if len(encoded) > SPEC_BYTES_MAX:
        raise Rejected(f"the container's spec has {len(encoded)} bytes: up to {SPEC_BYTES_MAX} are allowed")
    return encoded


def guest_process(process: Mapping[str, Any]) -> bytes:
    """The OCI process of an exec session, as the agent is given it.

    Raises:
        Rejected: it is none.
    """
    return msgspec.json.encode(_process(_section("process", process)))


def guest_resources(resources: Mapping[str, Any]) -> bytes:
    """OCI `linux.resources` of an update, as the agent is given them.

    Raises:
        Rejected: they are none.
    """
    fitted = _resources(_section("resources", resources))
    fitted.pop("devices", None)
    return msgspec.json.encode(fitted)


def spec_from(data: bytes) -> dict[str, Any]:
    """The content of a bundle's config.json.

    Raises:
        Rejected: it is no JSON object.
    """
    try:
        spec = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise Rejected(f"config.json is no JSON: {error}") from error
    return _section("config.json", spec)


def _refuse_foreign(spec: Mapping[str, Any]) -> None:
    hooks = _part(spec, "hooks")
    if named := sorted(name for name, listed in hooks.items() if listed):
        raise Rejected(
            f"hooks.{named[0]}: programs of the host cannot run for a container in a VM: remove the hook"
        )
    for name in ("windows", "solaris", "zos"):
        if spec.get(name):
            raise Rejected(f"{name}: the VM runs Linux containers only")


def _process(process: dict[str, Any]) -> dict[str, Any]:
    args = process.get("args")
    if not isinstance(args, list) or not args or not all(isinstance(word, str) for word in args):
        raise Rejected(f"process.args: {args!r:.80} names no program")
    if not str(process.get("cwd", "")).startswith("/"):
        raise Rejected(f"process.cwd: {process.get('cwd')!r:.80} is no absolute path")
    return {name: value for name, value in process.items() if name not in _LABELS}


def _wants_own_hostname(spec: Mapping[str, Any], linux: Mapping[str, Any], pod: PodShare) -> bool:
    """Whether it asks for a hostname that is not the pod's. The pod's sandbox container names the pod's."""
    return (
        bool(spec.get("hostname"))
        and spec.get("hostname") != pod.hostname
        and _part(spec, "annotations").get(CONTAINER_TYPE_ANNOTATION) != "sandbox"
        and {"type": "uts"} in _asked_namespaces(linux)
    )


def _namespaces(linux: Mapping[str, Any], pod: PodShare, *, keeps_uts: bool) -> list[dict[str, str]]:
    kept: list[dict[str, str]] = []
    for one in _asked_namespaces(linux):
        kind, path = one.get("type", ""), one.get("path", "")
        if kind == "pid" and path:
            kept.append({"type": "pid", "path": _pid_namespace(path, pod)})
        elif kind == "user":
            raise Rejected(
                "linux.namespaces: a user namespace cannot be had in the VM, which keeps the container from the host:"
                " leave it out (hostUsers: true)"
            )
        elif kind in _OWN or (kind == "uts" and keeps_uts):
            kept.append({"type": kind})
        elif kind not in _OF_THE_POD:
            raise Rejected(f"linux.namespaces: a namespace of type {kind!r} cannot be had in the guest")
    return kept + [one for one in _ALWAYS if one["type"] not in {other["type"] for other in kept}]


def _is_pods_shm(mount: Mapping[str, Any], linux: Mapping[str, Any]) -> bool:
    """A fresh /dev/shm for a container that shares the pod's IPC namespace: the agent binds the pod's there instead.

    containerd binds its own pods' itself, and leaves the spec's default for pods whose sandbox is a shim's.
    """
    shares = any(
        one.get("type") == "ipc" and one.get("path")
        for one in linux.get("namespaces") or ()
        if isinstance(one, dict)
    )
    return shares and mount.get("type") == "tmpfs" and mount.get("destination") == "/dev/shm"  # noqa: S108


def _asked_namespaces(linux: Mapping[str, Any]) -> list[dict[str, str]]:
    listed = linux.get("namespaces") or []
    if not isinstance(listed, list):
        raise Rejected(f"linux.namespaces: {listed!r:.80} is no list")
    return [_without_empty_path(one) for one in listed]


def _pid_namespace(path: str, pod: PodShare) -> str:
    """The pod's, if it is not that of one of its containers: on the host both are named by a process."""
    parts = path.split("/")
    is_process = len(parts) == 5 and parts[1] == "proc" and parts[3:] == ["ns", "pid"]
    if is_process and parts[2].isdigit() and int(parts[2]) in pod.pids:
        return path
    return POD_PID_NAMESPACE


def _without_empty_path(one: Any) -> dict[str, str]:
    if not isinstance(one, dict) or not all(isinstance(value, str) for value in one.values()):
        raise Rejected(f"linux.namespaces: {one!r:.80} is no namespace")
    return {name: value for name, value in one.items() if name == "type" or (name == "path" and value)}


def _linux(linux: dict[str, Any], namespaces: list[dict[str, str]]) -> dict[str, Any]:
    _refuse_devices(linux.get("devices") or [])
    if linux.get("intelRdt"):
        raise Rejected("linux.intelRdt: classes of the host's cache cannot be had in a VM: leave them out")
    fitted = {name: linux[name] for name in _LINUX if linux.get(name)}
    if (seccomp := fitted.get("seccomp")) and _section("linux.seccomp", seccomp).get("listenerPath"):
        raise Rejected(
            f"linux.seccomp.listenerPath: {seccomp['listenerPath']} is a socket of the host: use a profile without one"
        )
    sysctls = _part(linux, "sysctl", "linux.sysctl")
    for name in sysctls:
        if not name.startswith(_SYSCTLS):
            raise Rejected(
                f"linux.sysctl: {name!r} belongs to the whole kernel: only settings of namespaces can be set"
            )
    if sysctls:
        fitted["sysctl"] = sysctls
    fitted["namespaces"] = namespaces
    fitted["resources"] = _resources(_part(linux, "resources", "linux.resources"))
    return fitted


def _refuse_devices(devices: Any) -> None:
    if not isinstance(devices, list) or not all(isinstance(one, dict) for one in devices):
        raise Rejected(f"linux.devices: {devices!r:.80} is no list of devices")
    foreign = [str(one.get("path")) for one in devices if one.get("path") not in _DEVICES_OF_EVERY]
    if foreign:
        more = f" and {len(foreign) - _NAMED_MAX} more" if len(foreign) > _NAMED_MAX else ""
        raise Rejected(
            f"linux.devices: {', '.join(foreign[:_NAMED_MAX])}{more}: devices of the host cannot be in a VM: leave them out"
            " (for privileged pods: privileged_without_host_devices = true in containerd's configuration)"
        )


def _resources(resources: dict[str, Any]) -> dict[str, Any]:
    fitted = {name: resources[name] for name in _RESOURCES if resources.get(name)}
    for name, kept in (("memory", _MEMORY), ("cpu", _CPU)):
        if name in fitted:
            section = _section(f"resources.{name}", fitted[name])
            fitted[name] = {field: section[field] for field in kept if section.get(field) is not None}
    return fitted


def _part(whole: Mapping[str, Any], name: str, field: str = "") -> dict[str, Any]:
    """A section that may be missing."""
    return _section(field or name, whole.get(name) or {})


def _section(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Rejected(f"{name}: {value!r:.80} is no JSON object")
    return dict(value)
