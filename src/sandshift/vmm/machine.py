"""What the shim needs of a VM: the Machine interface.

`vmm/qemu*.py` is the real one; `vmm/fake.py` is the one simulations and the conformance mutants run on. Both pass
tests/vmm/machine_suite.py, so the fake can be believed.

A Machine decides nothing. It reports what the VM says and does what it is told; whether the guest may run is decided in
`session/`, and `run_vcpus` is the one place through which virtual CPUs ever start.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sandshift.sandbox.shape import Device, MachineShape


class RunState(enum.Enum):
    """QEMU's run states, as far as anybody here distinguishes them. Source: qapi/run-state.json."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    """Stopped by a migration of its own that is not over."""
    POSTMIGRATE = "postmigrate"
    """Everything is out: it cannot resume by itself any more."""
    SHUTDOWN = "shutdown"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    """It ran, and a disk failed it."""
    WATCHDOG = "watchdog"
    """It ran, and did not feed its watchdog."""
    DEBUG = "debug"
    """It ran, up to a breakpoint of somebody's debugger."""
    SUSPENDED = "suspended"
    """It ran, and put itself to sleep."""
    DEAD = "dead"
    """The VM process is gone."""


class MigrationStatus(enum.Enum):
    """QEMU's MigrationStatus, as far as pre-copy knows it. Source: qapi/migration.json."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """One answer of query-migrate. Bytes, milliseconds, bytes per second."""

    status: MigrationStatus
    error: str = ""
    total_ms: int = 0
    downtime_ms: int = 0
    setup_ms: int = 0
    expected_downtime_ms: int = 0
    ram_total_bytes: int = 0
    ram_transferred_bytes: int = 0
    ram_remaining_bytes: int = 0
    dirty_bytes_per_s: int = 0
    bytes_per_s: int = 0
    passes: int = 0
    """QEMU's dirty-sync-count."""
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class MachineEvent:
    """Something the VM said. `name` is QMP's: STOP, RESUME, MIGRATION, MIGRATION_PASS, SHUTDOWN, RESET, GUEST_PANICKED;
    and DEAD, ours, once and last: the process is gone (data: {"returncode": int | None, "stderr": str})."""

    name: str
    data: Mapping[str, object]
    at_us: int
    """The VM process's host clock, microseconds since the epoch: QMP's timestamp."""


@dataclass(frozen=True, slots=True)
class ChannelSecurity:
    """How the stream on the handed socket is protected."""

    psk: bytes = field(default=b"", repr=False)
    """TLS-PSK key, 32 bytes; empty: the stream is in the clear."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """What a transfer may use. Changeable while it runs, by `tune`."""

    bandwidth_bytes_per_s: int
    """0: unlimited."""
    downtime_limit_ms: int
    throttle_percent: int = 0
    """Guest CPU throttle in force now, 0 to 99: 0 is none. Driven from outside, never by QEMU's own ladder."""
    xbzrle_cache_bytes: int = 0
    """0: no delta compression. Whether there is any is fixed at the start; its size is not."""
    throttling: bool = True
    """Whether `throttle_percent` may be above 0 at any time of this transfer. Fixed at the start; costs 1 percent."""


@dataclass(frozen=True, slots=True)
class DiskSource:
    """Where on this host the content of the shape's disk device `device_id` lies."""

    device_id: str
    path: Path


