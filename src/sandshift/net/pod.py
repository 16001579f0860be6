"""A pod's network, made by CNI before we come: its interfaces read, and each connected to a tap of the VM. Pure.

The interface stays as CNI made it, with its addresses, so that CNI finds it again; but whatever arrives there goes to the tap
and whatever the guest sends goes out of it, in the kernel, before the host's own network stack sees it (tc ingress, mirred
redirect). So the guest has to have the interface's MAC, its addresses and all of its routes. The tap lies beside it.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandshift.errors import NotSupported, PeerProtocolError
from sandshift.net.plan import Plan, Step, Tap, check_interface_name, plan_taps
from sandshift.sandbox.model import NetworkCard, Route

_INGRESS: Final = "ffff:"
"""The handle of every ingress qdisc. Source: tc(8)."""
_EVERYTHING: Final = "protocol all prio 1 handle 800::800 u32 match u32 0 0"
_DEFAULT: Final = {4: "0.0.0.0/0", 6: "::/0"}
_UNICAST: Final = ("", "unicast")


@dataclass(frozen=True, slots=True)
class Interface:
    """What a pod's interface is to the VM: a card in waiting."""

    name: str
    mac: str
    mtu_bytes: int
    addresses: tuple[str, ...]
    """With prefix length; without those that a kernel makes for itself (link-local)."""
    routes: tuple[Route, ...]

    def card(self, card_id: str) -> NetworkCard:
        return NetworkCard(
            id=card_id, mac=self.mac, addresses=self.addresses, mtu=self.mtu_bytes, routes=self.routes
        )


SHOW_FOUR: Final = "address show\nroute show table main\n"
"""Input of ``ip -j -batch -``."""
SHOW_SIX: Final = "route show table main\n"
"""Input of ``ip -6 -j -batch -``."""


def read_interfaces(four: str, six: str, *, taps: Iterable[str] = ()) -> tuple[Interface, ...]:
    """What `ip` answered to SHOW_FOUR and SHOW_SIX, as interfaces in the order of their numbers.

    The loopback interface, `taps` and what has no hardware address are left out.

    Raises:
        PeerProtocolError: it is not what iproute2 prints. NotSupported: a route that a card cannot have.
    """
    try:
        links, routes_four = _documents(four, 2)
        (routes_six,) = _documents(six, 1)
        routes = [(4, route) for route in routes_four] + [(6, route) for route in routes_six]
        left_out = set(taps)
        return tuple(
            _interface(link, routes)
            for link in sorted(links, key=lambda link: int(link["ifindex"]))
            if link.get("link_type") == "ether" and link["ifname"] not in left_out
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PeerProtocolError(f"'ip -j' printed what cannot be read: {error!r}") from error


def _documents(text: str, count: int) -> list[list[Mapping[str, Any]]]:
    """JSON documents one after another. `ip` prints nothing at all for an empty list."""
    decoder, at, found = json.JSONDecoder(), 0, []
    text = text.strip()
    while at < len(text):
        document, at = decoder.raw_decode(text, at)
        found.append(document)
        while at < len(text) and text[at].isspace():
            at += 1
    if len(found) > count:
        raise ValueError(f"{len(found)} documents in place of {count}")
    return found + [[]] * (count - len(found))


def _interface(link: Mapping[str, Any], routes: Sequence[tuple[int, Mapping[str, Any]]]) -> Interface:
    name = str(link["ifname"])
    check_interface_name(name, what="interface")
    addresses = tuple(
        f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one.get("scope") != "link"
    )
    return Interface(
        name=name,
        mac=str(link["address"]),
        mtu_bytes=int(link["mtu"]),
        addresses=addresses,
        routes=tuple(
            _route(family, route)
            for family, route in routes
            if _is_of(name, route) and not _made_by_kernel(route)
        ),
    )


def _is_of(name: str, route: Mapping[str, Any]) -> bool:
    hops = route.get("nexthops") or ()
    if route.get("dev") == name and route.get("type", "") in _UNICAST and not hops:
        return True
    if any(hop.get("dev") == name for hop in hops):
        raise NotSupported(
            f"interface {name}: its route to {route.get('dst')} goes several ways at once, which a sandbox cannot have: "
            "give the pod one way in the network's CNI configuration"
        )
    return False


def _made_by_kernel(route: Mapping[str, Any]) -> bool:
    """Link-local and multicast routes: the guest's kernel makes its own."""
    destination = str(route["dst"])
    return destination.startswith(("fe80:", "ff00:", "multicast"))


def _route(family: int, route: Mapping[str, Any]) -> Route:
    destination = str(route["dst"])
    network = ipaddress.ip_network(_DEFAULT[family] if destination == "default" else destination)
    return Route(
        destination=str(network),
        gateway=str(route.get("gateway", "")),
        source=str(route.get("prefsrc", "")),
        on_link="onlink" in route.get("flags", ()),
    )


def plan_pod(pairs: Sequence[tuple[Interface, Tap]]) -> Plan:
    """Make each tap, and connect it with its interface both ways.

    What an earlier shim left on an interface is replaced.
    """
    taps = plan_taps([tap for _, tap in pairs])
    redirects = [step for interface, tap in pairs for step in _redirect(interface.name, tap.name)]
    return Plan((*taps.steps, *redirects))


def _redirect(interface: str, tap: str) -> list[Step]:
    subject = f"interface {interface}"
    return [
        # A qdisc of the tap goes with the tap; the interface is not ours, so what we hung on it is taken off.
        _tc(f"qdisc replace dev {interface} ingress", subject, undo=f"qdisc del dev {interface} ingress"),
        _tc(f"qdisc replace dev {tap} ingress", f"tap {tap}"),
        _tc(_filter(interface, tap), subject),
        _tc(_filter(tap, interface), f"tap {tap}"),
    ]


def _filter(at: str, to: str) -> str:
    return f"filter replace dev {at} parent {_INGRESS} {_EVERYTHING} action mirred egress redirect dev {to}"


def _tc(do: str, subject: str, *, undo: str = "") -> Step:
    return Step(do, subject, undo=undo, program="tc")
