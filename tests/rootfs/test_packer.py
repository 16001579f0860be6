from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sandshift.errors import NotFound, Rejected, Unavailable
from sandshift.rootfs import erofs, sources, tree
from sandshift.rootfs.cache import ImageCache
from sandshift.rootfs.mounts import Folders
from sandshift.rootfs.packer import Packer
from sandshift.rootfs.plan import DiskFile
from sandshift.sandbox.patching import Mount
from tests.needs import needs_root

pytestmark = [
    needs_root,
    pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed"),
]


def made(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def overlay(tmp_path: Path, *layers: str) -> Mount:
    lower = ":".join(str(tmp_path / name) for name in layers)
    upper, work = made(tmp_path / "upper"), made(tmp_path / "work")
    return Mount("overlay", "overlay", options=(f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"))


def bind(folder: Path) -> Mount:
    return Mount("bind", str(folder), options=("rbind", "rw"))


def listed(disk: DiskFile, path: str = "/") -> str:
    return subprocess.run(
        ["dump.erofs", f"--path={path}", "--ls", str(disk.path)], capture_output=True, text=True, check=True
    ).stdout


def mounted_here() -> str:
    return Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def packer(tmp_path: Path) -> Packer:
    return Packer(tmp_path / "cache")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every image that is packed."""
    seen: list[Path] = []
    pack = erofs.pack

    def counted(folder: Path, image: Path) -> None:
        seen.append(image)
        pack(folder, image)

    monkeypatch.setattr(erofs, "pack", counted)
    return seen


async def test_an_overlay_becomes_one_read_only_disk_named_by_its_content(
    tmp_path: Path, packer: Packer
) -> None:
    made(tmp_path / "top", name="from the top", only_top="1")
    made(tmp_path / "bottom", name="from the bottom", only_bottom="1")
    plan = await packer.plan([overlay(tmp_path, "top", "bottom")], tmp_path)
    (disk,) = plan.layers
    assert (plan.writable, plan.read_only, disk.read_only, disk.file_system) == (None, False, True, "erofs")
    assert disk.digest == "sha256:" + hashlib.sha256(disk.path.read_bytes()).hexdigest()
    assert disk.size_bytes == disk.path.stat().st_size
    assert disk.path.stat().st_mode & 0o777 == 0o400
    names = listed(disk)
    assert all(name in names for name in ("name", "only_top", "only_bottom"))
    assert "from the top" in disk.path.read_bytes().decode(errors="replace")
    assert "from the bottom" not in disk.path.read_bytes().decode(errors="replace")


async def test_nothing_stays_mounted_whether_packing_succeeds_or_not(
    tmp_path: Path, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mounted_here()
    made(tmp_path / "a", x="1")
    await packer.plan([overlay(tmp_path, "a")], tmp_path)
    made(tmp_path / "upper", y="2")

    def fails(folder: Path, image: Path) -> None:
        raise Unavailable("root file system: mkfs.erofs failed: on purpose")

    monkeypatch.setattr(erofs, "pack", fails)
    with pytest.raises(Unavailable, match="on purpose"):
        await packer.plan([overlay(tmp_path, "a")], tmp_path)
    assert mounted_here() == before
    assert [
        path.name for path in (tmp_path / "cache/rootfs/images").iterdir() if path.name.startswith(".")
    ] == []


async def test_the_same_layers_are_looked_up_and_not_packed_again(
    tmp_path: Path, packer: Packer, packings: list[Path]
) -> None:
    made(tmp_path / "a", x="1")
    first = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    assert await Packer(tmp_path / "cache").plan([overlay(tmp_path, "a")], tmp_path) == first
    assert len(packings) == 1


async def test_the_same_content_elsewhere_is_the_same_disk(
    tmp_path: Path, packer: Packer, packings: list[Path]
) -> None:
    made(tmp_path / "a", x="1", y="2")
    one = made(tmp_path / "one", y="2", x="1")
    os.utime(one / "x", (1, 1))
    assert await packer.plan([bind(tmp_path / "a")], tmp_path) == await packer.plan([bind(one)], tmp_path)
    assert (await packer.plan([bind(one)], tmp_path)).layers == (await packer.pack_folder(one),)
    assert len(packings) == 1


async def test_two_hosts_pack_the_same_content_into_the_same_bytes(tmp_path: Path, packer: Packer) -> None:
    there = made(tmp_path / "there", a="1", b="2")
    (there / "link").symlink_to("a")
    (there / "hard").hardlink_to(there / "a")
    (there / "folder").mkdir()
    os.mkfifo(there / "fifo")
    shutil.copytree(there, tmp_path / "here", symlinks=True, ignore=shutil.ignore_patterns("hard", "fifo"))
    os.mkfifo(tmp_path / "here/fifo")
    (tmp_path / "here/hard").hardlink_to(tmp_path / "here/a")
    shutil.copystat(there, tmp_path / "here")
    one = (await packer.plan([bind(there)], tmp_path)).layers[0]
    other = (await Packer(tmp_path / "cache2").plan([bind(tmp_path / "here")], tmp_path)).layers[0]
    assert one.path != other.path
    assert one.digest == other.digest


async def test_what_the_snapshotter_had_changed_already_is_part_of_it(
    tmp_path: Path, packer: Packer, packings: list[Path]
) -> None:
    made(tmp_path / "a", x="1")
    plain = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    made(tmp_path / "upper", x="changed")
    changed = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    assert plain.layers[0].digest != changed.layers[0].digest
    assert b"changed" in changed.layers[0].path.read_bytes()
    assert len(packings) == 2


async def test_the_mode_of_the_root_counts(tmp_path: Path, packer: Packer) -> None:
    made(tmp_path / "a", x="1")
    plain = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    (tmp_path / "upper").chmod(0o700)
    assert (await packer.plan([overlay(tmp_path, "a")], tmp_path)).layers[0].digest != plain.layers[0].digest


async def test_a_folder_in_the_place_of_a_removed_one_is_not_taken_for_it(
    tmp_path: Path, packer: Packer
) -> None:
    """Its inode may be given out again at once, and times can be set: the time of birth cannot."""
    folder = made(tmp_path / "a", x="1")
    os.utime(folder, ns=(1, 1))
    one = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    shutil.rmtree(folder)
    made(tmp_path / "a", x="2")
    os.utime(folder, ns=(1, 1))
    other = await packer.plan([overlay(tmp_path, "a")], tmp_path)
    assert one.layers[0].digest != other.layers[0].digest


async def test_many_at_once_pack_one_content_once(tmp_path: Path, packings: list[Path]) -> None:
    made(tmp_path / "a", x="1" * 100_000)
    packers = [Packer(tmp_path / "cache") for _ in range(4)]
    plans = await asyncio.gather(
        *(packer.plan([bind(tmp_path / "a")], tmp_path) for packer in packers for _ in range(2))
    )
    assert len({plan.layers for plan in plans}) == 1
    assert len(packings) == 1


async def test_a_folder_that_is_written_to_while_it_is_packed_is_packed_again(
    tmp_path: Path, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "a", x="1")
    pack, times = erofs.pack, []

    def disturbed(where: Path, image: Path) -> None:
        times.append(image)
        if len(times) < 3:
            (folder / "x").write_text(f"changed {len(times)}")
        pack(where, image)

    monkeypatch.setattr(erofs, "pack", disturbed)
    plan = await packer.plan([bind(folder)], tmp_path)
    assert len(times) == 3
    assert b"changed 2" in plan.layers[0].path.read_bytes()
    made(folder, x="1")
    monkeypatch.setattr(tree, "fingerprint_of", lambda folder: "another")
    with pytest.raises(Unavailable, match="was written to each of the 3 times that it was packed"):
        await packer.plan([bind(folder)], tmp_path)


async def test_what_is_mounted_below_a_folder_is_not_part_of_it(tmp_path: Path, packer: Packer) -> None:
    folder = made(tmp_path / "a", x="1")
    (folder / "proc").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder / "proc")], check=True)
    try:
        made(folder / "proc", secret="mounted")
        disk = await packer.pack_folder(folder)
    finally:
        subprocess.run(["umount", str(folder / "proc")], check=True)
    assert "secret" not in listed(disk, "/proc")


@pytest.mark.parametrize("kind", ["link", "proc"])
async def test_a_link_in_the_place_of_a_source_is_refused(tmp_path: Path, packer: Packer, kind: str) -> None:
    made(tmp_path / "a", x="1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    path = {"link": tmp_path / "link", "proc": Path("/proc/self/root/etc")}[kind]
    with pytest.raises(Rejected, match=r"or a link: give the|or leads through one of /proc's"):
        await packer.plan([bind(path)], tmp_path)
    with pytest.raises(Rejected, match=r"or a link: give the|or leads through one of /proc's"):
        await packer.plan(
            [Mount("overlay", "overlay", options=(f"lowerdir={path}:{tmp_path / 'a'}",))], tmp_path
        )


async def test_a_source_that_is_gone_is_named(tmp_path: Path, packer: Packer) -> None:
    with pytest.raises(NotFound, match="/gone is not there: the snapshot may be gone"):
        await packer.plan([bind(tmp_path / "gone")], tmp_path)


async def test_paths_with_commas_colons_and_spaces_are_only_names(tmp_path: Path, packer: Packer) -> None:
    folder = made(tmp_path / "a,upperdir=x: y", x="1")
    assert "x" in listed((await packer.plan([bind(folder)], tmp_path)).layers[0])


def ext4(path: Path) -> Path:
    subprocess.run(["truncate", "-s", "4M", str(path)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
    return path


async def test_a_block_file_is_the_writable_disk_itself(tmp_path: Path, packer: Packer) -> None:
    file = ext4(tmp_path / "block")
    plan = await packer.plan([Mount("ext4", str(file), options=("loop", "rw"))], tmp_path)
    assert plan.layers == ()
    assert plan.writable == DiskFile(file, "ext4", 4 << 20, "", read_only=False)
    view = await packer.plan([Mount("ext4", str(file), options=("loop", "ro"))], tmp_path)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert (view.layers, view.read_only) == ((DiskFile(file, "ext4", 4 << 20, digest, read_only=True),), True)


async def test_layers_that_are_files_are_disks_as_they_are(
    tmp_path: Path, packer: Packer, packings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    for name in "ab":
        made(tmp_path / name, x=name)
        packed = await packer.plan([bind(tmp_path / name)], tmp_path)
        layers.append(Path(shutil.copy(packed.layers[0].path, tmp_path / f"{name}.erofs")))
        os.utime(layers[-1], (1, 1))
    packings.clear()
    mounts = [
        Mount("ext4", str(ext4(tmp_path / "rwlayer.img")), options=("rw", "loop")),
        *(Mount("erofs", str(path), options=("ro", "loop")) for path in layers),
        Mount(
            "format/mkdir/overlay",
            "overlay",
            options=(
                "lowerdir={{ overlay 1 2 }}",
                "upperdir={{ mount 0 }}/upper",
                "workdir={{ mount 0 }}/work",
            ),
        ),
    ]
    plan = await packer.plan(mounts, tmp_path)
    assert [disk.path for disk in plan.layers] == layers
    assert [disk.digest for disk in plan.layers] == [
        "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest() for path in layers
    ]
    assert plan.writable is not None
    assert (plan.writable.path, plan.writable.read_only) == (tmp_path / "rwlayer.img", False)
    assert packings == []
    monkeypatch.setattr(sources, "content_of", lambda descriptor: pytest.fail("it was hashed again"))
    assert await packer.plan(mounts, tmp_path) == plan


async def test_changes_in_a_folder_above_layer_files_are_the_topmost_layer(
    tmp_path: Path, packer: Packer
) -> None:
    made(tmp_path / "a", x="1")
    layer = (await packer.plan([bind(tmp_path / "a")], tmp_path)).layers[0]
    upper = made(tmp_path / "upper")
    stack = Mount(
        "format/overlay", "overlay", options=("lowerdir={{ mount 0 }}", f"upperdir={upper}", "workdir=/w")
    )
    mounts = [Mount("erofs", str(layer.path), options=("ro", "loop")), stack]
    assert (await packer.plan(mounts, tmp_path)).layers == (layer,)
    made(upper, y="2")
    top, below = (await packer.plan(mounts, tmp_path)).layers
    assert below == layer
    assert " y" in listed(top)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes"),
        (b"x" * 1000, "has 1000 bytes: a disk is a multiple of 512"),
        (b"\0" * 4096, "holds no ext4"),
    ],
)
async def test_a_file_that_is_no_disk_is_refused(
    tmp_path: Path, packer: Packer, content: bytes, words: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Rejected, match=words):
        await packer.plan([Mount("ext4", str(tmp_path / "file"), options=("loop", "rw"))], tmp_path)


async def test_a_device_and_a_folder_are_no_files(tmp_path: Path, packer: Packer) -> None:
    device = next((path for path in Path("/dev").iterdir() if path.is_block_device()), None)
    if device is not None:
        with pytest.raises(Rejected, match="is a block device, which is not handed on"):
            await packer.plan([Mount("ext4", str(device), options=("rw",))], tmp_path)
    with pytest.raises(Rejected, match="is no file"):
        await packer.plan([Mount("erofs", str(tmp_path), options=("ro",))], tmp_path)


async def test_without_mounts_the_bundle_names_the_folder(tmp_path: Path, packer: Packer) -> None:
    bundle = made(tmp_path / "bundle", **{"config.json": json.dumps({"root": {"path": "rootfs"}})})
    made(bundle / "rootfs", inside="1")
    assert "inside" in listed((await packer.plan([], bundle)).layers[0])
    (bundle / "config.json").write_text("{}")
    with pytest.raises(Rejected, match=r"rootfs is empty, and .*config.json names no root.path"):
        await packer.plan([], bundle)


async def test_a_scratch_disk_is_made_where_it_is_asked_for_and_needed(
    tmp_path: Path, packer: Packer
) -> None:
    made(tmp_path / "a", x="1")
    scratch = tmp_path / "run" / "scratch.ext4"
    plan = await packer.plan([bind(tmp_path / "a")], tmp_path, scratch_file=scratch)
    assert plan.writable is not None
    assert (plan.writable.path, plan.writable.scratch, plan.writable.read_only) == (scratch, True, False)
    assert scratch.stat().st_size == plan.writable.size_bytes
    assert scratch.stat().st_blocks * 512 < 32 << 20
    with pytest.raises(Unavailable, match=r"scratch disk .* cannot be made: File exists"):
        await packer.plan([bind(tmp_path / "a")], tmp_path, scratch_file=scratch)
    view = Mount("bind", str(tmp_path / "a"), options=("rbind", "ro"))
    other = tmp_path / "other.ext4"
    assert (await packer.plan([view], tmp_path, scratch_file=other)).writable is None
    assert not other.exists()


async def test_the_cache_is_kept_small_while_images_are_packed(tmp_path: Path) -> None:
    packer = Packer(tmp_path, cache=ImageCache(tmp_path / "cache", count_max=1))
    for name in "abc":
        made(tmp_path / name, x=name)
        disk = await packer.pack_folder(tmp_path / name)
        os.utime(disk.path, (1000 + ord(name), 1000 + ord(name)))
    made(tmp_path / "d", x="d")
    newest = await packer.pack_folder(tmp_path / "d")
    assert [image.path for image in ImageCache(tmp_path / "cache").all()] == [newest.path]


def test_a_key_is_of_the_layers_and_of_the_program_that_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Folders((str(made(tmp_path / "a")),), upper=str(made(tmp_path / "upper")))
    key = sources.key_of_layers(recipe)
    assert key is not None
    assert sources.key_of_layers(recipe) == key
    monkeypatch.setattr(erofs, "packer_identity", lambda: "another release")
    assert sources.key_of_layers(recipe) not in (None, key)
    made(tmp_path / "upper", x="1")
    assert sources.key_of_layers(recipe) is None
    assert sources.key_of_layers(Folders(recipe.lower)) is None
