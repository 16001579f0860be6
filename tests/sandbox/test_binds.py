"""What a container's mounts become in the guest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import NotFound, Rejected
from sandshift.sandbox.binds import (
    FILE_BYTES_MAX,
    GUEST_TYPES,
    POD_FILES,
    POD_FOLDERS,
    Handling,
    HostBind,
    Kind,
    Source,
    split_mounts,
)

FILE, FOLDER = Source(Kind.FILE, 10), Source(Kind.FOLDER)


def bind(source: str, destination: str, *options: str) -> dict:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def split(*mounts):
    return split_mounts({"mounts": list(mounts)})


def test_what_the_guest_makes_itself_stays_as_it_is():
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs"},
    ]
    told = split(*mounts)
    assert list(told.stay) == mounts
    assert told.binds == ()


def test_a_bind_keeps_its_place_and_is_listed_to_be_brought_in():
    told = split(
        {"destination": "/proc", "type": "proc"},
        bind("/srv/a", "/a", "ro", "rprivate", "nosuid", "x-mount.mkdir"),
        {"destination": "/a/b", "type": "tmpfs"},
        {"destination": "/f", "type": "none", "source": "/srv/f", "options": ["bind"]},
    )
    assert [one["destination"] for one in told.stay] == ["/proc", "/a", "/a/b", "/f"]
    assert told.stay[1] == {
        "destination": "/a",
        "type": "bind",
        "source": "",
        "options": ["rbind", "ro", "rprivate", "nosuid"],
    }
    assert told.binds == (
        HostBind("/srv/a", "/a", read_only=True, field="mounts[1]"),
        HostBind("/srv/f", "/f", read_only=False, field="mounts[3]"),
    )


def test_the_pods_shm_is_the_agents_to_give_and_ones_own_stays():
    cri = bind("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/x/shm", "/dev/shm", "rw")
    assert split(cri) == split()
    own = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
    assert split(own).stay == (own,)


def test_an_empty_folder_of_the_pods_is_made_in_the_guest():
    source = "/var/lib/kubelet/pods/7d/volumes/kubernetes.io~empty-dir/cache"
    told = split(bind(source, "/cache", "rw"))
    assert told.binds == ()
    assert told.stay[0]["source"] == f"{POD_FOLDERS}/cache"
    assert told.stay[0]["options"] == ["rbind", "rw"]


@pytest.mark.parametrize(
    ("source", "destination", "read_only", "found", "handling"),
    [
        ("/srv/f", "/f", True, FILE, Handling.COPY),
        ("/srv/d", "/d", True, FOLDER, Handling.PACK),
        ("/srv/f", "/f", True, Source(Kind.FILE, FILE_BYTES_MAX), Handling.COPY),
        ("/var/lib/containerd/x/hosts", "/etc/hosts", False, FILE, Handling.COPY),
        ("/srv/c/io.containerd.grpc.v1.cri/sandboxes/7/hosts", "/etc/hosts", False, FILE, Handling.COPY),
        ("/run/containerd/x/resolv.conf", "/etc/resolv.conf", False, FILE, Handling.COPY),
        ("/var/lib/kubelet/pods/7/containers/c/1", "/dev/termination-log", False, FILE, Handling.COPY),
    ],
)
def test_files_are_copied_and_folders_packed(source, destination, read_only, found, handling):
    assert HostBind(source, destination, read_only, "mounts[0]").handling(found) is handling


@pytest.mark.parametrize(
    ("source", "destination", "read_only", "found", "error", "message"),
    [
        (
            "/srv/d",
            "/d",
            False,
            FOLDER,
            Rejected,
            r"mounts\[0\]: /srv/d at /d: a folder of the host that may be written",
        ),
        (
            "/srv/f",
            "/f",
            False,
            FILE,
            Rejected,
            "a file of the host that may be written .*mount it read-only",
        ),
        ("/srv/hosts", "/etc/hosts", False, FILE, Rejected, "may be written"),
        ("/run/x", "/etc/hosts", False, FOLDER, Rejected, "may be written"),
        ("/run/x.sock", "/x", True, Source(Kind.OTHER), Rejected, "a device, socket or pipe of the host"),
        ("/no", "/x", True, Source(Kind.MISSING), NotFound, "the host has nothing at /no"),
        (
            "/big",
            "/x",
            True,
            Source(Kind.FILE, FILE_BYTES_MAX + 1),
            Rejected,
            "1048577 bytes .*mount its folder",
        ),
    ],
)
def test_what_would_have_to_be_written_back_or_cannot_come_is_refused(
    source, destination, read_only, found, error, message
):
    with pytest.raises(error, match=message):
        HostBind(source, destination, read_only, "mounts[0]").handling(found)


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (
            {"destination": "/a", "type": "nfs", "source": "h:/x"},
            r"mounts\[0\]: a file system of type 'nfs' at /a",
        ),
        ({"destination": "/a", "source": "/dev/sda"}, "a file system of type '' at /a"),
        (bind("rel", "/a"), "the source 'rel' of the bind at /a is not absolute"),
        (bind("/../x", "/a"), "is not absolute"),
        ({"destination": "a", "type": "proc"}, "is no mount with an absolute destination"),
        ({"destination": "/a/../../b", "type": "proc"}, "is no mount with an absolute destination"),
        ("x", "is no mount"),
        ({"destination": "/a", "type": "proc", "options": "ro"}, "options 'ro' are no list of words"),
        (bind("/x", "/a") | {"uidMappings": [{}]}, "mappings of ids at /a are not supported"),
    ],
)
def test_what_is_no_mount_for_a_vm_is_refused_by_its_place(mount, message):
    with pytest.raises(Rejected, match=message):
        split(mount)


PATHS = st.lists(st.sampled_from(["a", "b", "var", "lib", "run"]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
MOUNTS = st.one_of(
    st.builds(
        lambda place, kind: {"destination": place, "type": kind}, PATHS, st.sampled_from(sorted(GUEST_TYPES))
    ),
    st.builds(bind, PATHS, PATHS | st.sampled_from(sorted(POD_FILES)), st.sampled_from(["ro", "rw"])),
)


@given(st.lists(MOUNTS, max_size=8))
def test_every_bind_of_the_host_is_listed_once_and_no_host_path_stays(mounts):
    told = split(*mounts)
    wanted = [(one["source"], one["destination"]) for one in mounts if one["type"] == "bind"]
    assert [(one.source, one.destination) for one in told.binds] == wanted
    assert [one["destination"] for one in told.stay] == [one["destination"] for one in mounts]
    assert not any(one["source"] for one in told.stay if one["type"] == "bind")


@given(PATHS, PATHS, st.booleans(), st.sampled_from([FILE, FOLDER]))
def test_nothing_that_may_be_written_is_taken_for_a_copy_but_the_pods_own_files(
    source, destination, read_only, found
):
    bound = HostBind(source, destination, read_only, "mounts[0]")
    if read_only:
        assert bound.handling(found) in (Handling.COPY, Handling.PACK)
    else:
        with pytest.raises(Rejected):
            bound.handling(found)
