"""What the demo is asked to do, checked whole before anything is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sandshift.cli.demo.topology import ConfigOverrides
from sandshift.cli.demo.workload import DIRTY_MIB_PER_S_MAX, MIB, Workload, check_range
from sandshift.errors import Rejected

MEMORY_MIB_MIN: Final = 128
MEMORY_MIB_MAX: Final = 65536
GUEST_NEEDS_MIB: Final = 128
"""What the guest's kernel, its agent and two Python processes need beside the working set (measured: about 90)."""
CONTROL_WORKING_SET_MIB: Final = 8
CONTROL_DIRTY_MIB_PER_S: Final = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """The demo's options."""

    memory_mib: int = 256
    workload: Workload = field(default_factory=Workload)
    control: bool = True
    """Move a second sandbox with encryption off, to show that the capture finds what is there."""
    cache_dir: Path | None = None
    """Guest image and templates; None: the machine's own."""
    qemu: str = ""
    """Empty: QEMU from PATH."""
    qemu_data_dirs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("memory", self.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX, "MiB")
        # A writer that does not write would prove nothing.
        check_range("dirty rate", self.workload.dirty_mib_per_s, 1, DIRTY_MIB_PER_S_MAX, "MiB/s")
        working_set_mib = self.workload.working_set_mib
        if working_set_mib + GUEST_NEEDS_MIB > self.memory_mib:
            raise Rejected(
                f"a working set of {working_set_mib} MiB needs a guest of at least {working_set_mib + GUEST_NEEDS_MIB}"
                f" MiB, and memory is {self.memory_mib} MiB: raise --memory or lower --working-set"
            )

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    def overrides(self) -> ConfigOverrides:
        """For both hosts' config.toml."""
        vm: dict[str, object] = {"memory_mib": self.memory_mib}
        if self.qemu:
            vm["qemu"] = self.qemu
        if self.qemu_data_dirs:
            vm["qemu_data_dirs"] = list(self.qemu_data_dirs)
        return {"vm": vm}

    def control_workload(self) -> Workload:
        """A small one with the same marker, so that the same capture looks for it."""
        return Workload(
            working_set_mib=min(CONTROL_WORKING_SET_MIB, self.workload.working_set_mib),
            dirty_mib_per_s=min(CONTROL_DIRTY_MIB_PER_S, self.workload.dirty_mib_per_s),
            port=self.workload.port,
            marker=self.workload.marker,
        )
