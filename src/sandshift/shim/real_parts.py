"""The real parts: QEMU, taps made with `ip`, the guest image from the cache, the agent behind virtio-serial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandshift.guest.client import Guest
from sandshift.net import batch
from sandshift.net.plan import Plan, Tap, plan_taps, tap_name
from sandshift.shim.machines import HostMachines
from sandshift.shim.parts import Parts
from sandshift.vmm.qemu import QemuVmm

if TYPE_CHECKING:
    from pathlib import Path

    from sandshift.config import Config
    from sandshift.sandbox.model import NetworkCard


class HostTaps:
    """Taps of this process's network namespace, attached to the host's bridge."""

    def __init__(self, bridge: str, namespace: str) -> None:
        """`bridge`: what they are attached to; empty: nothing."""
        self._bridge = bridge
        self._namespace = namespace

    def _plan(self, sandbox_id: str, cards: tuple[NetworkCard, ...]) -> tuple[Plan, list[str]]:
        names = [tap_name(self._namespace, sandbox_id, index) for index in range(len(cards))]
        taps = [
            Tap(name=name, bridge=self._bridge, mtu_bytes=card.mtu)
            for name, card in zip(names, cards, strict=True)
        ]
        return plan_taps(taps), names

    async def attach(self, sandbox_id: str, cards: tuple[NetworkCard, ...]) -> dict[str, str]:
        plan, names = self._plan(sandbox_id, cards)
        await batch.apply(plan)
        return {f"net{index}": name for index, name in enumerate(names)}

    async def detach(self, taps: list[str]) -> None:
        await batch.remove(plan_taps([Tap(name=name) for name in taps]))


async def connect_guest(path: Path, reply_s: float) -> Guest:
    return await Guest.connect(path, reply_s=reply_s)


def real_parts(config: Config, namespace: str) -> Parts:
    vmm = QemuVmm(
        binary=config.vm.qemu,
        data_dirs=tuple(config.vm.qemu_data_dirs),
        command_s=config.migration.limits.qmp_command_s,
    )
    machines = HostMachines(config, vmm, HostTaps("", namespace), connect_guest)
    taps = HostTaps(config.network.bridge, namespace)
    return Parts(vmm=vmm, taps=taps, machines=machines, connect_guest=connect_guest)
