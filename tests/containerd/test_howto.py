"""docs/howto/containerd.md, command by command, on two containerds that are its hosts a and b."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd.daemon import ROOT, Containerd, blocks, containerd, short_folder
from tests.containerd.network import two_hosts
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

BLOCK_S = 120
USUAL = "/usr/local/bin"


@pytest.fixture
def hosts() -> Iterator[dict[str, Containerd]]:
    with two_hosts(f"ctd-d{os.getpid()}") as network, short_folder() as one, short_folder() as other:
        more = {
            name: f'network_namespace = "{namespace}"\nmigration_address = "{address}"'
            for name, namespace, address in (
                ("a", network.a, network.address_a),
                ("b", network.b, network.address_b),
            )
        }
        with (
            containerd("new", one, name="a", network_namespace=network.a, sandshift=more["a"]) as a,
            containerd("new", other, name="b", network_namespace=network.b, sandshift=more["b"]) as b,
        ):
            yield {"a": a, "b": b}


def begin(host: Containerd, text: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        **host.environment,
        "PATH": f"{host.folder / 'bin'}:{Path(sys.executable).parent}:{host.environment['PATH']}",
        "CONTAINERD_ADDRESS": str(host.socket),
        "PYTHONPATH": f"{ROOT / 'src'}",
    }
    return subprocess.Popen(
        ["sh", "-ec", text.replace(USUAL, str(host.folder / "bin"))],
        cwd=host.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_every_command_of_the_page_does_what_the_page_says(hosts: dict[str, Containerd]) -> None:
    (hosts["a"].folder / "b.toml").symlink_to(hosts["b"].folder / "sandshift.toml")
    for host in hosts.values():
        finished(begin(host, "ctr image import image.tar"), "the image")
    said, waiting = [], []
    for kind, text in blocks():
        if not kind.startswith("sh "):
            continue
        running = begin(hosts[kind.split()[1]], text)
        if kind.endswith(" background"):
            waiting.append(running)
            continue
        said.append(finished(running, text))
        said += [finished(one, "in the background") for one in waiting]
        waiting.clear()
    together = "".join(said)
    assert "containerd-shim-sandshift-v2:\n  Version:" in said[0]
    assert os.uname().release not in together
    assert "web runs on host b\n" in together
    assert "\n41\n" in together


def finished(running: subprocess.Popen[str], text: str) -> str:
    said: str = running.communicate(timeout=BLOCK_S)[0]
    assert running.returncode == 0, f"{text}\n{said}"
    return f"{said}\n"
