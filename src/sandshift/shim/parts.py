"""The real parts that a shim is made of. Simulations and conformance mutants bring others that pass the same suites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sandshift.guest.client import Guest
from sandshift.sandbox.model import NetworkCard
from sandshift.vmm.machine import MachineSpec, Vmm


class Taps(Protocol):
    """Makes and removes sandboxes' taps in this process's network namespace."""

    async def attach(self, sandbox_id: str, cards: tuple[NetworkCard, ...]) -> dict[str, str]:
        """Card id -> name of the tap made for it. All or nothing."""
        ...

    async def detach(self, taps: list[str]) -> None:
        """Remove them; those that are gone already are no error."""
        ...


@dataclass(frozen=True, slots=True)
class Boot:
    """What a sandbox starts from: the VM's description, and a template if one fits."""

    spec: MachineSpec
    template: Path | None


@dataclass(frozen=True, slots=True)
class Parts:
    vmm: Vmm
    taps: Taps
    connect_guest: Callable[[Path], "Guest"]
