from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import NoRoom, Rejected
from sandshift.rootfs.mounts import LAYERS_MAX, MOUNTS_MAX, BlockFile, Folders, LayerFiles, read
from sandshift.sandbox.patching import Mount

RECORDED = json.loads((Path(__file__).parent / "recorded" / "create_messages.json").read_text())
STATE = "/var/lib/containerd/io.containerd.snapshotter.v1."


def recorded(name: str) -> list[Mount]:
    return [
        Mount(type=one["type"], source=one["source"], options=tuple(one["options"])) for one in RECORDED[name]
    ]


def overlay(*options: str) -> Mount:
    return Mount(type="overlay", source="overlay", options=options)


EROFS = Mount(type="erofs", source="/s/8/layer.erofs", options=("ro", "loop"))
EXT4 = Mount(type="ext4", source="/s/9/rwlayer.img", options=("rw", "loop"))


def stacked(*options: str) -> Mount:
    return Mount(type="format/mkdir/overlay", source="overlay", options=options)


def test_overlayfs_gives_folders_the_topmost_layer_first() -> None:
    folders = f"{STATE}overlayfs/snapshots"
    assert read(recorded("overlayfs, containerd 2.1.9")) == Folders(
        lower=(f"{folders}/3/fs", f"{folders}/2/fs"), upper=f"{folders}/7/fs"
    )


def test_native_gives_one_folder() -> None:
    assert read(recorded("native, containerd 1.6.20")) == Folders(lower=(f"{STATE}native/snapshots/2",))


def test_blockfile_gives_a_file_that_is_the_whole_root() -> None:
    assert read(recorded("blockfile, containerd 2.1.9")) == BlockFile(
        f"{STATE}blockfile/snapshots/2", "ext4", read_only=False
    )


def test_erofs_that_the_host_mounts_gives_folders() -> None:
    folder = f"{STATE}erofs/snapshots"
    assert read(recorded("erofs, containerd 2.1.9")) == Folders(
        lower=(f"{folder}/1/fs",), upper=f"{folder}/2/fs"
    )


@pytest.mark.parametrize("name", RECORDED)
def test_every_form_that_was_recorded_is_known(name: str) -> None:
    assert not read(recorded(name)).read_only


def test_erofs_as_files_gives_the_layers_and_the_file_for_changes() -> None:
    folder = f"{STATE}erofs/snapshots"
    assert read(recorded("erofs with default_size, layers as files, containerd 2.2.7")) == LayerFiles(
        layers=(f"{folder}/8/layer.erofs", f"{folder}/7/layer.erofs"), writable=f"{folder}/9/rwlayer.img"
    )


def test_erofs_as_files_without_a_file_for_changes_names_the_folder_that_would_have_taken_them() -> None:
    folder = f"{STATE}erofs/snapshots"
    assert read(recorded("erofs, layers as files, containerd 2.3.4")) == LayerFiles(
        layers=(f"{folder}/8/layer.erofs", f"{folder}/7/layer.erofs"), upper=f"{folder}/9/fs"
    )


def test_layers_may_be_named_upwards_and_one_by_one() -> None:
    other = Mount(type="erofs", source="/s/7/layer.erofs", options=("ro",))
    down = read([EROFS, other, stacked("lowerdir={{ overlay 1 0 }}")])
    single = read([EROFS, other, stacked("lowerdir={{ mount 1 }}:{{mount 0}}")])
    assert down == single == LayerFiles(("/s/7/layer.erofs", "/s/8/layer.erofs"), read_only=True)


def test_a_view_of_a_snapshot_is_read_only() -> None:
    assert read([overlay("lowerdir=/a:/b")]) == Folders(("/a", "/b"), read_only=True)
    assert read([Mount(type="bind", source="/a", options=("rbind", "ro"))]) == Folders(
        ("/a",), read_only=True
    )
    assert read([Mount(type="ext4", source="/a", options=("loop", "ro"))]) == BlockFile(
        "/a", "ext4", read_only=True
    )
    assert read([EROFS]) == LayerFiles(("/s/8/layer.erofs",), read_only=True)


def test_options_that_say_how_layers_are_read_are_kept_in_one_order() -> None:
    found = read([overlay("userxattr", "index=off", "metacopy=on", "lowerdir=/a", "volatile")])
    assert found == Folders(("/a",), options=("metacopy=on", "userxattr"), read_only=True)


