"""What ``ip -batch`` complained about, as one of our errors that says what to do. Pure."""

from __future__ import annotations

import re
from typing import Final

from sandshift.errors import AlreadyThere, NotFound, NotSupported, Rejected, SandshiftError, Unavailable
from sandshift.net.plan import Plan, Step

_FAILED_LINE: Final = re.compile(r"^Command failed -:(\d+)$", re.MULTILINE)
_WRONG_ARGUMENT: Final = re.compile(r'argument "([^"]+)" is wrong')
_NO_NAMESPACE: Final = re.compile(r'Cannot open network namespace "([^"]+)"')
_NO_FILE: Final = re.compile(r"nsenter: cannot open (\S+): No such file")


def failed_step(plan: Plan, complaint: str) -> int | None:
    """Which step of `plan` failed, by its index; None: `ip` did not say.

    Most failures name the batch's line. A wrong argument ends `ip` at once without a line, but quotes the argument.
    Source: iproute2 6.1, lib/utils.c (do_batch, invarg).
    """
    if found := _FAILED_LINE.search(complaint):
        return min(int(found[1]), len(plan.steps)) - 1
    if found := _WRONG_ARGUMENT.search(complaint):
        for index, step in enumerate(plan.steps):
            if found[1] in step.do.split():
                return index
    return None


def explain(plan: Plan, complaint: str) -> SandshiftError:
    """The error to raise for what `ip` wrote on stderr while it applied `plan`."""
    if found := _NO_NAMESPACE.search(complaint):
        return NotFound(
            f"network namespace {found[1]} does not exist: make it with 'ip netns add {found[1]}', or correct"
            " host.network_namespace"
        )
    if found := _NO_FILE.search(complaint):
        return NotFound(f"network namespace {found[1]} does not exist: the pod's network is gone")
    index = failed_step(plan, complaint)
    step = plan.steps[index] if index is not None else None
    return _explain_step(step, complaint)


def _explain_step(step: Step | None, complaint: str) -> SandshiftError:
    subject = step.subject if step else "network"
    if "Operation not permitted" in complaint or "Permission denied" in complaint:
        return Rejected(f"{subject}: making network devices needs root (CAP_NET_ADMIN); run it as root")
    if "/dev/net/tun" in complaint or (step and step.do.startswith("tuntap") and _no_device(complaint)):
        return NotSupported(
            f"{subject}: this machine has no /dev/net/tun; load it with 'modprobe tun', or give the device to the"
            " container that this runs in"
        )
    if "Device or resource busy" in complaint or "File exists" in complaint:
        return AlreadyThere(
            f"{subject} exists already: it belongs to a running sandbox of this name, or one that was killed left it;"
            " stop that sandbox, or delete it with 'ip link delete'"
        )
    if "does not exist" in complaint or "Cannot find device" in complaint:
        return NotFound(f"{subject} does not exist: make it, or correct network.bridge")
    said = "; ".join(
        line for line in complaint.splitlines() if line and not line.startswith("Command failed")
    )
    return Unavailable(f"{subject}: ip refused: {said or 'without a word'}")


def _no_device(complaint: str) -> bool:
    return "No such file or directory" in complaint or "No such device" in complaint
