"""The host's side of the demo's workload: its command line, and the pattern that its writer keeps."""

from __future__ import annotations

import importlib.resources
import secrets
import struct
from dataclasses import dataclass, field
from typing import Final

from sandshift.errors import Rejected

PAGE_BYTES: Final = 4096
MARKER_BYTES: Final = 8
RECORD: Final = struct.Struct("<8sII")
"""Marker, page number, generation; repeated through the page. As in guest/workload.py."""
MIB: Final = 1 << 20

WORKING_SET_MIB_MIN: Final = 1
WORKING_SET_MIB_MAX: Final = 16384
DIRTY_MIB_PER_S_MIN: Final = 0
"""0: the writer only looks on; for an idle guest in a benchmark."""
DIRTY_MIB_PER_S_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs in the guest during the demo."""

    working_set_mib: int = 100
    dirty_mib_per_s: int = 20
    port: int = 7000
    marker: bytes = field(default_factory=lambda: secrets.token_bytes(MARKER_BYTES))
    """Fresh per run, so that a page found anywhere can only be of this run."""

    def __post_init__(self) -> None:
        check_range("working set", self.working_set_mib, WORKING_SET_MIB_MIN, WORKING_SET_MIB_MAX, "MiB")
        check_range("dirty rate", self.dirty_mib_per_s, DIRTY_MIB_PER_S_MIN, DIRTY_MIB_PER_S_MAX, "MiB/s")

    @property
    def pages(self) -> int:
        return self.working_set_mib * MIB // PAGE_BYTES

    def arguments(self) -> list[str]:
        """The process to run in the guest. Its whole source travels in them; nothing need be in the image."""
        return [
            "python3",
            "-c",
            guest_source(),
            str(self.port),
            self.marker.hex(),
            str(self.pages),
            str(self.dirty_mib_per_s * MIB / PAGE_BYTES),
        ]


def guest_source() -> str:
    """The program that runs inside the guest."""
    return (importlib.resources.files("sandshift.cli.demo") / "guest" / "workload.py").read_text()


def pattern_page(marker: bytes, number: int, generation: int) -> bytes:
    """What page `number` holds in `generation`."""
    return RECORD.pack(marker, number, generation) * (PAGE_BYTES // RECORD.size)


def check_range(what: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        raise Rejected(f"{what} {value:g} {unit} is outside {low:g} to {high:g} {unit}")
