"""A fake guest: a few pages, a program that rewrites them, and a counter. Time is an argument.

What the guest wrote while it ran is worked out when somebody looks at its pages, so it costs no task and replays exactly.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import xxhash

from sandshift.vmm.fake_containers import FakeContainers

PAGE_BYTES: Final = 4096
"""What a page counts for in bytes and bandwidth; its content here is CONTENT_BYTES."""
CONTENT_BYTES: Final = 16
ENTRY_BYTES: Final = 4 + CONTENT_BYTES


@dataclass(slots=True)
class FakeGuest:
    """`advance` before anything is looked at."""

    boot_id: str
    pages_per_s: float = 0.0
    """How many pages the program rewrites per second while it runs."""
    working_set: int = 64
    """How many different pages it rewrites."""
    pings: int = 0
    running: bool = False
    containers: FakeContainers = field(default_factory=FakeContainers)
    _pages: dict[int, bytes] = field(default_factory=dict)
    _written: int = 0
    """How many pages the program has written since it began."""
    _shown: int = 0
    """How many of these are in `_pages`."""
    _owed: float = 0.0
    """Part of a page that time has paid for and nothing was written for yet."""
    _now_s: float = 0.0
    _dirty: set[int] = field(default_factory=set)

    def advance(self, now_s: float, throttle_percent: int = 0) -> None:
        """Write what the program has written since the last look."""
        passed_s = max(0.0, now_s - self._now_s)
        self._now_s = now_s
        if not self.running:
            return
        self.containers.advance(passed_s, now_s)
        self._owed += passed_s * self.pages_per_s * (100 - throttle_percent) / 100
        new = int(self._owed)
        self._owed -= new
        self._written += new

    @property
    def pages(self) -> dict[int, bytes]:
        """Those that are not zero."""
        self._show()
        return self._pages

    def _show(self) -> None:
        # Of many rounds over the working set only the last is still to be seen.
        for number in range(max(self._shown, self._written - self.working_set), self._written):
            self._put(number % self.working_set, (number + 1).to_bytes(CONTENT_BYTES, "big"))
        self._shown = self._written

    def _put(self, page: int, content: bytes) -> None:
        self._pages[page] = content
        self._dirty.add(page)

    def write(self, page: int, content: bytes) -> None:
        self._show()
        self._put(page, content.ljust(CONTENT_BYTES, b"\0")[:CONTENT_BYTES])

    def take_dirty(self) -> list[int]:
        """Pages written since the last call, and forget them."""
        self._show()
        taken = sorted(self._dirty)
        self._dirty.clear()
        return taken

    @property
    def dirty_count(self) -> int:
        self._show()
        return len(self._dirty)

    def digest(self) -> bytes:
        digest = xxhash.xxh3_128()
        for page, content in sorted(self.pages.items()):
            if content.strip(b"\0"):
                digest.update(page.to_bytes(8, "little") + content)
        return digest.digest()

    def packed(self, pages: Iterable[int]) -> bytes:
        known = self.pages
        return b"".join(page.to_bytes(4, "big") + known[page] for page in pages)

    def unpack(self, data: bytes) -> None:
        known = self.pages
        for start in range(0, len(data), ENTRY_BYTES):
            page = int.from_bytes(data[start : start + 4], "big")
            known[page] = data[start + 4 : start + ENTRY_BYTES]

    def state(self) -> dict[str, object]:
        """All but the pages, for JSON."""
        return {
            "boot_id": self.boot_id,
            "pings": self.pings,
            "pages_per_s": self.pages_per_s,
            "working_set": self.working_set,
            "written": self._written,
            "containers": self.containers.state(),
        }

    def take_state(self, state: Mapping[str, object]) -> None:
        self.boot_id = str(state["boot_id"])
        self.pings = int(str(state["pings"]))
        self.pages_per_s = float(str(state["pages_per_s"]))
        self.working_set = int(str(state["working_set"]))
        self._written = self._shown = int(str(state["written"]))
        containers = state["containers"]
        assert isinstance(containers, dict)
        self.containers.take_state(containers)

    def packed_text(self) -> str:
        """All pages, for JSON."""
        return base64.b64encode(self.packed(sorted(self.pages))).decode()

    def unpack_text(self, text: str) -> None:
        """Takes in what `packed_text` gave. Raises ValueError if it is not that."""
        self.unpack(base64.b64decode(text, validate=True))
