"""The real parts: QEMU, taps made with `ip`, the guest image from the cache, the agent behind virtio-serial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sandshift.errors import Rejected
from sandshift.guest.client import Guest
from sandshift.net import batch
from sandshift.net.look import look
from sandshift.net.plan import Plan, Tap, plan_taps, tap_name
from sandshift.net.pod import Interface, plan_pod
from sandshift.rootfs.packer import Packer
from sandshift.shim.haste import ThreadHaste
from sandshift.shim.machines import HostMachines
from sandshift.shim.parts import Parts
from sandshift.vmm.qemu import QemuVmm
from sandshift.vmm.standard import CARDS_MAX

if TYPE_CHECKING:
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

    async def pod_cards(self, sandbox_id: str, network_namespace: str) -> tuple[NetworkCard, ...]:
        interfaces = await self._pod_interfaces(sandbox_id, network_namespace)
        return tuple(interface.card(f"net{index}") for index, interface in enumerate(interfaces))

    async def attach(
        self, sandbox_id: str, cards: tuple[NetworkCard, ...], network_namespace: str = ""
    ) -> dict[str, str]:
        plan, names = self._plan(sandbox_id, cards)
        if network_namespace and cards:
            interfaces = await self._pod_interfaces(sandbox_id, network_namespace)
            if len(interfaces) < len(cards):
                raise Rejected(
                    f"sandbox {sandbox_id} has {len(cards)} network cards and its pod's network {len(interfaces)} "
                    "interfaces: give the pod as many in this host's CNI configuration"
                )
            taps = [
                (one, Tap(name, mtu_bytes=one.mtu_bytes))
                for one, name in zip(interfaces, names, strict=False)
            ]
            plan = plan_pod(taps)
        await batch.apply(plan, network_namespace=network_namespace)
        return {f"net{index}": name for index, name in enumerate(names)}

    async def detach(self, taps: list[str], network_namespace: str = "") -> None:
        # What hangs on a pod's interface points to a tap that is gone: it drops, and goes with the pod's network.
        await batch.remove(plan_taps([Tap(name=name) for name in taps]), network_namespace=network_namespace)

    async def _pod_interfaces(self, sandbox_id: str, network_namespace: str) -> tuple[Interface, ...]:
        ours = [tap_name(self._namespace, sandbox_id, index) for index in range(CARDS_MAX)]
        return await look(network_namespace, taps=ours)


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
    packer = Packer(Path(config.places.cache_dir))
    return Parts(
        vmm=vmm,
        taps=taps,
        machines=machines,
        connect_guest=connect_guest,
        packer=packer,
        haste=ThreadHaste(),
    )
