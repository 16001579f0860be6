"""The Go program of this folder: containerd's own ttrpc, built once per content and kept in .cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parent / "go"
CACHE: Final = Path(__file__).resolve().parents[2] / ".cache" / "interop"
USUAL_PLACES: Final = ("/usr/local/go/bin", "/usr/lib/go/bin")
GO_MINOR_MIN: Final = 22
BUILD_S: Final = 300


class NoGo(Exception):
    """There is no Go here; the message says so loudly."""


def find_go() -> str:
    """A `go` that is new enough.

    Raises:
        NoGo: there is none in PATH or in its usual places.
    """
    for place in (None, *USUAL_PLACES):
        go = shutil.which("go", path=place)
        if go is not None and _minor(go) >= GO_MINOR_MIN:
            return go
    raise NoGo(
        f"NO GO 1.{GO_MINOR_MIN} HERE: nothing is checked against containerd's own ttrpc. `./run setup go` installs it."
    )


def _minor(go: str) -> int:
    told = subprocess.run(
        [go, "env", "GOVERSION"], capture_output=True, text=True, check=False, timeout=BUILD_S
    )
    version = re.match(r"go1\.(\d+)", told.stdout)
    return int(version[1]) if version else 0


def go_program() -> Path:
    """The built program.

    Raises:
        NoGo: see `find_go`.
        subprocess.CalledProcessError: it does not build; its output has been printed.
    """
    go = find_go()
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix in {".go", ".mod", ".sum"})
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"interop-{digest}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        building = CACHE / f"building-{os.getpid()}"
        subprocess.run([go, "build", "-o", building, "."], cwd=SOURCE, check=True, timeout=BUILD_S)
        building.rename(program)
    return program


def main() -> None:
    """Build it before the tests, whose own bound is meant for testing: the first time modules are fetched."""
    try:
        print(go_program(), file=sys.stderr)
    except NoGo as missing:
        print(missing, file=sys.stderr)
        sys.exit(1 if os.environ.get("CI") else 0)


if __name__ == "__main__":
    main()
