"""Who ran the guest, on both hosts together: seen at the virtual CPUs themselves, whatever anybody says."""

from __future__ import annotations

from dataclasses import dataclass, field

from sandshift.vmm.fake_process import FakeProcess


@dataclass
class Witness:
    """`saw` is told of each start and stop of each fake VM's virtual CPUs."""

    violations: list[str] = field(default_factory=list)
    running: dict[FakeProcess, str] = field(default_factory=dict)
    """VM process -> its host."""
    last: tuple[str, int, bytes] | None = None
    """Where the guest stopped last, how far it had come, and what was in its memory then."""
    starts: int = 0
    most_at_once: int = 0

    def saw(self, process: FakeProcess, host: str, *, running: bool) -> None:
        state = process.guest.state()
        came = int(str(state["written"]))
        if not running:
            self.running.pop(process, None)
            self.last = (host, came, process.guest.digest())
            return
        self.running[process] = host
        self.starts += 1
        self.most_at_once = max(self.most_at_once, len(self.running))
        if len(self.running) > 1:
            self.violations.append(f"two runners: {', '.join(sorted(self.running.values()))}")
        if self.last is not None:
            where, before, digest = self.last
            if came < before:
                self.violations.append(
                    f"stale start on {host}: at write {came}, but it had been at {before} on {where}"
                )
            elif process.guest.digest() != digest:
                self.violations.append(f"the memory that starts on {host} is not what stopped on {where}")
