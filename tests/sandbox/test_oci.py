"""containerd's spec -> the guest's: what stays, what is left out, what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import Rejected
from sandshift.sandbox.oci import (
    POD_PID_NAMESPACE,
    SPEC_BYTES_MAX,
    PodShare,
    guest_process,
    guest_resources,
    guest_spec,
    spec_from,
)

POD = PodShare(hostname="pod", pids=frozenset({71}))


def spec(**changes: Any) -> dict[str, Any]:
    """As containerd writes one; `changes`: "linux__devices" for linux.devices."""
    made: dict[str, Any] = {
        "ociVersion": "1.1.0",
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "cgroupsPath": "/default/c",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        },
    }
    for name, value in changes.items():
        place = made
        *folders, last = name.split("__")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return made


def fitted(made: dict[str, Any], pod: PodShare = POD) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(guest_spec(made, pod=pod))
    return result


def namespaces(made: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one.get("path", "") for one in fitted(made)["linux"]["namespaces"]}


def test_the_pods_namespaces_are_the_guests_and_the_rest_the_containers_own():
    assert namespaces(spec()) == {"pid": "", "mount": "", "cgroup": ""}


def test_a_container_that_joins_the_pods_ipc_has_the_pods_shm_and_another_its_own():
    own = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
    joined = [{"type": "ipc", "path": "/proc/9/ns/ipc"}]
    assert own in fitted(spec(mounts=[own]))["mounts"]
    assert fitted(spec(mounts=[own], linux__namespaces=joined))["mounts"] == []


def test_paths_of_the_host_lead_to_the_pods_processes_or_to_one_containers():
    for path, expected in (
        ("/proc/4242/ns/pid", POD_PID_NAMESPACE),
        ("/var/run/pidns", POD_PID_NAMESPACE),
        ("/proc/71/ns/pid", "/proc/71/ns/pid"),
    ):
        listed = [{"type": "pid", "path": path}, {"type": "network", "path": "/var/run/netns/x"}]
        assert namespaces(spec(linux__namespaces=listed)) == {"pid": expected, "mount": "", "cgroup": ""}


def test_who_asks_for_the_hosts_processes_gets_the_pods_never_the_agents():
    assert namespaces(spec(linux__namespaces=[]))["pid"] == POD_PID_NAMESPACE
    assert namespaces(spec(linux__namespaces=None))["pid"] == POD_PID_NAMESPACE


def test_a_hostname_of_its_own_needs_a_namespace_of_its_own():
    assert "hostname" not in fitted(spec(hostname="pod"))
    own = fitted(spec(hostname="mine"))
    assert own["hostname"] == "mine"
    assert {"type": "uts"} in own["linux"]["namespaces"]
    sandbox = spec(hostname="mine", annotations={"io.kubernetes.cri.container-type": "sandbox"})
    assert "hostname" not in fitted(sandbox)
    joined = spec(hostname="mine", linux__namespaces=[{"type": "uts", "path": "/proc/1/ns/uts"}])
    assert "hostname" not in fitted(joined)


def test_what_means_nothing_in_the_guest_is_left_out():
    made = fitted(
        spec(
            process__apparmorProfile="cri-containerd.apparmor.d",
            process__selinuxLabel="s0",
            linux__mountLabel="s0",
            linux__resources={
                "memory": {"limit": 5, "swap": 5, "kernel": 1, "swappiness": 60, "disableOOMKiller": True},
                "cpu": {"shares": 2, "cpus": "0-3", "mems": "0", "realtimeRuntime": 1},
                "blockIO": {"weight": 10},
                "network": {"classID": 1},
                "pids": {"limit": 9},
                "devices": [{"allow": False, "access": "rwm"}],
            },
            domainname="x",
        )
    )
    assert made["process"] == {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    assert made["linux"]["resources"] == {
        "memory": {"limit": 5},
        "cpu": {"shares": 2},
        "pids": {"limit": 9},
        "devices": [{"allow": False, "access": "rwm"}],
    }
    assert set(made["linux"]) == {"namespaces", "resources"}
    assert set(made) == {"ociVersion", "process", "root", "mounts", "annotations", "linux"}


def test_what_means_the_same_in_the_guest_stays():
    kept = {
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "rootfsPropagation": "rslave",
        "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "5"},
    }
    made = spec(root={"path": "x", "readonly": True}, annotations={"a": "b"})
    made["linux"].update(kept)
    made["process"] |= {"rlimits": [{"type": "RLIMIT_NOFILE"}], "oomScoreAdj": 5, "noNewPrivileges": True}
    told = fitted(made)
    assert {name: told["linux"][name] for name in kept} == kept
    assert told["process"] == made["process"]
    assert told["root"]["readonly"] is True
    assert told["annotations"] == {"a": "b"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (spec(hooks={"prestart": [{"path": "/x"}]}), "hooks.prestart: programs of the host cannot run"),
        (spec(windows={"x": 1}), "windows: the VM runs Linux containers only"),
        (spec(process__args=[]), r"process.args: \[\] names no program"),
        (spec(process__cwd="tmp"), "process.cwd: 'tmp' is no absolute path"),
        (spec(process=None), "process: None is no JSON object"),
        (spec(root=[]) | {"root": [1]}, "root: .* is no JSON object"),
        (spec(annotations=[1]), "annotations: .* is no JSON object"),
        (spec(linux__namespaces=[{"type": "time"}]), "a namespace of type 'time' cannot be had"),
        (spec(linux__namespaces=[{"type": "user"}]), "a user namespace cannot be had in the VM"),
        (spec(linux__namespaces=["pid"]), "linux.namespaces: 'pid' is no namespace"),
        (spec(linux__namespaces={"a": 1}), "linux.namespaces: .* is no list"),
        (
            spec(linux__sysctl={"vm.swappiness": "1"}),
            "linux.sysctl: 'vm.swappiness' belongs to the whole kernel",
        ),
        (
            spec(linux__seccomp={"listenerPath": "/run/x.sock"}),
            "linux.seccomp.listenerPath: /run/x.sock is a socket",
        ),
        (spec(linux__intelRdt={"closID": "x"}), "linux.intelRdt: classes of the host's cache"),
        (spec(linux__resources=[1]), "linux.resources: .* is no JSON object"),
        (
            spec(
                linux__devices=[{"path": f"/dev/x{number}"} for number in range(5)] + [{"path": "/dev/null"}]
            ),
            "linux.devices: /dev/x0, /dev/x1, /dev/x2 and 2 more: devices of the host .*privileged_without_host_devices",
        ),
        (spec(process__env=["x" * SPEC_BYTES_MAX]), "the container's spec has .* bytes: up to"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(made, message):
    with pytest.raises(Rejected, match=message):
        guest_spec(made, pod=POD)


def test_devices_that_every_container_has_are_no_hosts_devices():
    listed = [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}, {"path": "/dev/tty"}]
    assert "devices" not in fitted(spec(linux__devices=listed))["linux"]


def test_exec_sessions_and_updates_lose_what_means_nothing_too():
    process = {"args": ["ls"], "cwd": "/", "apparmorProfile": "x", "capabilities": {"bounding": ["CAP_KILL"]}}
    assert json.loads(guest_process(process)) == {
        "args": ["ls"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"]},
    }
    resources = {"memory": {"limit": 1, "swap": 1}, "devices": [{}], "cpu": {"cpus": "0", "quota": -1}}
    assert json.loads(guest_resources(resources)) == {"memory": {"limit": 1}, "cpu": {"quota": -1}}


@pytest.mark.parametrize(
    ("data", "message"), [(b"{", "config.json is no JSON"), (b"[1]", "config.json: .* no JSON object")]
)
def test_a_file_that_is_no_spec_is_named(data, message):
    with pytest.raises(Rejected, match=message):
        spec_from(data)
    assert spec_from(b'{"a": 1}') == {"a": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    "process",
    "root",
    "mounts",
    "hooks",
    "linux",
    "annotations",
    "hostname",
    "linux__namespaces",
    "linux__devices",
    "linux__resources",
    "linux__resources__memory",
    "linux__sysctl",
    "linux__seccomp",
    "process__args",
    "process__cwd",
]


@given(st.sampled_from(PLACES), JSON)
def test_any_json_anywhere_is_fitted_or_refused_and_nothing_else(place, value):
    made = spec()
    made["linux"]["resources"] = {}
    *folders, last = place.split("__")
    target = made
    for folder in folders:
        target = target[folder]
    target[last] = value
    before = json.dumps(made)
    try:
        told = fitted(made)
    except Rejected:
        pass  # said in one class, which is what the caller can act on
    else:
        assert told["process"]["args"]
        assert {one["type"] for one in told["linux"]["namespaces"]} <= {"pid", "mount", "cgroup", "uts"}
    assert json.dumps(made) == before


KINDS = ("pid", "ipc", "uts", "mount", "network", "cgroup")


@given(
    st.lists(
        st.builds(
            lambda kind, path: {"type": kind, **({"path": path} if path is not None else {})},
            st.sampled_from(KINDS),
            st.sampled_from((None, "", "/proc/1/ns/pid", "/proc/71/ns/pid", "/proc/9/ns/net", "/x")),
        ),
        max_size=8,
        unique_by=lambda one: one["type"],
    )
)
def test_whatever_namespaces_are_asked_for_none_of_the_hosts_is_reached(listed):
    made = fitted(spec(linux__namespaces=listed))["linux"]["namespaces"]
    kinds = [one["type"] for one in made]
    assert sorted(kinds) == ["cgroup", "mount", "pid"]
    for one in made:
        assert one.get("path", "") in ("", POD_PID_NAMESPACE, "/proc/71/ns/pid")
        assert one["type"] == "pid" or "path" not in one
