"""What a sandbox is: its cards, containers and processes, host paths left out. This is what travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sandshift.errors import NoRoom

MIGRATION_ANNOTATION: Final = "io.microsoft.migration.support-enabled"
"""Absent or true: the sandbox may move. Upstream's key (contract 4.1)."""
SOURCE_CONTAINER_ANNOTATION: Final = "io.microsoft.migration.source-container-id"
"""On a Task.Create at the destination: which container of the source it stands for. Upstream's key (contract 4.4)."""
CRI_SANDBOX_ID_ANNOTATION: Final = "io.kubernetes.cri.sandbox-id"


@dataclass(frozen=True, slots=True)
class Route:
    destination: str
    """With prefix length: "0.0.0.0/0" is everything."""
    gateway: str = ""
    """Empty: the card's own link."""
    source: str = ""
    """The address that packets on it are sent from; empty: the guest's kernel chooses."""
    on_link: bool = False
    """The gateway is on the link, whatever the addresses say."""


@dataclass(frozen=True, slots=True)
class NetworkCard:
    id: str
    mac: str = ""
    """Empty only before the card is made."""
    addresses: tuple[str, ...] = ()
    """With prefix length: "10.9.0.50/24"."""
    gateway: str = ""
    mtu: int = 0
    """0: the tap's own."""
    routes: tuple[Route, ...] = ()
    """All of them; empty: those that follow from the addresses, and one through the gateway."""


@dataclass(frozen=True, slots=True)
class Process:
    process_id: str
    """What the agent knows it by: see `agent_id`."""
    pid: int = 0
    """In the guest."""
    args: tuple[str, ...] = ()
    terminal: bool = False
    stdin: bool = False
    exec_id: str = ""
    """Of an exec session: the id that the caller uses; empty for an init and outside containers."""
    started: bool = True
    """False: an exec session that was added and has no process yet."""
    spec: bytes = b""
    """Of such a session: the OCI process as JSON."""


@dataclass(frozen=True, slots=True)
class Container:
    guest_id: str
    """The id that the guest knows; it never changes."""
    container_id: str
    """The id that the caller uses; replaced on each move."""
    pid: int = 0
    processes: tuple[Process, ...] = ()
    """Its init first, then the exec sessions."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    """Device ids of the read-only disks of its root file system, the topmost first."""
    writable: str = ""
    """Device id of the disk that takes its changes; empty: guest memory."""
    mounts: tuple[str, ...] = ()
    """Device ids of the disks that its mounts of packed folders are on."""
    started: bool = False
    paused: bool = False


def agent_id(guest_id: str, exec_id: str = "") -> str:
    """What the agent calls a process of a container. No id of containerd's has a colon, so no two are the same."""
    return f"{guest_id}:{exec_id}"


def is_of_container(process_id: str) -> bool:
    """Whether `agent_id` made it."""
    return ":" in process_id


@dataclass(frozen=True, slots=True)
class Sandbox:
    sandbox_id: str
    hostname: str = ""
    network_cards: tuple[NetworkCard, ...] = ()
    containers: tuple[Container, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    created_at_us: int = 0
    """Microseconds since the epoch; 0: not known."""
    processes: tuple[Process, ...] = ()
    """Started with RunProcess, outside any container."""

    @property
    def may_migrate(self) -> bool | None:
        """What the annotation says: absent is yes; None if it says neither yes nor no."""
        said = self.annotations.get(MIGRATION_ANNOTATION, "true").strip().lower()
        return {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}.get(said)

    def moved_into(self, sandbox_id: str) -> Sandbox:
        """The same sandbox under the destination's id; its containers' annotations name that id too."""
        old = self.sandbox_id
        return replace(
            self,
            sandbox_id=sandbox_id,
            containers=tuple(_renamed(one, old, sandbox_id) for one in self.containers),
        )


def check_room(sandbox: Sandbox, *, disks: int, containers_max: int, disks_max: int) -> None:
    """Hold a sandbox against the limits of contract 5.

    Raises:
        NoRoom: it has more containers or disks than are allowed; names both numbers.
    """
    for what, count, most in (
        ("containers", len(sandbox.containers), containers_max),
        ("disks", disks, disks_max),
    ):
        if count > most:
            raise NoRoom(f"sandbox {sandbox.sandbox_id} has {count} {what}: at most {most} are allowed")


def _renamed(container: Container, old: str, new: str) -> Container:
    if container.annotations.get(CRI_SANDBOX_ID_ANNOTATION) != old:
        return container
    return replace(container, annotations={**container.annotations, CRI_SANDBOX_ID_ANNOTATION: new})
