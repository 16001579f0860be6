"""Where one sandbox's shim keeps things on its host.

RUN_DIR/NAMESPACE/ID/         may be lost with a reboot
    shim.sock shim.pid shim.log
    vm/                       QEMU's sockets, pid, stderr, serial console
    output/                   what processes said
    offsets/                  how far each stream of a container's process is delivered
STATE_DIR/sandboxes/NAMESPACE/ID/   survives a reboot
    sandbox                   the sandbox's model, as the shim would need it to start again
    containers                its containers, their stdio and exits
    events                    where containerd takes events
    scratch/                  disks that take the changes of containers whose annotation asks for it
    session                   the journal of the active session
STATE_DIR/statements/         last statements of ended sessions, 30 days
STATE_DIR/reports/            the newest 1,000 reports
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandshift.config import Config


@dataclass(frozen=True, slots=True)
class Places:
    run_dir: Path
    state_dir: Path
    statements_dir: Path
    reports_dir: Path

    @classmethod
    def of(cls, config: Config, namespace: str, sandbox_id: str) -> Places:
        state = Path(config.places.state_dir)
        return cls(
            run_dir=config.sandbox_run_dir(namespace, sandbox_id),
            state_dir=config.sandbox_state_dir(namespace, sandbox_id),
            statements_dir=state / "statements",
            reports_dir=state / "reports",
        )

    @property
    def shim_pid_file(self) -> Path:
        return self.run_dir / "shim.pid"

    @property
    def vm_dir(self) -> Path:
        return self.run_dir / "vm"

    @property
    def output_dir(self) -> Path:
        return self.run_dir / "output"

    @property
    def scratch_dir(self) -> Path:
        return self.state_dir / "scratch"

    @property
    def offsets_dir(self) -> Path:
        return self.run_dir / "offsets"

    @property
    def containers_file(self) -> Path:
        return self.state_dir / "containers"

    @property
    def events_file(self) -> Path:
        return self.state_dir / "events"

    @property
    def taps_file(self) -> Path:
        return self.run_dir / "taps.json"

    @property
    def sandbox_file(self) -> Path:
        return self.state_dir / "sandbox"

    @property
    def journal_file(self) -> Path:
        """Present exactly while a session is open: Cleanup removes it last."""
        return self.state_dir / "session"

    @property
    def last_session_file(self) -> Path:
        """How the last session ended: the same Finalize, Cancel or Cleanup of it may be said again."""
        return self.state_dir / "last_session"

    def unfinished_session(self) -> bool:
        return self.journal_file.exists()

    def recorded_taps(self) -> list[str]:
        return list(self._taps_record().get("taps", ()))

    def recorded_network_namespace(self) -> str:
        """File of the namespace that they are in; empty: the host's own."""
        return str(self._taps_record().get("network_namespace", ""))

    def _taps_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.taps_file.read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}
