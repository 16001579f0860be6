"""The bundle of a container that counts, for real VMs: busybox and nothing else, as `--bundle` wants it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

COUNT = "i=0; while :; do printf '%08d\\n' $i; i=$((i+1)); done"
CAPABILITIES = ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"]


def make_bundle(folder: Path) -> Path:
    """Needs busybox-static, as ./run installs it. Blocks."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is not installed: ./run setup vm-tests"
    root = folder / "rootfs"
    for name in ("bin", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copyfile(busybox, root / "bin" / "busybox")
    (root / "bin" / "busybox").chmod(0o755)
    for name in ("sh", "printf", "true"):
        (root / "bin" / name).symlink_to("busybox")
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", COUNT],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount")]},
    }
    (folder / "config.json").write_text(json.dumps(spec))
    return folder
