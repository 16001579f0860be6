"""Building images: what is refused in one line, what makes a recipe, and that the same inputs give the same bytes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sandshift.errors import NoRoom, NotSupported, Unavailable
from sandshift.image import base, build, distribution, own, store
from sandshift.image.apt import Package, explain, without_hooks

BUILDS_S = 900
"""For two builds, which take a minute on a quiet machine."""


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, "debian 12"),
        ({"ID": "debian", "VERSION_ID": "13"}, "debian 13"),
        ({"ID": "ubuntu", "VERSION_ID": "25.04"}, "ubuntu 25.04"),
        ({"ID": "ubuntu", "VERSION_ID": "26.04"}, "ubuntu 26.04"),
    ],
)
def test_supported_distributions(release, expected):
    assert distribution.supported_distribution(release) == expected


@pytest.mark.parametrize(
    "release",
    [
        {"ID": "debian", "VERSION_ID": "11", "PRETTY_NAME": "Debian 11"},
        {"ID": "debian", "PRETTY_NAME": "Debian sid"},
        {"ID": "ubuntu", "VERSION_ID": "24.04", "PRETTY_NAME": "Ubuntu 24.04"},
        {"ID": "fedora", "VERSION_ID": "44", "PRETTY_NAME": "Fedora 44"},
        {},
    ],
)
def test_other_distributions_are_refused_by_name(release):
    with pytest.raises(
        NotSupported, match=r"is not supported: build it on Debian 12 or 13, or Ubuntu 25.04"
    ) as raised:
        distribution.supported_distribution(release)
    assert release.get("PRETTY_NAME", "unknown") in raised.value.message


@pytest.mark.parametrize(
    ("complaint", "error", "message"),
    [
        (
            "E: Failed to fetch http://x  Temporary failure resolving 'x'",
            Unavailable,
            "the package archive cannot be reached",
        ),
        ("E: You don't have enough free space in /var/cache/", NoRoom, "has no disk space for the packages"),
        (
            "E: Unable to locate package runc",
            NotSupported,
            "Unable to locate package runc; the host's apt sources must be",
        ),
        ("E: something new", Unavailable, "apt-get failed: something new"),
        ("", Unavailable, "apt-get failed: no reason given"),
    ],
)
def test_what_apt_says_becomes_one_line_that_says_what_to_do(complaint, error, message):
    raised = explain("apt-get", complaint)
    assert type(raised) is error
    assert message in raised.message
    assert "\n" not in raised.message


def test_the_hosts_proxies_are_used_and_its_hooks_are_not():
    dumped = """Acquire::http::Proxy "http://proxy:3128";
APT::Update::Post-Invoke "";
APT::Update::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb || true";
DPkg::Pre-Install-Pkgs:: "/usr/sbin/apt-listchanges";
AptCli::Hooks::Search:: "/usr/lib/hook";
Dir::Etc::parts "apt.conf.d";
Dir::Etc::sourceparts "sources.list.d";"""
    assert without_hooks(dumped).splitlines() == [
        'Acquire::http::Proxy "http://proxy:3128";',
        'Dir::Etc::sourceparts "sources.list.d";',
        'Dir::Etc::main "/dev/null";',
        'Dir::Etc::parts "/dev/null";',
    ]


def test_a_package_file_is_told_by_name_and_version():
    package = Package("busybox-static_1%3a1.35.0-4+b1_amd64.deb", 5)
    assert str(package) == "busybox-static 1:1.35.0-4+b1"


def test_missing_tools_are_named_with_their_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        NotSupported, match=r"mkfs.erofs and dpkg-deb not found: apt-get install erofs-utils dpkg"
    ):
        build.build(tmp_path)


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(1 << 40, 0, 100 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(build, "_mkfs_version", lambda: "1")
    with pytest.raises(NoRoom, match=r"has 100 MiB free and 600 are needed"):
        build.build(tmp_path)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")
@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed")
def test_without_a_network_it_says_so_and_leaves_no_image(tmp_path):
    sources = tmp_path / "sources.list"
    sources.write_text("deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n")
    with pytest.raises(
        Unavailable, match="the package archive cannot be reached, check network and apt sources"
    ):
        build.build(tmp_path / "cache", sources=sources)
    assert store.published(tmp_path / "cache") == []
    assert not list((tmp_path / "cache/images").glob(".work-*"))


def test_our_own_part_holds_the_agent_and_what_it_imports_and_nothing_of_the_host():
    places = [file.place for file in own.files()]
    for wanted in ("start.py", "sandshift/agent/main.py", "sandshift/link/stream.py", "ttrpc/__init__.py"):
        assert f"opt/sandshift/{wanted}" in places
    assert any(place.endswith(".so") for place in places)
    for room in ("shim", "vmm", "session", "cli", "image"):
        assert not [place for place in places if f"sandshift/{room}/" in place]


def test_a_changed_agent_is_another_image():
    files = own.files()
    changed = [*files[:-1], own.OwnFile(files[-1].place, None, b"changed")]
    assert own.digest(files) == own.digest(own.files())
    assert own.digest(changed) != own.digest(files)


def deb_tree(folder: Path, **files: bytes) -> io.BytesIO:
    del folder
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size, member.mode = len(content), 0o4755
            archive.addfile(member, io.BytesIO(content))
    stream.seek(0)
    return stream


def test_packages_go_into_merged_folders_without_their_manuals(tmp_path):
    root = tmp_path / "root"
    stream = deb_tree(
        root,
        **{
            "./bin__tool": b"1",
            "./lib__x86_64-linux-gnu__libx.so": b"2",
            "./usr__share__doc__x__copyright": b"3",
            "./usr__lib__python3.11__test__t.py": b"4",
            "..__escape": b"5",
        },
    )
    base._unpack_tar(stream, root, base._LEFT_OUT)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert found == ["usr/bin/tool", "usr/lib/x86_64-linux-gnu/libx.so"]
    assert (root / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed")
def test_the_packed_root_is_the_same_whatever_order_and_time_its_files_were_made_in(tmp_path):
    names = [f"file{number}" for number in range(40)]
    for place, order in (("one", names), ("two", names[::-1])):
        (tmp_path / place / "sub").mkdir(parents=True)
        for name in order:
            (tmp_path / place / "sub" / name).write_text(name * 100)
            os.utime(tmp_path / place / "sub" / name, (len(place + name), 5))
        build.pack_erofs(tmp_path / place, tmp_path / f"{place}.erofs")
    assert (tmp_path / "one.erofs").read_bytes() == (tmp_path / "two.erofs").read_bytes()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed")
@pytest.mark.timeout(BUILDS_S)
def test_two_builds_from_nothing_in_different_places_give_the_same_bytes(tmp_path):
    lines: list[str] = []
    first = build.build(tmp_path / "first", progress=lines.append)
    second = build.build(tmp_path / "a longer path" / "second")
    assert first.description == second.description
    for name in (store.KERNEL, store.INITRAMFS, store.ROOT, store.DESCRIPTION):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    assert len(lines) == 5
    assert build.find(tmp_path / "first") == first
    assert build.build(tmp_path / "first") == first
    first.verify()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed")
@pytest.mark.timeout(BUILDS_S)
def test_two_builders_at_once_make_one_image(tmp_path):
    program = f"from pathlib import Path; from sandshift.image.build import build; print(build(Path({str(tmp_path)!r})).id)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    builders = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    ids = {builder.communicate()[0] for builder in builders}
    assert len(ids) == 1
    assert len(store.published(tmp_path)) == 1