def test_a_colon_in_a_path_is_read_as_overlay_reads_it() -> None:
    assert read([overlay(r"lowerdir=/a\:b:/c")]) == Folders(("/a:b", "/c"), read_only=True)


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (
            Mount(type="btrfs", source="/dev/sda1"),
            r"rootfs\[0\].source is '/dev/sda1': block devices are not handed on",
        ),
        (
            Mount(type="btrfs", source="/x"),
            r"rootfs\[0\].type is 'btrfs': this type of mount is not known; use one of",
        ),
        (Mount(type="fuse3.fuse-overlayfs", source="overlay"), "type is 'fuse3.fuse-overlayfs'"),
        (Mount(type="bind", source="relative"), r"source is 'relative': it must be an absolute path"),
        (
            Mount(type="bind", source="/a/../etc"),
            r'source is \'/a/../etc\': it must be a path without ".", ".."',
        ),
        (Mount(type="bind", source="//a"), "it must be an absolute path"),
        (Mount(type="bind", source="/a//b"), "doubled slashes"),
        (Mount(type="bind", source="/a\nb"), "it must be an absolute path"),
        (Mount(type="bind", source="/a", target="/../etc"), "target is '/../etc': it must be empty"),
        (
            Mount(type="bind", source="/a", options=("rbind", "suid")),
            "options is 'suid': this option of bind",
        ),
        (Mount(type="ext4", source="/a", options=("rw", "data=writeback")), "option of ext4 is not known"),
        (
            Mount(type="erofs", source="/a", options=("ro", "device=/etc/shadow")),
            "hand over its layers unmerged",
        ),
        (overlay("lowerdir=/a,upperdir=/etc"), "it holds a comma: one option per entry"),
        (overlay("lowerdir=/a", "lowerdir=/b"), "lowerdir is given twice"),
        (overlay("lowerdir=/a:../b"), r"options: lowerdir is '../b': it must be an absolute path"),
        (overlay("upperdir=/a"), "an overlay needs lowerdir"),
        (overlay("lowerdir=/a", "uidmap=0:1000:1"), "this option of overlay is not known"),
        (overlay("lowerdir=/a", "upperdir=/b/../../etc"), "options: upperdir is '/b/../../etc'"),
    ],
)
def test_what_is_not_known_or_leads_elsewhere_is_refused_by_name(mount: Mount, words: str) -> None:
    with pytest.raises(Rejected, match=words):
        read([mount])


@pytest.mark.parametrize(
    ("mounts", "words"),
    [
        ([EROFS, EROFS], r"rootfs\[1\].type is 'erofs': several mounts must end in an overlay"),
        (
            [EROFS, Mount(type="bind", source="/a"), stacked("lowerdir={{ overlay 0 1 }}")],
            r"rootfs\[1\].type is 'bind'",
        ),
        ([EROFS, stacked("lowerdir={{ overlay 0 7 }}")], "over the 1 mounts before it"),
        ([EROFS, stacked("lowerdir={{ overlay 0 99999999999 }}")], "over the 1 mounts before it"),
        ([EROFS, stacked("lowerdir={{ mount 0 }}/../..")], "over the 1 mounts before it"),
        ([EROFS, stacked("lowerdir={{ mount 0 }}:{{ mount 0 }}")], "each used once"),
        ([EROFS, stacked("lowerdir=/etc")], "over the 1 mounts before it"),
        ([EXT4, EROFS, stacked("lowerdir={{ overlay 0 1 }}")], "a layer below the changes must be erofs"),
        (
            [EROFS, EROFS, stacked("lowerdir={{ mount 0 }}")],
            r"rootfs\[1\].source is .*no layer of the overlay is made of",
        ),
        (
            [
                EXT4,
                EROFS,
                stacked("lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/upper", "workdir=/tmp/work"),
            ],
            "changes must go to upper and work of one mount",
        ),
        (
            [
                EROFS,
                stacked(
                    "lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work"
                ),
            ],
            "it must be in a writable ext4 file",
        ),
        (
            [EROFS, stacked("lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/upper/../../etc")],
            "options: upperdir is .*must be an absolute path",
        ),
        ([EROFS, stacked("X-containerd.mkdir.path=/etc/x:0777", "lowerdir={{ mount 0 }}")], "is not known"),
    ],
)
def test_layers_that_do_not_stack_are_refused_by_name(mounts: list[Mount], words: str) -> None:
    with pytest.raises(Rejected, match=words):
        read(mounts)


def test_more_than_one_root_may_have_is_refused_with_the_number() -> None:
    with pytest.raises(NoRoom, match=f"rootfs has {MOUNTS_MAX + 1} mounts: at most {MOUNTS_MAX}"):
        read([EROFS] * (MOUNTS_MAX + 1))
    many = ":".join(f"/{number}" for number in range(LAYERS_MAX + 1))
    with pytest.raises(NoRoom, match=f"has {LAYERS_MAX + 1} layers: at most {LAYERS_MAX}"):
        read([overlay(f"lowerdir={many}")])


WORDS = st.one_of(
    st.sampled_from(
        [
            "overlay",
            "bind",
            "ext4",
            "erofs",
            "format/mkdir/overlay",
            "{{ overlay 0 1 }}",
            "..",
            "/",
            "lowerdir=/a",
            ":",
            ",",
        ]
    ),
    st.text(max_size=12),
)
TEXT = st.lists(WORDS, max_size=4).map("".join)


@given(
    st.lists(
        st.builds(Mount, type=WORDS, source=TEXT, options=st.lists(TEXT, max_size=4).map(tuple)),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_handed_over_paths_are_absolute_and_lead_nowhere_else(mounts: list[Mount]) -> None:
    try:
        recipe = read(mounts)
    except (Rejected, NoRoom):
        return
    match recipe:
        case Folders(lower, upper):
            paths = [*lower, *([upper] if upper else [])]
        case BlockFile(path):
            paths = [path]
        case LayerFiles(layers, writable, upper):
            paths = [*layers, *([writable] if writable else []), *([upper] if upper else [])]
    assert paths
    for path in paths:
        assert path.startswith("/")
        assert not {".", "..", ""} & set(path[1:].split("/")) or path == "/"
