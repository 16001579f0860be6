"""Containers of one pod without the Sandbox API, as CRI has them with the podsandbox sandboxer: one shim, one machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containerd.conftest import needs_kind
from tests.containerd.cri import IMAGE
from tests.containerd.daemon import (
    KINDS,
    RUNTIME,
    Containerd,
    containerd,
    eventually,
    short_folder,
)
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture(params=KINDS)
def daemon(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    needs_kind(request.param)
    with short_folder() as folder, containerd(request.param, folder) as made:
        yield made


def run(daemon: Containerd, name: str, kind: str) -> None:
    annotations = (f"io.kubernetes.cri.container-type={kind}", "io.kubernetes.cri.sandbox-id=pod")
    words = [word for one in annotations for word in ("--annotation", one)]
    daemon.ctr("run", "-d", "--runtime", RUNTIME, *words, IMAGE, name, "sleep", "1000")


def shims(daemon: Containerd) -> list[str]:
    return [path.parent.name for path in (daemon.folder / "s").glob("*/*/shim.pid")]


def boot_id(daemon: Containerd, name: str) -> bytes:
    return daemon.ctr("task", "exec", "--exec-id", f"look-{name}", name, "cat", BOOT_ID).stdout


def end(daemon: Containerd, name: str) -> None:
    daemon.ctr("task", "kill", "-s", "KILL", name)
    eventually(
        lambda: name not in daemon.ctr("task", "ls").stdout.decode() or "STOPPED" in _line(daemon, name)
    )
    daemon.ctr("task", "delete", name, check=False)
    daemon.ctr("container", "delete", name)


def _line(daemon: Containerd, name: str) -> str:
    listed = daemon.ctr("task", "ls").stdout.decode().splitlines()
    return next((line for line in listed if line.split()[0] == name), "")


def test_a_pods_containers_are_in_one_machine_until_the_last_has_gone(daemon: Containerd) -> None:
    run(daemon, "pod", "sandbox")
    run(daemon, "web", "container")
    assert shims(daemon) == ["pod"]
    assert boot_id(daemon, "pod") == boot_id(daemon, "web") != b""
    end(daemon, "web")
    assert "RUNNING" in _line(daemon, "pod")
    run(daemon, "web", "container")
    assert boot_id(daemon, "web") == boot_id(daemon, "pod")
    end(daemon, "web")
    end(daemon, "pod")
    eventually(lambda: not shims(daemon))
