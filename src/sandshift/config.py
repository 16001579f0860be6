"""The host's configuration: one TOML file, read once, checked whole.

Every key has a default; docs/reference/configuration.md lists them with their units. Two "hosts" on one machine are
two files whose places and network namespace differ.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from pathlib import Path
from typing import Final, Literal

import msgspec

from sandshift.errors import Rejected

DEFAULT_PATH: Final = Path("/etc/sandshift/config.toml")
PATH_VARIABLE: Final = "SANDSHIFT_CONFIG"
SOCKET_PATH_BYTES_MAX: Final = 106
"""What containerd dials, and Linux takes."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str = ""
    """How this host is called in reports; empty: its hostname."""
    network_namespace: str = ""
    """Name under /run/netns in which this host's sandboxes and channels live; empty: the machine's own."""
    migration_address: str = ""
    """Address at which other hosts reach this one for the channel; empty: 127.0.0.1."""


class Places(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    run_dir: str = "/run/sandshift"
    """Sockets and pids; may be lost with a reboot."""
    state_dir: str = "/var/lib/sandshift"
    """Journals, last statements, reports; a real disk."""
    cache_dir: str = "/var/cache/sandshift"
    """Guest images, templates and packed root file systems; can be made again."""


class Vm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    qemu: str = "qemu-system-x86_64"
    """Path or name of QEMU."""
    qemu_data_dirs: list[str] = []
    """Extra -L directories, for a QEMU that is not installed but unpacked."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    machine_type: str = ""
    """Versioned machine type; empty: the newest pc-q35 that QEMU has."""
    cpu_model: str = ""
    """Empty: "max" under TCG, a named model under KVM."""
    memory_mib: int = 256
    vcpus: int = 1
    shared_memory: bool = False
    """Guest memory in a memfd, which checksum_verification needs; migration of untouched memory is slower."""
    template: bool = True
    """Start from a template where one fits."""


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    bridge: str = ""
    """Bridge of the host to which sandboxes' taps are attached; empty: taps stay unattached."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """docs/reference/migration.md, "Limits". Seconds unless the name says otherwise."""

    socket_wait_s: float = 600.0
    transfer_deadline_s: float = 1800.0
    stall_s: float = 30.0
    orphan_s: float = 600.0
    cancel_s: float = 10.0
    qmp_command_s: float = 10.0
    agent_reply_s: float = 30.0
    handover_frame_s: float = 5.0
    containers_max: int = 128
    disks_max: int = 128
    subscribers_max: int = 64


class Migration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    encryption: Literal["tls-psk", "off"] = "tls-psk"
    bandwidth_mib_per_s: int = 4096
    """How fast memory may flow; 0: as fast as QEMU can."""
    downtime_limit_ms: int = 20
    """What QEMU may spend on the last pass, 1 to 2000000."""
    limits: Limits = Limits()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    host: Host = Host()
    places: Places = Places()
    vm: Vm = Vm()
    network: Network = Network()
    migration: Migration = Migration()

    @property
    def host_name(self) -> str:
        return self.host.name or os.uname().nodename

    def sandbox_run_dir(self, namespace: str, sandbox_id: str) -> Path:
        return Path(self.places.run_dir) / namespace / sandbox_id

    def shim_socket(self, namespace: str, sandbox_id: str) -> Path:
        """Where the sandbox's shim listens. A path too long for a Unix socket gets a hashed name instead."""
        path = self.sandbox_run_dir(namespace, sandbox_id) / "shim.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            return path
        import hashlib  # noqa: PLC0415 - libcrypto is 3 MB, and few names are too long

        digest = hashlib.sha256(f"{namespace}/{sandbox_id}".encode()).hexdigest()
        return Path(self.places.run_dir) / "s" / f"{digest[:32]}.sock"

    def sandbox_state_dir(self, namespace: str, sandbox_id: str) -> Path:
        return Path(self.places.state_dir) / "sandboxes" / namespace / sandbox_id


def load(path: Path | None = None) -> Config:
    """Read the configuration: `path`, else $SANDSHIFT_CONFIG, else /etc/sandshift/config.toml, else the defaults.

    Raises:
        Rejected: the file cannot be read, is not TOML, or a key is unknown or out of range; names file and key.
    """
    named = path or (Path(os.environ[PATH_VARIABLE]) if os.environ.get(PATH_VARIABLE) else None)
    chosen = named or DEFAULT_PATH
    if named is None and not chosen.exists():
        return Config()
    try:
        document = tomllib.loads(chosen.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"configuration {chosen} cannot be read: {error}") from error
    except ValueError as error:  # TOMLDecodeError is one; a number of over 4,300 digits is another
        raise Rejected(f"configuration {chosen} is not TOML: {error}") from error
    return parse(document, source=str(chosen))


def parse(document: dict[str, object], *, source: str) -> Config:
    """Check a configuration document whole. `source` names it in errors."""
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise Rejected(f"configuration {source}: {error}") from error
    problems = list(_problems(config))
    if problems:
        raise Rejected(f"configuration {source}: " + "; ".join(problems))
    return config


def _problems(config: Config) -> list[str]:
    found = []
    ranges = {
        "vm.memory_mib": (config.vm.memory_mib, 96, 1 << 20),
        "vm.vcpus": (config.vm.vcpus, 1, 64),
        "migration.bandwidth_mib_per_s": (config.migration.bandwidth_mib_per_s, 0, 1 << 20),
        "migration.downtime_limit_ms": (config.migration.downtime_limit_ms, 1, 2_000_000),
    }
    for key, (value, low, high) in ranges.items():
        if not low <= value <= high:
            found.append(f"{key} = {value} is outside {low} to {high}")
    limits, places = config.migration.limits, config.places
    found += [
        f"migration.limits.{name} = {limit} must be a finite number greater than 0"
        for name in Limits.__struct_fields__
        if not (math.isfinite(limit := getattr(limits, name)) and limit > 0)
    ]
    found += [
        f"places.{name} = {folder!r} must be an absolute path"
        for name in Places.__struct_fields__
        if not (folder := getattr(places, name)).startswith("/")
    ]
    if config.vm.machine_type and not re.fullmatch(r"pc-(q35|i440fx)-\d+\.\d+", config.vm.machine_type):
        found.append(
            f"vm.machine_type = {config.vm.machine_type!r} must be a versioned type such as pc-q35-10.0"
        )
    return found
