"""A real containerd of our own: private folders, a network namespace that stands for its host, our shim as its runtime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from sandshift.cli.demo.leftovers import end_processes
from sandshift.shim import launcher
from tests.containerd.image import PAUSE, make_image

ROOT: Final = Path(__file__).resolve().parents[2]
INSTALLED: Final = ROOT / ".cache" / "containerd"
TOOLS: Final = INSTALLED / "tools" / "usr"
CNI_PLUGINS: Final = TOOLS / "lib" / "cni"
T = TypeVar("T")
RUNTIME: Final = "io.containerd.sandshift.v2"
HOWTO: Final = ROOT / "docs" / "howto" / "containerd.md"
READY_S: Final = 20.0
COMMAND_S: Final = 60.0
STOP_S: Final = 10.0
LOOK_S: Final = 0.05

CONFIG_NEW: Final = """
version = 3
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{folder}/c.sock"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  enable_selinux = false
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "sandshift"
{runtime}
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni}"]
    conf_dir = "{folder}/cni"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
"""
CONFIG_OLD: Final = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{folder}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  enable_selinux = false
  sandbox_image = "{pause}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "sandshift"
    snapshotter = "overlayfs"
{runtime}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{folder}/cni"
"""
KINDS: Final = ("old", "middle", "new")
VERSIONS: Final = {"old": "1.6", "middle": "1.7"}
"""Of those that not every distribution's archive has: Debian 12's has both, Debian 13's no 1.6, Ubuntu's neither. Where it has
them, ./run setup containerd fetches them or fails."""
SANDSHIFT: Final = """
[host]
name = "{name}"
{more}
[places]
run_dir = "{folder}/s"
state_dir = "{folder}/v"
[vm]
memory_mib = 192
"""


@dataclass
class Containerd:
    """`kind`: "new" (2.1 or newer), "middle" (1.7) or "old" (1.6). `network_namespace`: its host; empty: this machine's own."""

    kind: str
    folder: Path
    name: str = "host"
    network_namespace: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        return self.folder / "c.sock"

    @property
    def _binaries(self) -> Path:
        return INSTALLED / self.kind / "usr" / "bin"

    @property
    def environment(self) -> dict[str, str]:
        path = [self.folder / "bin", self._binaries, TOOLS / "sbin", TOOLS / "bin"]
        return {
            "PATH": ":".join(
                [*map(str, path), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
            ),
            "SANDSHIFT_CONFIG": str(self.folder / "sandshift.toml"),
            "HOME": str(self.folder),
        }

    def set_up(self, more: str = "") -> None:
        for folder in ("bin", "cni"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        config, runtime = CONFIG_NEW, documented("toml containerd")
        if self.kind != "new":
            config, runtime = CONFIG_OLD, documented("toml containerd 1")
        (self.folder / "config.toml").write_text(
            config.format(folder=self.folder, cni=CNI_PLUGINS, runtime=runtime, pause=PAUSE)
        )
        (self.folder / "sandshift.toml").write_text(
            SANDSHIFT.format(folder=self.folder, name=self.name, more=more)
        )
        launcher.install(self.folder / "bin")

    def start(self) -> None:
        enter = ["nsenter", f"--net=/run/netns/{self.network_namespace}"] if self.network_namespace else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*enter, self._binaries / "containerd", "-c", self.folder / "config.toml", "-l", "debug"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + READY_S
        while self.ctr("version", check=False).returncode != 0:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(LOOK_S)  # There is nothing to wait on: a socket appears, and answers some time later.

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-20_000:]

    def shim_logs(self) -> str:
        logs = sorted((self.folder / "s").glob("*/*/shim.log"))
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-6000:]}" for path in logs)

    def ctr(
        self, *arguments: str | Path, check: bool = True, stdin: bytes = b"", timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[bytes]:
        ran = subprocess.run(
            self.ctr_command(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or ran.returncode == 0, f"ctr {arguments}: {ran}\n{self.shim_logs()}"
        return ran

    def ctr_command(self, *arguments: str | Path) -> list[str]:
        return [str(self._binaries / "ctr"), "-a", str(self.socket), "-n", "k8s.io", *map(str, arguments)]

    def import_image(self) -> None:
        self.ctr("image", "import", make_image(self.folder / "image.tar"))
        if self.kind != "new":
            pause = make_image(self.folder / "pause.tar", PAUSE, ("sleep", "100000"))
            self.ctr("image", "import", pause)

    def kill(self) -> None:
        """SIGKILL; its shims stay."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def clean(self) -> None:
        """Nothing of it stays: daemon, shims, machines, mounts, files."""
        self.stop()
        end_processes([self.network_namespace] if self.network_namespace else [], self.folder)
        for mount in sorted(mounts_below(self.folder), key=len, reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_cni(folder: Path, plugin: dict[str, Any]) -> None:
    """One network for a daemon's pods. Before it starts: it looks into the folder then."""
    document = {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}
    (folder / "cni" / "10-pods.conflist").write_text(json.dumps(document))


def eventually(found: Callable[[], T], *, bound_s: float = 30.0) -> T:
    """What `found` gives once it is true. For what gives no sign of its own."""
    deadline_s = time.monotonic() + bound_s
    while not (value := found()):
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(LOOK_S)
    return value


def documented(kind: str) -> str:
    """The first block of that kind in our how-to: what it tells is what runs here."""
    return next(text for named, text in blocks() if named == kind)


def blocks() -> list[tuple[str, str]]:
    """The how-to's blocks in order: what stands behind the ticks ("sh a"), and the text."""
    return re.findall(r"^```(\w[^\n]*)\n(.*?)^```", HOWTO.read_text(), re.MULTILINE | re.DOTALL)


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")]


@contextlib.contextmanager
def containerd(
    kind: str,
    folder: Path,
    *,
    name: str = "host",
    network_namespace: str = "",
    cni: dict[str, Any] | None = None,
    sandshift: str = "",
) -> Iterator[Containerd]:
    """One that runs and has the image. `cni`: the plugin that makes its pods' network; `sandshift`: more configuration."""
    daemon = Containerd(kind, folder, name, network_namespace)
    try:
        daemon.set_up(sandshift)
        if cni is not None:
            write_cni(daemon.folder, cni)
        daemon.start()
        daemon.import_image()
        yield daemon
    finally:
        daemon.clean()


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Sockets' paths have room for 106 bytes."""
    with tempfile.TemporaryDirectory(prefix="ctd-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
