"""Two hosts on one machine: network namespaces, a switch between them, a client, and a configuration file per host.

Made whole or not at all, and taken down whole: the processes in it, the namespaces, the folder. A lab whose maker was
killed is recognised by its lock, which the kernel let go, and is taken down before the next one is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sandshift import net
from sandshift.cli.demo.leftovers import end_processes
from sandshift.cli.demo.topology import BRIDGE, ConfigOverrides, HostNames, Topology, config_toml, merged
from sandshift.config import Config, Places, load
from sandshift.errors import Rejected

LABS_FOLDER: Final = Path(tempfile.gettempdir()) / "sandshift-lab"
_LOCK: Final = "lock"
_ID_BYTES: Final = 3


@dataclass(frozen=True, slots=True)
class LabHost:
    """One of the two hosts."""

    names: HostNames
    folder: Path
    config_path: Path
    """For SANDSHIFT_CONFIG or --config."""
    config: Config

    @property
    def namespace(self) -> str:
        return self.names.namespace

    @property
    def address(self) -> str:
        return self.names.address

    @property
    def environment(self) -> dict[str, str]:
        """What a process of this host is started with."""
        return {**os.environ, "SANDSHIFT_CONFIG": str(self.config_path)}


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that stands. Made by `open_lab`."""

    topology: Topology
    folder: Path
    host_a: LabHost
    host_b: LabHost
    overrides: ConfigOverrides

    def variant(self, host: LabHost, name: str, overrides: ConfigOverrides) -> LabHost:
        """The same host by another configuration file: what is started by it differs from the rest in `overrides`."""
        path = host.folder / f"config-{name}.toml"
        path.write_text(
            config_toml(
                host.names,
                folder=host.folder,
                cache_dir=Path(host.config.places.cache_dir),
                overrides=merged(self.overrides, overrides),
            )
        )
        return replace(host, config_path=path, config=load(path))

    @property
    def client_namespace(self) -> str:
        return self.topology.client_namespace

    @property
    def switch_namespace(self) -> str:
        return self.topology.switch_namespace

    @property
    def bridge(self) -> str:
        """The switch's bridge: everything between the hosts and the client crosses it."""
        return BRIDGE


@contextlib.asynccontextmanager
async def open_lab(
    *,
    cache_dir: Path | None = None,
    overrides: ConfigOverrides | None = None,
    labs_folder: Path = LABS_FOLDER,
) -> AsyncIterator[Lab]:
    """A lab for the time of the `async with`; whatever happens inside, it is taken down at the end.

    Args:
        cache_dir: guest images and templates, shared by both hosts; None: the machine's own.
        overrides: keys for both hosts' config.toml, by section: ``{"vm": {"memory_mib": 512}}``.
        labs_folder: where labs' folders lie, and where leftovers are looked for.

    Raises:
        Rejected: not root. NotSupported: no `ip`. Unavailable: a leftover does not end.
    """
    require_root()
    topology, folder, lock = await _uninterrupted_claim(labs_folder)
    try:
        await _make_network(topology)
        places = cache_dir or Path(Places().cache_dir)
        host_a = _make_host(topology.host_a, folder, places, overrides)
        host_b = _make_host(topology.host_b, folder, places, overrides)
        yield Lab(topology, folder, host_a, host_b, overrides or {})
    finally:
        try:
            await asyncio.shield(asyncio.to_thread(_take_down, topology, folder))
        finally:
            os.close(lock)


def require_root() -> None:
    """Raises Rejected for everybody else."""
    if os.geteuid() != 0:
        raise Rejected(
            "two hosts on one machine are network namespaces, which only root can make: run it as root"
        )


async def _uninterrupted_claim(labs_folder: Path) -> tuple[Topology, Path, int]:
    """Claim in a thread. A cancellation waits for its end, so that nothing claimed is forgotten."""
    claim = asyncio.ensure_future(asyncio.to_thread(_claim, labs_folder))
    try:
        return await asyncio.shield(claim)
    except asyncio.CancelledError:
        topology, folder, lock = await claim
        os.close(lock)
        await asyncio.to_thread(_take_down, topology, folder)
        raise


def _claim(labs_folder: Path) -> tuple[Topology, Path, int]:
    """Take leftovers down, then claim a new id: its folder, and its lock held as an open descriptor."""
    labs_folder.mkdir(mode=0o700, exist_ok=True)
    owner = labs_folder.stat()
    if owner.st_uid != 0 or owner.st_mode & 0o022:
        raise Rejected(f"{labs_folder} can be written by others than root: remove it")
    with _locked(labs_folder / _LOCK):
        for leftover in leftovers(labs_folder):
            _take_down(Topology(leftover.name), leftover)
        while True:
            lab_id = secrets.token_hex(_ID_BYTES)
            folder = labs_folder / lab_id
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                break
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return Topology(lab_id), folder, lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def leftovers(labs_folder: Path) -> Iterator[Path]:
    """Folders of labs whose maker is gone: their lock can be had."""
    for folder in labs_folder.iterdir():
        if not folder.is_dir():
            continue
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            yield folder
        finally:
            os.close(descriptor)


async def _make_network(topology: Topology) -> None:
    await net.apply(topology.namespace_plan())
    for namespace in topology.namespaces:
        await asyncio.to_thread(net.run_in, namespace, _without_ipv6)
    await net.apply(topology.cable_plan())
    async with asyncio.TaskGroup() as group:
        for namespace, plan in topology.inner_plans().items():
            group.create_task(net.apply(plan, network_namespace=namespace))


def _without_ipv6() -> None:
    """No neighbour discovery in the lab: the bridge carries only what the demo is about."""
    for scope in "all", "default":
        switch = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if switch.exists():
            switch.write_text("1")


def _make_host(names: HostNames, lab: Path, cache_dir: Path, overrides: ConfigOverrides | None) -> LabHost:
    folder = lab / names.letter
    folder.mkdir(mode=0o700)
    path = folder / "config.toml"
    path.write_text(config_toml(names, folder=folder, cache_dir=cache_dir, overrides=overrides))
    return LabHost(names, folder, path, load(path))


def _take_down(topology: Topology, folder: Path) -> None:
    """End the lab's processes, then its namespaces, then its folder. What is gone already is no error."""
    end_processes(topology.namespaces, folder)
    plan = topology.namespace_plan()
    asyncio.run(net.remove(plan))
    shutil.rmtree(folder, ignore_errors=True)
