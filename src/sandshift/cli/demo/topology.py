"""The lab's network and configuration files, as data.

    host a (ns)          switch (ns)          host b (ns)
    br0 .1 ── va ──────── pa │ pb ──────── vb ── br0 .2
     └ taps              br0 │                  └ taps
                             pc
                             │
                          vc .9
                        client (ns)

Pure: names, addresses, plans for `ip`, and the text of each host's config.toml.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.net import Plan, Step

NAMESPACE_PREFIX: Final = "sslab-"
BRIDGE: Final = "br0"
NETWORK: Final = "10.77.0.0"
PREFIX_LENGTH: Final = 24
HOST_A_ADDRESS: Final = "10.77.0.1"
HOST_B_ADDRESS: Final = "10.77.0.2"
CLIENT_ADDRESS: Final = "10.77.0.9"
GUEST_ADDRESS: Final = "10.77.0.50"
GUEST_MAC: Final = "52:54:00:5a:00:50"
"""52:54:00 is QEMU's prefix of locally administered addresses."""

CLIENT_WINDOW_SEGMENTS: Final = 100
"""The client's initial congestion window. With the usual 10 it could not ask on after 50 ms of silence, a request every
5 ms, and would then wait for its retransmission timer (200 ms) whatever the move does: it would measure TCP, not us.
"""

ConfigOverrides = Mapping[str, Mapping[str, object]]
"""Section -> key -> value of config.toml, over what the lab itself sets."""


@dataclass(frozen=True, slots=True)
class HostNames:
    """One lab host's names. `letter` is "a" or "b"."""

    letter: str
    lab_id: str
    address: str

    @property
    def namespace(self) -> str:
        return f"{NAMESPACE_PREFIX}{self.lab_id}-{self.letter}"


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that the lab `lab_id` is made of."""

    lab_id: str

    @property
    def host_a(self) -> HostNames:
        return HostNames("a", self.lab_id, HOST_A_ADDRESS)

    @property
    def host_b(self) -> HostNames:
        return HostNames("b", self.lab_id, HOST_B_ADDRESS)

    @property
    def switch_namespace(self) -> str:
        return f"{NAMESPACE_PREFIX}{self.lab_id}-sw"

    @property
    def client_namespace(self) -> str:
        return f"{NAMESPACE_PREFIX}{self.lab_id}-c"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (
            self.host_a.namespace,
            self.host_b.namespace,
            self.client_namespace,
            self.switch_namespace,
        )

    def namespace_plan(self) -> Plan:
        """The namespaces. Undone, all that is in them goes."""
        return Plan(
            tuple(
                Step(f"netns add {name}", f"network namespace {name}", undo=f"netns delete {name}")
                for name in self.namespaces
            )
        )

    def cable_plan(self) -> Plan:
        """The veth pairs from the switch to the hosts and the client."""
        ends = (
            ("va", self.host_a.namespace, "pa"),
            ("vb", self.host_b.namespace, "pb"),
            ("vc", self.client_namespace, "pc"),
        )
        return Plan(
            tuple(
                Step(
                    f"link add name {near} netns {namespace} type veth"
                    f" peer name {far} netns {self.switch_namespace}",
                    f"cable {near} to {namespace}",
                )
                for near, namespace, far in ends
            )
        )

    def inner_plans(self) -> dict[str, Plan]:
        """What to make inside each namespace."""
        return {
            self.host_a.namespace: _host_plan("va", self.host_a),
            self.host_b.namespace: _host_plan("vb", self.host_b),
            self.client_namespace: _plan(
                "link set dev lo up",
                f"address add {CLIENT_ADDRESS}/{PREFIX_LENGTH} dev vc",
                "link set dev vc up",
                f"route replace {NETWORK}/{PREFIX_LENGTH} dev vc src {CLIENT_ADDRESS} initcwnd {CLIENT_WINDOW_SEGMENTS}",
            ),
            self.switch_namespace: _plan(
                "link set dev lo up",
                _bridge_line("02:00:5a:00:00:ff"),
                *(f"link set dev {port} master {BRIDGE} up" for port in ("pa", "pb", "pc")),
                f"link set dev {BRIDGE} up",
            ),
        }


def _host_plan(cable: str, host: HostNames) -> Plan:
    number = host.address.rsplit(".", 1)[1]
    return _plan(
        "link set dev lo up",
        _bridge_line(f"02:00:5a:00:00:{int(number):02x}"),
        f"link set dev {cable} master {BRIDGE} up",
        f"address add {host.address}/{PREFIX_LENGTH} dev {BRIDGE}",
        f"link set dev {BRIDGE} up",
    )


def _bridge_line(mac: str) -> str:
    """A bridge with an address of its own: without one it takes its lowest port's, and so changes with every tap."""
    return f"link add name {BRIDGE} address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"


def _plan(*lines: str) -> Plan:
    return Plan(tuple(Step(line, f"lab: '{line}'") for line in lines))


def config_toml(
    host: HostNames, *, folder: Path, cache_dir: Path, overrides: ConfigOverrides | None = None
) -> str:
    """The text of a lab host's config.toml. `folder` is this host's own, for its run and state directories."""
    sections: dict[str, dict[str, object]] = {
        "host": {
            "name": f"host-{host.letter}",
            "network_namespace": host.namespace,
            "migration_address": host.address,
        },
        "places": {
            "run_dir": str(folder / "run"),
            "state_dir": str(folder / "state"),
            "cache_dir": str(cache_dir),
        },
        "network": {"bridge": BRIDGE},
    }
    whole = merged(sections, overrides or {})
    return "\n".join(_toml_section(name, keys) for name, keys in whole.items())


def merged(below: ConfigOverrides, above: ConfigOverrides) -> ConfigOverrides:
    """Both; where both have a key, `above` has it."""
    sections = {section: dict(keys) for section, keys in below.items()}
    for section, keys in above.items():
        sections.setdefault(section, {}).update(keys)
    return sections


def _toml_section(name: str, keys: Mapping[str, object]) -> str:
    # A JSON string, number, boolean or array of them is the same in TOML.
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