class Machine(Protocol):
    """One VM process. Methods raise errors of `sandshift.errors`: Unavailable for a VM that does not answer."""

    @property
    def shape(self) -> MachineShape: ...

    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool:
        """Whether the VM process exists. Cheap; looked at before every decision."""
        ...

    @property
    def agent_socket(self) -> Path:
        """Unix socket of the virtio-serial port that the agent listens on. Connect before vCPUs start."""
        ...

    async def run_state(self) -> RunState: ...

    async def run_vcpus(self, licence: object) -> None:
        """Start the virtual CPUs. The one place that does; `licence` is the session's proof of the right to run.

        Returns when the VM runs, also if it ran already. Raises IllegalMove with the VM's own words if it refused and
        still has not run: also while a guest comes in (INMIGRATE: QEMU would take it as "start when all is here") and
        while one goes out (FINISH_MIGRATE: cancel first).
        """
        ...

    async def stop_vcpus(self) -> None: ...

    async def destroy(self) -> None:
        """End the VM process and everything it holds. Idempotent; returns when the process is gone."""
        ...

    def events(self) -> AsyncIterator[MachineEvent]:
        """All that the VM says from now on (from this call on, not from the first `async for`), in order.

        Several listeners may listen; each gets everything. It ends after DEAD, or after `detach`.
        """
        ...

    async def migrate_out(
        self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings
    ) -> None:
        """Begin to send the guest over `channel_fd` (duplicated: the caller keeps its own). Returns once it is under way.

        return-path, pause-before-switchover, events and validate-uuid are always on. TCP_NODELAY is set, a property
        that duplicates share. So is the blocking mode, and QEMU changes it both ways while it has the socket: set it
        again before you read or write there yourself. After a failure the source resumes the guest by itself, RESUME coming
        before or after MIGRATION failed. A transfer that fails, is cancelled or loses its VM process ends
        the connection for every holder; one that completes leaves it open and whole.
        """
        ...

    async def migrate_in(self, channel_fd: int, security: ChannelSecurity) -> None:
        """Begin to receive on `channel_fd`. The VM stays stopped, whatever comes."""
        ...

    async def switch_over(self) -> None:
        """From PRE_SWITCHOVER: send the rest."""
        ...

    async def cancel_transfer(self) -> None:
        """End a transfer that is not complete; the source resumes by itself. No effect after COMPLETED.

        Returns when the transfer has ended, one way or the other: ask migration_info which. On a receiving VM it does
        nothing: what has half arrived can only be destroyed.
        """
        ...

    async def tune(self, settings: TransferSettings) -> None: ...

    async def migration_info(self) -> MigrationInfo: ...

    async def keep_channel(self, channel_fd: int) -> None:
        """Let the VM process hold a second, named copy of the channel, so that it outlives the shim (getfd)."""
        ...

    @property
    def channel_keeper_pid(self) -> int:
        """The process in whose table of descriptors that copy is: a later shim takes it from there."""
        ...

    async def drop_channel(self) -> None:
        """Close that copy, if there is one."""
        ...

    async def attach_disk(self, device: Device, source: DiskSource) -> None:
        """Plug a disk into the machine, running or not; `shape` has it from then on. Refused during a transfer.

        Raises AlreadyThere if the machine has a device of that id, IllegalMove with the VM's own words otherwise; then
        nothing of it is left. The guest sees the disk some 100 ms later.
        """
        ...

    async def detach_disk(self, device_id: str) -> None:
        """Take a disk out again, once the guest has let go of it, and close its file. Idempotent.

        Raises TimedOut if the guest does not let go of it in time: it is still plugged in then.
        """
        ...

    async def memory_digest(self) -> bytes:
        """xxh3_128 over the guest's memory, which must be stopped. Needs `shape.shared_memory`."""
        ...

    async def save(self, path: Path) -> None:
        """Stop the vCPUs and write the whole guest to a new file: a template. Afterwards the VM is POSTMIGRATE.

        Complete and on disk when this returns; a file left by a failure is removed.
        """
        ...

    async def detach(self) -> None:
        """Let go of the VM process without ending it: a later shim finds it by `Vmm.reattach`. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """All that a VM process is made from: the shape, and this host's places for it."""

    name: str
    """Shows in the process list."""
    shape: MachineShape
    run_dir: Path
    """QMP and agent sockets, pid file, stderr, serial console. Mode 0700; exists."""
    kernel: Path
    initramfs: Path
    disks: tuple[DiskSource, ...] = ()
    taps: Mapping[str, str] = field(default_factory=dict)
    """Card's device id -> name of a tap that exists in the VM process's network namespace."""
    network_namespace: str = ""
    """File of the network namespace that the VM process lives in; empty: this process's own."""


class Vmm(Protocol):
    """Makes VMs, and finds those that are still there."""

    async def start(self, spec: MachineSpec) -> Machine:
        """A cold VM, ready to boot, its vCPUs not started."""
        ...

    async def start_from_template(self, spec: MachineSpec, template: Path) -> Machine:
        """A VM loaded from the template file, stopped, its vCPUs not started."""
        ...

    async def start_incoming(self, spec: MachineSpec) -> Machine:
        """A VM that waits for `migrate_in`, stopped."""
        ...

    async def reattach(self, spec: MachineSpec) -> Machine | None:
        """The VM process that a former shim started in `spec.run_dir`, if it is still alive; None if it is not."""
        ...
