"""QEMU 7.2 beside the installed one, unpacked from the distribution's own archive: it loses guest writes under TCG."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
SUITE = "bookworm"
FETCH_S = 120


@dataclass(frozen=True, slots=True)
class UnpackedQemu:
    binary: Path
    data_dirs: tuple[str, ...]


def unpacked_qemu_72() -> UnpackedQemu:
    """Fetched and unpacked once per machine; skips the test where it cannot be had."""
    if platform.freedesktop_os_release().get("VERSION_CODENAME") != SUITE:
        pytest.skip(f"optional: QEMU 7.2 is in Debian {SUITE} only")
    folder = Path(tempfile.gettempdir()) / "sandshift-test-qemu-7.2"
    if not (folder / "complete").exists():
        _fetch(folder)
    root = folder / "root"
    return UnpackedQemu(
        root / "usr/bin/qemu-system-x86_64",
        (str(root / "usr/share/qemu"), str(root / "usr/share/seabios")),
    )


def _fetch(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    try:
        for package in PACKAGES:
            subprocess.run(
                ["apt-get", "-q", "download", f"{package}/{SUITE}"],
                cwd=folder,
                check=True,
                capture_output=True,
                timeout=FETCH_S,
            )
        for archive in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, folder / "root"], check=True)
        said = subprocess.run(
            [folder / "root/usr/bin/qemu-system-x86_64", "--version"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"optional: QEMU 7.2 cannot be had here: {error}")
    if "version 7.2" not in said:
        pytest.skip(f"optional: the archive's QEMU of {SUITE} is {said.splitlines()[0]!r}")
    (folder / "complete").touch()
