"""Templates on disk: which one fits, made once, pruned by use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sandshift.errors import NoRoom, Rejected
from sandshift.image.store import GuestImage
from sandshift.image.template import Template, TemplateStore, key_of, over_limits
from tests.image import rig
from tests.image.test_store import description

IMAGE = GuestImage(Path("/nowhere"), description("a" * 64))
MACS = ("52:54:00:00:00:01",)


def shape(macs=MACS):
    return rig.shape(IMAGE, macs)


def test_the_identity_of_a_sandbox_makes_no_difference():
    assert key_of(IMAGE, shape()) == key_of(IMAGE, shape(("52:54:00:00:00:02",)))


@pytest.mark.parametrize(
    "other",
    [
        replace(shape(), qemu_version="10.1.0"),
        replace(shape(), memory_bytes=512 << 20),
        replace(shape(), vcpus=2),
        replace(shape(), machine_type="pc-q35-9.2"),
        replace(shape(), cpu_model="qemu64"),
        replace(shape(), shared_memory=True),
        shape(()),
    ],
)
def test_another_machine_needs_another_template(other):
    assert key_of(IMAGE, other) != key_of(IMAGE, shape())


def test_another_image_needs_another_template():
    other = GuestImage(Path("/nowhere"), description("b" * 64))
    assert key_of(other, shape()) != key_of(IMAGE, shape())


async def test_a_template_is_made_once_however_many_ask(tmp_path):
    made = 0

    async def save(path: Path) -> None:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        path.write_bytes(b"memory")

    stores = [TemplateStore(tmp_path) for _ in range(4)]
    paths = await asyncio.gather(*(store.ensure("abc", save) for store in stores))
    assert made == 1
    assert set(paths) == {tmp_path / "templates/abc/memory"}
    assert paths[0].read_bytes() == b"memory"
    assert paths[0].stat().st_mode & 0o777 == 0o400
    assert (tmp_path / "templates").stat().st_mode & 0o077 == 0


async def test_a_failed_or_cancelled_save_leaves_nothing_and_the_next_succeeds(tmp_path):
    store = TemplateStore(tmp_path)
    started = asyncio.Event()

    async def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    async def hang(path: Path) -> None:
        path.write_bytes(b"half")
        started.set()
        await asyncio.Event().wait()

    async def save(path: Path) -> None:
        path.write_bytes(b"whole")

    with pytest.raises(NoRoom, match=r"template .*/abc cannot be written: No space left"):
        await store.ensure("abc", fail)
    hanging = asyncio.create_task(store.ensure("abc", hang))
    await started.wait()
    waiting = asyncio.create_task(TemplateStore(tmp_path).ensure("abc", save))
    await asyncio.sleep(0)
    hanging.cancel()
    assert (await waiting).read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "templates").iterdir() if path.name != ".lock"] == ["abc"]


async def test_the_longest_unused_go_first(tmp_path):
    store = TemplateStore(tmp_path, count_max=2)

    async def save(path: Path) -> None:
        path.write_bytes(b"memory")

    await store.ensure("a1", save)
    await store.ensure("b2", save)
    assert store.find("a1") is not None
    await store.ensure("c3", save)
    assert [template.key for template in store.all()] == ["c3", "a1"]
    store.drop("a1")
    store.drop("a1")
    assert store.find("a1") is None


def template(key: str, size: int, used: float) -> Template:
    return Template(key, Path(key), size, used)


@pytest.mark.parametrize(
    ("count_max", "bytes_max", "dropped"),
    [(9, 1000, []), (2, 1000, ["old"]), (9, 60, ["old"]), (9, 45, ["big"]), (0, 1000, ["new", "big", "old"])],
)
def test_both_limits_are_kept(count_max, bytes_max, dropped):
    templates = [template("old", 20, 1.0), template("big", 30, 2.0), template("new", 20, 3.0)]
    gone = over_limits(templates, count_max=count_max, bytes_max=bytes_max)
    assert [one.key for one in gone] == dropped


async def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "templates").write_text("")

    async def save(path: Path) -> None:
        raise AssertionError

    with pytest.raises(Rejected, match=r"cannot be written: File exists; set places.cache_dir"):
        await TemplateStore(tmp_path).ensure("abc", save)
