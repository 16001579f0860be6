"""The Go program of this folder: containerd's own ttrpc, built once per content and kept in .cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parent / "go"
CACHE: Final = Path(__file__).resolve().parents[2] / ".cache" / "interop"
USUAL_PLACES: Final = ("/usr/local/go/bin", "/usr/lib/go/bin")
BUILD_S: Final = 300


class NoGo(Exception):
    """There is no Go here; the message says so loudly."""


def go_program() -> Path:
    """The built program.

    Raises:
        NoGo: no `go` in PATH or in its usual places.
        subprocess.CalledProcessError: it does not build; its output has been printed.
    """
    go = shutil.which("go") or shutil.which("go", path=os.pathsep.join(USUAL_PLACES))
    if go is None:
        raise NoGo(
            "NO GO HERE: nothing is checked against containerd's own ttrpc. `./run setup go` installs it."
        )
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix in {".go", ".mod", ".sum"})
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"interop-{digest}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        building = CACHE / f"building-{os.getpid()}"
        subprocess.run([go, "build", "-o", building, "."], cwd=SOURCE, check=True, timeout=BUILD_S)
        building.rename(program)
    return program
