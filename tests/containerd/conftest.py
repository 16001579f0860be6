"""The containerds of these tests: made once for a file, since starting one and reading its image takes seconds."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandshift.config import Config
from sandshift.image import build
from tests.containerd.cri import Cri
from tests.containerd.daemon import INSTALLED, VERSIONS, Containerd, containerd, short_folder
from tests.containerd.hosts import ADDRESS, Host, open_host
from tests.containerd.network import Hosts, point_to_point, two_hosts
from tests.needs import needs_root

__all__ = ["needs_root"]


@pytest.fixture(scope="session", autouse=True)
def needs() -> None:
    """Real containerds, and a guest image of this checkout's code."""
    if not (INSTALLED / "new" / "usr" / "bin" / "containerd").exists():
        pytest.skip("needs the containerds: ./run setup containerd fetches them")
    build.build(Path(Config().places.cache_dir))


def needs_kind(kind: str) -> None:
    """Skips what cannot be had on this distribution."""
    if kind in VERSIONS and not (INSTALLED / kind).exists():
        pytest.skip(f"optional: this distribution's archive has no containerd {VERSIONS[kind]}")


@contextlib.contextmanager
def cabled_host(kind: str) -> Iterator[Containerd]:
    """A containerd of this kind on a host of its own, whose pods are on cables of theirs."""
    namespace = f"ctd-{kind}{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
    try:
        with (
            short_folder() as folder,
            containerd(kind, folder, network_namespace=namespace, cni=point_to_point(folder)) as daemon,
        ):
            yield daemon
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], check=False)


@pytest.fixture(scope="module")
def pods() -> Iterator[Containerd]:
    """2.1 or newer."""
    with cabled_host("new") as daemon:
        yield daemon


@pytest.fixture
def cri(pods: Containerd) -> Iterator[Cri]:
    client = Cri(pods.socket)
    yield client
    client.close()


@pytest.fixture(scope="module")
def network() -> Iterator[Hosts]:
    with two_hosts(f"ctd-m{os.getpid()}") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def a(network: Hosts) -> Iterator[Host]:
    with open_host("a", network.a, network.address_a, ADDRESS) as host:
        yield host


@pytest.fixture(scope="module")
def b(network: Hosts) -> Iterator[Host]:
    with open_host("b", network.b, network.address_b, ADDRESS) as host:
        yield host
