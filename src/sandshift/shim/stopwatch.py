"""Where the time of a start goes: one line in the shim's log per sandbox and per container, which the benchmark reads."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Stopwatch:
    """Milliseconds from one `lap` to the next, by name; the first is from the beginning."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._at_s = clock_s()
        self.laps_ms: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now_s = self._clock_s()
        self.laps_ms[name] = round((now_s - self._at_s) * 1000, 1)
        self._at_s = now_s

    def tell(self, subject: str) -> None:
        log.info("%s: started, ms: %s", subject, json.dumps(self.laps_ms))
