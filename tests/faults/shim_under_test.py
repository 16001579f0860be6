"""The shim's program with a hook at every step of a session, for traps (`trap.py`). Otherwise it is the shim as it is.

The harness has its shims started by this instead of by `containerd-shim-sandshift-v2`: a file that `write_program` makes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sandshift.config import PATH_VARIABLE
from sandshift.shim import bootstrap, start
from tests.faults.trap import Hooks

ROOT = Path(__file__).resolve().parents[2]


def write_program(folder: Path) -> Path:
    """An executable file that is this program."""
    path = folder / "shim-under-test"
    lines = (
        f"#!{sys.executable}",
        "import sys",
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'src')]!r}",
        "from tests.faults.shim_under_test import main",
        "main()",
    )
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o700)
    return path


def main() -> None:
    detach = start._detach

    def detach_and_hook(log_path: Path) -> None:
        detach(log_path)
        from tests.faults.hooks import install  # noqa: PLC0415 - `start` answers before all that is loaded

        install(Hooks(Path(os.environ[PATH_VARIABLE])))

    start._detach = detach_and_hook
    bootstrap.main()
