"""The distribution's part of the guest's root: unpacked packages, without what a guest never reads, compiled.

Needs no root: owners are set when the root is packed. The folder is the same for the same packages, and kept: a change
of our own code does not unpack it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from sandshift.errors import NoRoom, NotSupported, Unavailable

PACKAGES: Final = ("python3", "runc", "iproute2", "busybox-static", "libstdc++6")
"""libstdc++6 is for protobuf's compiled core."""
KERNEL_PACKAGES: Final = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}

_NOT_UNPACKED: Final = (
    "debconf",
    "dpkg",
    "tar",
    "readline-common",
    "perl-base",
    "media-types",
    "libdb5.3",
    "init-system-helpers",
)
"""Named by dependencies of packages' scripts, which never run here."""
_MERGED: Final = ("bin", "sbin", "lib", "lib64")
"""Folders that are links into usr/, as on every supported distribution."""
_LEFT_OUT: Final = (
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/info/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/share/bug/",
    "usr/share/bash-completion/",
    "usr/share/pixmaps/",
    "usr/share/applications/",
    "usr/share/binfmts/",
    "usr/share/python3/",
    "usr/share/polkit-1/",
    "usr/share/initramfs-tools/",
    "usr/lib/x86_64-linux-gnu/gconv/",
    "usr/lib/x86_64-linux-gnu/perl-base/",
    "usr/lib/systemd/",
    "etc/cron",
    "etc/init.d/",
    "etc/systemd/",
    "var/",
)
_LEFT_OUT_OF_PYTHON: Final = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "distutils",
    "pydoc_data",
    "venv",
)
_EMPTY_FOLDERS: Final = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "mnt",
    "home",
    "var/lib",
    "var/log",
    "var/tmp",
)
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "sandbox\n",
    "etc/resolv.conf": "",
    "etc/machine-id": "",
}


def unpack(package_files: Sequence[Path], root: Path) -> None:
    """Unpack `package_files` into the new folder `root` and make it a whole root."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package_file in sorted(package_files, key=lambda path: path.name):
        if package_file.name.split("_", 1)[0] not in _NOT_UNPACKED:
            _unpack_one(package_file, root, _LEFT_OUT)
    for folder in _EMPTY_FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    _link_busybox(root)


def unpack_kernel(package_files: Sequence[Path], folder: Path) -> None:
    """Unpack a kernel's packages, whole: lib/modules is found under usr/lib."""
    folder.mkdir(parents=True)
    for package_file in package_files:
        _unpack_one(package_file, folder, ("usr/share/",))


def compile_python(root: Path, folder: str) -> None:
    """Compile every module under `root`/`folder` with the root's own Python, so that the guest never does.

    The byte code is marked as unchecked: the guest does not compare it with its source. Runs the root's interpreter
    through the root's loader, so neither chroot nor the same distribution on the host is needed.
    """
    program = (
        "import compileall, py_compile, sys\n"
        "mode = py_compile.PycInvalidationMode.UNCHECKED_HASH\n"
        "root, folder = sys.argv[1:]\n"
        "ok = compileall.compile_dir(folder, stripdir=root, prependdir='/', quiet=2, force=True,\n"
        "                            maxlevels=20, invalidation_mode=mode)\n"
        "sys.exit(0 if ok else 1)\n"
    )
    done = subprocess.run(
        [*_interpreter(root), "-S", "-B", "-c", program, str(root), str(root / folder)],
        env={"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Unavailable(
            f"guest image: {folder} does not compile: {(done.stderr or done.stdout).strip()[-300:]}"
        )


def check_imports(root: Path, folder: str, modules: Sequence[str]) -> None:
    """Import `modules` from `root`/`folder` with the root's own Python, so that what is missing is known before it boots.

    Raises:
        NotSupported: one of them cannot be imported, with Python's last words.
    """
    program = "import sys; sys.path.append(sys.argv[1]); [__import__(name) for name in sys.argv[2:]]"
    done = subprocess.run(
        [*_interpreter(root), "-S", "-B", "-c", program, str(root / folder), *modules],
        env={"PYTHONHOME": str(root / "usr"), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise NotSupported(f"guest image: the guest's Python cannot run the agent: {said[0]}")


def python_version(root: Path) -> str:
    """ "3.11", of the root's Python."""
    versions = sorted(path.name.removeprefix("python") for path in (root / "usr/bin").glob("python3.[0-9]*"))
    if not versions:
        raise NotSupported("guest image: the distribution's python3 package has no interpreter")
    return versions[0]


def _interpreter(root: Path) -> list[str]:
    libraries = ":".join(str(root / "usr" / folder) for folder in ("lib/x86_64-linux-gnu", "lib", "lib64"))
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    program = root / "usr/bin" / f"python{python_version(root)}"
    # The loader is often an absolute link, which would lead to the host's.
    if loader.is_symlink():
        loader = root / "usr/lib/x86_64-linux-gnu" / loader.readlink().name
    return [str(loader), "--library-path", libraries, str(program)]


def _unpack_one(package_file: Path, root: Path, left_out: Sequence[str]) -> None:
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package_file)], stdout=subprocess.PIPE)
    except FileNotFoundError as error:
        raise NotSupported("guest image: dpkg-deb is not on this host: apt-get install dpkg") from error
    assert process.stdout is not None
    try:
        _unpack_tar(process.stdout, root, tuple(left_out))
    except OSError as error:
        if isinstance(error, tarfile.TarError) or error.errno is None:
            raise Unavailable(f"guest image: {package_file.name} cannot be read") from error
        raise NoRoom(f"guest image: {package_file.name} cannot be unpacked: {error.strerror}") from error
    finally:
        process.stdout.close()
        status = process.wait()
    if status != 0:
        raise Unavailable(f"guest image: {package_file.name} cannot be read")


def _unpack_tar(stream: IO[bytes], root: Path, left_out: tuple[str, ...]) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = _place(member.name)
            if name and not f"{name}/".startswith(left_out) and not _is_unused_python(name):
                _unpack_member(archive, member, root / name, root)


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, root: Path) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
    elif member.islnk():
        linked = root / _place(member.linkname)
        if linked.exists():
            path.hardlink_to(linked)
    elif member.isreg():
        content = archive.extractfile(member)
        assert content is not None
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)
        path.chmod(member.mode & 0o755 | 0o600)


def _place(name: str) -> str:
    """Where a package's path goes: without "./", and in usr/ if its folder is merged. Empty: nowhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return ""
    if len(parts) > 1 and parts[0] in _MERGED:
        return "/".join(["usr", *parts])
    return "" if len(parts) == 1 and parts[0] in _MERGED else "/".join(parts)


def _is_unused_python(name: str) -> bool:
    parts = name.split("/")
    return (
        len(parts) > 3
        and parts[1] == "lib"
        and parts[2].startswith("python3")
        and parts[3] in _LEFT_OUT_OF_PYTHON
    )


def _link_busybox(root: Path) -> None:
    """A link for each busybox command that no package brings."""
    busybox = root / "usr/bin/busybox"
    listed = subprocess.run(
        [str(busybox), "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        if not any(os.path.lexists(root / "usr" / folder / name) for folder in ("bin", "sbin")):
            (root / "usr/bin" / name).symlink_to("busybox")
