"""What to make on a host, as data: steps of `ip` and `tc`, each with what takes it back and the object it is about.

Pure. Steps of one program that follow each other are one input of its ``-batch``; `batch.py` runs them, and rolls back by
the same steps when one fails.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from sandshift.errors import Rejected

INTERFACE_NAME_BYTES_MAX: Final = 15
"""IFNAMSIZ is 16 with its NUL. Source: linux/if.h."""
MTU_BYTES_MIN: Final = 576
"""The smallest datagram that every IPv4 host takes. Source: RFC 791."""
MTU_BYTES_MAX: Final = 65521
"""A tap's largest. Source: drivers/net/tun.c, MAX_MTU."""

_TAP_PREFIX: Final = "ss"
_TAP_DIGEST_CHARS: Final = 12
_INTERFACE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of ``ip -batch`` or ``tc -batch``."""

    do: str
    subject: str
    """What it is about, for messages: "tap ss1f0c..."."""
    undo: str = ""
    """The line that takes it back; empty: it goes when an earlier step is undone."""
    program: str = "ip"


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order. What a step of `ip` makes may not exist before."""

    steps: tuple[Step, ...] = ()

    def stages(self) -> tuple[tuple[str, Plan], ...]:
        """The programs to run, one after another, each with its part of the plan."""
        groups = groupby(self.steps, key=lambda step: step.program)
        return tuple((program, Plan(tuple(steps))) for program, steps in groups)

    def batch(self) -> str:
        """The input of ``-batch`` that makes it all, for a plan of one program."""
        return _lines(step.do for step in self.steps)

    def undo_batch(self, applied: int | None = None) -> str:
        """The input that takes the first `applied` steps of a plan of one program back, last first; None: all of them."""
        return _lines(step.undo for step in reversed(self.steps[:applied]) if step.undo)

    def undo_batches(self, applied: int | None = None) -> tuple[tuple[str, str], ...]:
        """Programs and their inputs that take the first `applied` steps back, last first; None: all of them."""
        undone = [step for step in reversed(self.steps[:applied]) if step.undo]
        groups = groupby(undone, key=lambda step: step.program)
        return tuple((program, _lines(step.undo for step in steps)) for program, steps in groups)


@dataclass(frozen=True, slots=True)
class Tap:
    """A sandbox's end of a network card on this host. QEMU opens it with vnet_hdr."""

    name: str
    owner_uid: int = 0
    """Who may open it without CAP_NET_ADMIN: the user QEMU runs as."""
    bridge: str = ""
    """Bridge to attach it to; empty: it stays unattached."""
    mtu_bytes: int = 0
    """0: as the kernel (or the bridge) has it."""

    def __post_init__(self) -> None:
        check_interface_name(self.name, what="tap")
        if self.bridge:
            check_interface_name(self.bridge, what="bridge")
        if self.owner_uid < 0:
            raise Rejected(f"tap {self.name}: owner uid {self.owner_uid} is negative")
        if self.mtu_bytes and not MTU_BYTES_MIN <= self.mtu_bytes <= MTU_BYTES_MAX:
            raise Rejected(
                f"tap {self.name}: mtu {self.mtu_bytes} is outside {MTU_BYTES_MIN} to {MTU_BYTES_MAX} bytes"
            )


def tap_name(namespace: str, sandbox_id: str, card: int) -> str:
    """The name of a sandbox's `card`-th tap: the same on every call, so that a new shim finds its taps again.

    A digest, since an interface's name has room for 15 bytes and a sandbox's id for 64.
    """
    whole = "\0".join((namespace, sandbox_id, str(card))).encode()
    return _TAP_PREFIX + hashlib.blake2b(whole, digest_size=_TAP_DIGEST_CHARS // 2).hexdigest()


def plan_taps(taps: Sequence[Tap]) -> Plan:
    """Make each tap, attach it where it says, and set it up."""
    return Plan(tuple(step for tap in taps for step in _tap_steps(tap)))


def _tap_steps(tap: Tap) -> list[Step]:
    subject = f"tap {tap.name}"
    steps = [
        Step(
            f"tuntap add dev {tap.name} mode tap vnet_hdr user {tap.owner_uid}",
            subject,
            undo=f"link delete dev {tap.name}",
        )
    ]
    if tap.bridge:
        steps.append(Step(f"link set dev {tap.name} master {tap.bridge}", f"bridge {tap.bridge}"))
    mtu = f" mtu {tap.mtu_bytes}" if tap.mtu_bytes else ""
    steps.append(Step(f"link set dev {tap.name}{mtu} up", subject))
    return steps


def check_interface_name(name: str, *, what: str) -> None:
    """Raises Rejected for a name that the kernel, or a line of ``ip -batch``, would not take."""
    if not _INTERFACE_NAME.fullmatch(name):
        raise Rejected(
            f"{what} name {name!r} is not an interface name: 1 to {INTERFACE_NAME_BYTES_MAX} letters, digits, dots,"
            " dashes or underscores, a letter or digit first"
        )


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
