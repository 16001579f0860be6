"""The spec for runc: what the agent adds to the one that came."""

from __future__ import annotations

import json

import pytest

from sandshift.agent import bundle
from sandshift.agent.bundle import BadSpec, Known, compose


def known(**changes) -> Known:
    values = {
        "container_id": "c",
        "root": "/run/sandshift/1/root",
        "terminal": False,
        "sources": {},
        "read_only": frozenset(),
    }
    return Known(**{**values, **changes})


def spec(**changes):
    return {"process": {"args": ["sh"], "terminal": True}, "linux": {"sysctl": {"net.a": 1}}, **changes}


def mounts_by_place(made) -> dict[str, dict]:
    return {mount["destination"]: mount for mount in made["mounts"]}


def test_root_group_and_terminal_are_the_agents():
    made = compose(spec(root={"readonly": True, "path": "elsewhere"}), known())
    assert made["root"] == {"readonly": True, "path": "/run/sandshift/1/root"}
    assert made["linux"] == {"cgroupsPath": "/pod/c"}
    assert made["process"]["terminal"] is False


def test_kernel_settings_are_taken_out_to_be_set_by_the_agent():
    given = spec()
    assert bundle.sysctls_of(given) == {"net.a": "1"}
    assert "sysctl" not in compose(given, known())["linux"]


def test_binds_get_what_came_for_them_in_their_place():
    listed = [
        {"destination": "/a/", "type": "bind", "source": "", "options": ["rbind", "rw", "nosuid"]},
        {"destination": "/a/b", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/own", "type": "bind", "source": "/usr", "options": ["bind"]},
    ]
    made = compose(
        spec(mounts=listed), known(sources={"/a": "/x/1", "/more": "/x/2"}, read_only=frozenset({"/a"}))
    )
    assert [one["destination"] for one in made["mounts"][:4]] == ["/a/", "/a/b", "/own", "/more"]
    places = mounts_by_place(made)
    assert places["/a/"] == {
        "destination": "/a/",
        "type": "bind",
        "source": "/x/1",
        "options": ["rbind", "nosuid", "ro"],
    }
    assert places["/own"]["source"] == "/usr"
    assert places["/more"]["options"] == ["rbind", "rprivate", "rw"]


def test_the_pods_files_come_last_and_only_where_there_are_none():
    listed = [{"destination": "/dev/shm/", "type": "tmpfs", "source": "shm"}]
    made = compose(spec(mounts=listed), known(sources={"/etc/hosts": "/x/hosts"}))
    places = mounts_by_place(made)
    assert places["/etc/hosts"]["source"] == "/x/hosts"
    assert places["/etc/resolv.conf"]["source"] == "/etc/resolv.conf"
    assert "/dev/shm" not in places
    assert [one["destination"] for one in made["mounts"]] == [
        "/dev/shm/",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process": []}, "process is no JSON object|the process names no program"),
        ({"process": {"args": []}}, "the process names no program"),
        (spec(linux=[1]), "linux is no JSON object"),
        (spec(mounts=[{}]), "mounts is no list of mounts"),
        (
            spec(mounts=[{"destination": "/a", "type": "bind", "source": ""}]),
            "nothing came for the mount at /a",
        ),
    ],
)
def test_what_is_no_spec_is_named(given, message):
    with pytest.raises(BadSpec, match=message):
        compose(given, known())


@pytest.mark.parametrize(
    ("data", "message"), [(b"{", "is no JSON"), (b"[]", "is no JSON object"), (b"\xff", "JSON")]
)
def test_what_is_no_json_object_is_named(data, message):
    with pytest.raises(BadSpec, match=message):
        bundle.parse(data, "the spec")


def test_an_exec_sessions_terminal_is_what_was_asked_for():
    assert bundle.process_of(json.dumps({"args": ["sh"]}).encode(), terminal=True) == {
        "args": ["sh"],
        "terminal": True,
    }


def test_shared_folders_and_namespaces_are_found():
    made = {
        "mounts": [{"source": f"{bundle.POD_VOLUMES}/a"}, {"source": "/usr"}, {}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid", "path": "/p"}]},
    }
    assert bundle.volumes_of(made) == [f"{bundle.POD_VOLUMES}/a"]
    assert bundle.pid_namespace_of(made) == {"type": "pid", "path": "/p"}
    assert bundle.pid_namespace_of({"linux": {"namespaces": [{"type": "pid"}]}}) is None
