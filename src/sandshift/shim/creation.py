"""What CreateSandbox asks for, in one of the two languages of its options: ours or CRI's."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from sandshift.errors import Rejected
from sandshift.identifiers import shown
from sandshift.sandbox import codec
from sandshift.sandbox.model import Sandbox
from sandshift.shim.parts import PodShare, Wish
from sandshift.shim.pod import Pod, pod_of_cri
from sandshift.wire.containerd import pod_pb2, sandbox_pb2
from sandshift.wire.sandshift import shim_pb2

RESOLV_CONF: Final = Path("/etc/resolv.conf")
RESOLV_CONF_BYTES_MAX: Final = 64 << 10

M = TypeVar("M", bound=Message)


def fresh_mac() -> str:
    """A unicast address of our own making: the locally-administered bit set. Source: IEEE 802, 8.2."""
    return ":".join(f"{byte:02x}" for byte in (0x52, 0x54, *secrets.token_bytes(4)))


def parse_creation(request: sandbox_pb2.CreateSandboxRequest) -> Pod:
    """What was asked for. Reads this host's resolv.conf: blocks.

    Raises:
        Rejected: names the field.
    """
    if _names(request.options, pod_pb2.PodSandboxConfig):
        return pod_of_cri(
            request.sandbox_id,
            _unpacked(request.options, pod_pb2.PodSandboxConfig()),
            network_namespace=request.netns_path,
            annotations=request.annotations,
            host_resolv_conf=_read(RESOLV_CONF),
        )
    options = shim_pb2.SandboxOptions()
    if request.options.type_url:
        if not _names(request.options, shim_pb2.SandboxOptions):
            raise Rejected(
                f"options: type {shown(request.options.type_url)} is neither sandshift.v1.SandboxOptions nor "
                "runtime.v1.PodSandboxConfig; leave options out for defaults"
            )
        _unpacked(request.options, options)
    return pod_of_options(request, options)


def pod_of_options(request: sandbox_pb2.CreateSandboxRequest, options: shim_pb2.SandboxOptions) -> Pod:
    cards = tuple(
        replace(card, id=f"net{index}", mac=card.mac or fresh_mac())
        for index, card in enumerate(map(codec.card_from_proto, options.network_cards))
    )
    if cards and request.netns_path:
        raise Rejected(
            "options.network_cards and netns_path are both given: a pod's cards are those of its network namespace"
        )
    model = Sandbox(
        sandbox_id=request.sandbox_id,
        hostname=options.hostname or request.sandbox_id,
        network_cards=cards,
        annotations=dict(request.annotations),
    )
    wish = Wish(
        memory_bytes=options.memory_bytes,
        vcpus=options.vcpus,
        cold=options.cold,
        network_namespace=request.netns_path,
    )
    return Pod(model, wish, PodShare())


def _names(options: Any, kind: type[Message]) -> bool:
    """Whether it is of this kind. containerd's types stand there bare, without the "type.googleapis.com/" of protobuf's."""
    return options.type_url.rpartition("/")[2] == kind.DESCRIPTOR.full_name


def _unpacked(options: Any, message: M) -> M:
    try:
        message.ParseFromString(options.value)
    except DecodeError as error:
        raise Rejected(f"options: cannot be read as {message.DESCRIPTOR.full_name}") from error
    return message


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()[:RESOLV_CONF_BYTES_MAX]
    except OSError:
        return b""
