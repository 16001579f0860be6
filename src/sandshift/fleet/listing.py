"""Which sandboxes a host has, as their own shims say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sandshift.errors import SandshiftError
from sandshift.fleet.host import Host
from sandshift.fleet.shim_client import connect
from sandshift.wire.sandshift import shim_pb2


@dataclass(frozen=True, slots=True)
class Listed:
    """One sandbox. `problem` says why its shim did not tell its status."""

    host: str
    namespace: str
    sandbox_id: str
    status: shim_pb2.StatusResponse
    problem: str = ""

    @property
    def state(self) -> str:
        """ "running", "paused", "incoming", "stopped", "dead", "absent", "moved", or "no answer"."""
        if self.problem:
            return "no answer"
        return "moved" if self.status.moved_to else self.status.vm_state

    @property
    def addresses(self) -> list[str]:
        return [address for card in self.status.network_cards for address in card.addresses]

    def document(self) -> dict[str, object]:
        """As JSON shows it: docs/reference/cli.md, "sandshift ls"."""
        session = self.status.session
        return {
            "id": self.sandbox_id,
            "namespace": self.namespace,
            "host": self.host,
            "state": self.state,
            "memory_bytes": self.status.memory_bytes,
            "addresses": self.addresses,
            "session": session.session_id if session.active else "",
            "session_state": session.state if session.active else "",
            "moved_to": self.status.moved_to,
            "started_from": self.status.started_from,
            "accelerator": self.status.accelerator,
            "qemu_version": self.status.qemu_version,
            "shim_pid": self.status.shim_pid,
            "qemu_pid": self.status.qemu_pid,
            "boot_id": self.status.boot_id,
            "problem": self.problem,
        }


async def list_sandboxes(host: Host) -> list[Listed]:
    """Every sandbox of `host`, asked all at once; a shim that does not answer is listed with its problem."""
    return list(await asyncio.gather(*(_ask(host, *place) for place in host.sandboxes())))


async def _ask(host: Host, namespace: str, sandbox_id: str) -> Listed:
    try:
        shim = await connect(host, namespace, sandbox_id)
        try:
            status = await shim.status()
        finally:
            await shim.close()
    except SandshiftError as error:
        return Listed(host.name, namespace, sandbox_id, shim_pb2.StatusResponse(), error.message)
    return Listed(host.name, namespace, sandbox_id, status)
